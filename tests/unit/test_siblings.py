"""Who waits for whom, and that nobody waits for long: the decision, and a scheduler in small that asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packinfer_sgl.planning import prefix_hold as siblings
from packinfer_sgl.planning.prefix_hold import LEAST_TOKENS, Held, Prompt, Wait, wait

LONG = tuple(range(1000))


def prompt(tokens: tuple[int, ...], cached: int = 0, tree: object = None, usable: int | None = None) -> Prompt:
    return Prompt(object(), tokens, tree, cached, len(tokens) - 1 if usable is None else usable)


def waits(waiting: Prompt, leader: Prompt, page: int = 1) -> bool:
    return wait(waiting, [leader], [], page, None) is not None


def test_a_long_shared_prefix_is_waited_for() -> None:
    leader, waiting = prompt((*LONG, 1)), prompt((*LONG, 2))
    assert wait(waiting, [None, leader], [], 1, None) == Wait(leader.request, 0, last=False)
    assert wait(waiting, [None], [None, leader], 1, None) == Wait(leader.request, 0, last=True)
    assert wait(waiting, [], [], 1, None) is None


@pytest.mark.parametrize(
    ("shared", "cached", "page", "expected"),
    [
        (LEAST_TOKENS, 0, 1, True),
        (LEAST_TOKENS - 1, 0, 1, False),
        (900, 900 - LEAST_TOKENS, 1, True),
        (900, 901 - LEAST_TOKENS, 1, False),
        (900, 900, 1, False),
        (600, 0, 600, True),  # one page: fewer tokens are never shared
        (599, 0, 600, False),
        (LEAST_TOKENS + 64, 64, 64, True),
        (LEAST_TOKENS + 63, 64, 64, False),
    ],
)
def test_what_is_long(shared: int, cached: int, page: int, expected: bool) -> None:
    leader = prompt((*LONG[:shared], -1, -2, -3), cached)
    assert waits(prompt((*LONG[:shared], -4, -5, -6), cached), leader, page) is expected


def test_what_cannot_be_shared_is_not_waited_for() -> None:
    leader = prompt(LONG, tree=("lora a", None))
    assert waits(prompt(LONG, tree=("lora a", None)), leader)
    assert not waits(prompt(LONG, tree=("lora b", None)), leader)
    assert not waits(prompt(LONG, tree=("lora a", None), usable=LEAST_TOKENS - 1), leader)  # log-probabilities
    assert not waits(prompt((-1, *LONG[1:]), tree=("lora a", None)), leader)  # equal but for the first token


def test_nobody_waits_for_what_the_leader_has_behind_it() -> None:
    """A tree with windows may have given up what an earlier chunk of it put there, and no later one brings it back."""
    waiting = prompt((*LONG[:600], -1, *LONG))
    assert waits(waiting, prompt(LONG)) and waits(waiting, prompt(LONG, cached=LEAST_TOKENS - 1))
    assert not waits(waiting, prompt(LONG, cached=LEAST_TOKENS))
    before = Wait(leader := object(), 0, last=False)
    assert wait(waiting, [Prompt(leader, LONG, None, 512, 999)], [], 1, before) is None


def test_nobody_is_looked_at_for_a_request_that_cannot_gain() -> None:
    """Of many short prompts at once each would be compared with all before it."""

    class Unread(list):
        def __iter__(self):
            raise AssertionError("looked at")

    for usable, cached in ((LEAST_TOKENS - 1, 0), (LEAST_TOKENS + 99, 100)):
        assert wait(prompt(LONG, cached, usable=usable), Unread(), Unread(), 1, None) is None
    with pytest.raises(AssertionError, match="looked at"):
        wait(prompt(LONG, usable=LEAST_TOKENS), Unread(), [], 1, None)


def test_a_wait_ends_one_pass_after_its_leader() -> None:
    leader, other, waiting = prompt(LONG), prompt(LONG), prompt(LONG)
    first = wait(waiting, [leader], [], 1, None)
    assert wait(waiting, [leader], [], 1, first) == first  # another chunk of it
    second = wait(waiting, [], [leader], 1, first)
    assert second == Wait(leader.request, 0, last=True)
    for computing, launched in (([], [leader]), ([leader], []), ([other], []), ([], [other])):
        assert wait(waiting, computing, launched, 1, second) is None


def test_a_wait_is_for_one_leader() -> None:
    """It counts from its beginning, while chunks of the leader enter the tree."""
    leader, before = prompt(LONG), Wait(object(), 100, last=False)
    assert wait(prompt(LONG, cached=150), [leader], [], 1, before) is None
    before = Wait(leader.request, 100, last=False)
    assert wait(prompt(LONG, cached=150), [leader], [], 1, before) == before


def test_only_who_gained_waits_again() -> None:
    """The tree of prompts has another level."""
    leader = prompt(LONG)
    before = Wait(object(), 100, last=True)
    assert wait(prompt(LONG, cached=99 + LEAST_TOKENS), [leader], [], 1, before) is None
    cached = 100 + LEAST_TOKENS
    assert wait(prompt(LONG, cached), [leader], [], 1, before) == Wait(leader.request, cached, last=False)


def test_totals() -> None:
    held, leader = Held(), object()
    held.count_held(None, first := Wait(leader, 10, last=False))
    held.count_held(first, Wait(leader, 10, last=True))
    held.count_held(first, again := Wait(leader, 300, last=True))
    held.count_found(again, 700)
    held.count_found(Wait(leader, 50, last=True), 40)  # evicted in the meantime
    assert held.as_dict() == {"requests": 1, "passes": 3, "prefix_tokens": 690, "reason": None}


# A scheduler in small, with the passes of SGLang's: first the rest of a prompt in chunks, then the waiting requests in
# order; with overlap, what a pass computes enters the tree after the next one was composed.
LEAST = 4


@dataclass(eq=False)
class Request:
    tokens: tuple[int, ...]
    tree: int
    wait: Wait | None = None
    waits: list[Wait] = field(default_factory=list)
    computed: int = 0
    done: int = 0  # tokens cached or computed
    start: int = 0  # what of them its last pass began with


@dataclass
class Scheduler:
    waiting: list[Request]
    page: int
    chunk: int
    overlap: bool
    holding: bool
    cached: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    launched: list[Request] = field(default_factory=list)
    chunked: Request | None = None
    held: Held = field(default_factory=Held)

    def match(self, request: Request, limit: int) -> int:
        longest = 0
        for tree, tokens in self.cached:
            if tree == request.tree:
                same = next((i for i, (a, b) in enumerate(zip(tokens, request.tokens)) if a != b), len(tokens))
                longest = max(longest, min(same, len(request.tokens), limit) // self.page * self.page)
        return longest

    def of(self, request: Request) -> Prompt:
        return Prompt(request, request.tokens, request.tree, request.start, len(request.tokens) - 1)

    def process(self, requests: list[Request]) -> None:
        self.cached += [(r.tree, r.tokens[: r.done // self.page * self.page]) for r in requests]

    def step(self, lost: bool) -> None:
        """One pass; with ``lost`` nothing of what runs ever enters the tree (aborted, evicted)."""
        launched = self.launched if self.overlap else []
        if self.chunked is not None:
            self.process([] if lost else [self.chunked])  # SGLang puts each chunk into the tree before the next
        run, left, still = [], self.chunk, []
        if self.chunked is not None:
            run, left = [self.chunked], self.compute(self.chunked, left)
        for i, request in enumerate(self.waiting):
            request.start = request.done = self.match(request, len(request.tokens) - 1)
            computing = [self.of(r) for r in run]
            found = None
            if self.holding:
                found = wait(self.of(request), computing, list(map(self.of, launched)), self.page, request.wait)
            if left <= 0:
                still += self.waiting[i:]
                break
            if found is not None:
                self.held.count_held(request.wait, found)
                request.wait = found
                request.waits.append(found)
                still.append(request)
                continue
            if request.wait is not None:
                self.held.count_found(request.wait, request.done)
            left = self.compute(request, left)
            run.append(request)
        assert run or launched or not self.waiting, "there is work, and the engine has nothing to run"
        self.waiting = still
        self.chunked = next((r for r in run if r.done < len(r.tokens)), None)
        ended = [r for r in run if r is not self.chunked]
        self.process([] if lost else launched if self.overlap else ended)
        self.launched = ended

    def compute(self, request: Request, left: int) -> int:
        request.start = request.done
        new = min(left, len(request.tokens) - request.done)
        request.done += new
        request.computed += new
        return left - new


@st.composite
def families(draw: st.DrawFn) -> list[Request]:
    """Prompts of a random tree, each with a token of its own at the end."""
    spans = [tuple(draw(st.lists(st.integers(0, 2), min_size=0, max_size=12))) for _ in range(4)]
    shapes = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=10))
    return [
        Request((*(t for i in shape for t in spans[i]), 100 + n), draw(st.integers(0, 1)))
        for n, shape in enumerate(shapes)
    ]


def least_computed(requests: list[Request]) -> int:
    known, computed = set(), 0
    for r in requests:
        prefixes = {(r.tree, r.tokens[: n + 1]) for n in range(len(r.tokens))}
        computed += len(prefixes - known)
        known |= prefixes
    return computed


def play(scheduler: Scheduler, lost: list[bool]) -> int:
    requests, passes = list(scheduler.waiting), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siblings, "LEAST_TOKENS", LEAST)
        while scheduler.waiting or scheduler.chunked:
            scheduler.step(passes < len(lost) and lost[passes])
            passes += 1
            assert passes < 1000, "somebody waits for ever"
    assert all(r.done == len(r.tokens) for r in requests)
    return passes


scheduling = st.tuples(st.sampled_from([1, 1, 3, 8]), st.sampled_from([5, 11, 1000]), st.booleans())


@given(families(), scheduling, st.lists(st.booleans(), max_size=20))
def test_nobody_waits_for_long(requests, scheduling, lost) -> None:
    page, chunk, overlap = scheduling
    scheduler = Scheduler(requests, page, chunk, overlap, holding=True)
    play(scheduler, lost)
    for request in requests:
        starts = [(w.leader, w.cached_tokens) for w in request.waits]
        assert len(set(starts)) <= 1 + len(request.tokens) // LEAST
        for start in set(starts):  # at most each pass that prefills the leader, and one more
            assert starts.count(start) <= 2 + len(start[0].tokens) // max(1, chunk)
        ends = [w for w in request.waits if w.last]
        assert len({(w.leader, w.cached_tokens) for w in ends}) == len(ends)
    assert scheduler.held.requests == sum(bool(r.waits) for r in requests)
    assert scheduler.held.passes == sum(len(r.waits) for r in requests)


@given(families(), scheduling)
def test_shared_prefixes_are_computed_once(requests, scheduling) -> None:
    page, chunk, overlap = scheduling
    scheduler = Scheduler(requests, page, chunk, overlap, holding=True)
    play(scheduler, [])
    short = -(-LEAST // page) * page + page - 1  # too short to be waited for, or the rest of a page
    assert sum(r.computed for r in requests) <= least_computed(requests) + short * (len(requests) - 1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_one_of_eight_computes_what_they_share(chunk: int, overlap: bool) -> None:
    def computed(holding: bool) -> tuple[int, Scheduler]:
        requests = [Request((*range(20), 100 + i), 0) for i in range(8)]
        scheduler = Scheduler(requests, 1, chunk, overlap, holding)
        play(scheduler, [])
        return sum(r.computed for r in requests), scheduler

    with_it, scheduler = computed(True)
    assert with_it == 20 + 8 and computed(False)[0] > 2 * with_it if chunk == 1000 else with_it == 28
    assert scheduler.held.prefix_tokens <= 7 * 20
    if chunk == 1000:
        assert scheduler.held == Held(requests=7, passes=14 if overlap else 7, prefix_tokens=140)
