"""Which waiting requests to hold while another one computes the prefix that they share with it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

# What a wait must save. It costs a pass of its own, and a pass reads all weights: on a GPU as long as it takes to
# multiply them with 200 to 300 tokens (flops over bytes a second), so that a shorter prefix is computed again for free.
LEAST_TOKENS = 256
# In one pass. SGLang looks each of them up in its radix tree again, which takes up to 0.1 ms.
MOST_HELD = 128


class Prompt(NamedTuple):
    """A request as far as sharing goes.

    Attributes:
        request: the request itself, for identity.
        tokens: all that is to be computed or cached before its next new token.
        tree: what else the radix tree tells prefixes apart by.
        cached_tokens: of ``tokens``, what the tree has, in whole pages; of a leader, what it had before its last pass.
        usable_tokens: of ``tokens``, what it could take from the tree at most.
    """

    request: object
    tokens: Sequence[int]
    tree: Hashable
    cached_tokens: int
    usable_tokens: int


class Wait(NamedTuple):
    """A request waits for the prefill of ``leader``.

    Attributes:
        cached_tokens: what the tree had of the request when it began to wait.
        last: the leader's last pass has been launched: there is nothing more to wait for after this one.
    """

    leader: object
    cached_tokens: int
    last: bool


def wait(
    prompt: Prompt,
    computing: Sequence[Prompt | None],
    launched: Sequence[Prompt | None],
    page_tokens: int,
    before: Wait | None,
) -> Wait | None:
    """How a request that could be admitted waits in this pass, or None if it is to be admitted.

    It waits only for a request that is prefilled in this very pass, or that was in the pass still running, whose
    result SGLang has not put into the tree. So a wait ends one pass after its leader's prefill, whatever became of it;
    and another one begins only if the tree has at least ``LEAST_TOKENS`` more of the request than when the one before
    began: a request waits at most once for every ``LEAST_TOKENS`` of its prompt, and nobody waits for a waiting one.

    Args:
        prompt: the request.
        computing: the requests of this pass; None for one whose prefix nobody can share.
        launched: the requests of the pass that is still running.
        page_tokens: the radix tree shares whole pages of so many tokens.
        before: its last wait.
    """
    if prompt.cached_tokens + LEAST_TOKENS > prompt.usable_tokens:
        return None  # most requests of most loads: nobody is looked at for them
    for leaders, last in ((computing, False), (launched, True)):
        for leader in leaders:
            if leader is None or not _shares(prompt, leader, page_tokens):
                continue
            if before is None or prompt.cached_tokens >= before.cached_tokens + LEAST_TOKENS:
                return Wait(leader.request, prompt.cached_tokens, last)
            if leader.request is before.leader and not before.last:
                return Wait(leader.request, before.cached_tokens, last)
    return None


def _shares(prompt: Prompt, leader: Prompt, page_tokens: int) -> bool:
    start, end = prompt.cached_tokens, prompt.cached_tokens + -(-LEAST_TOKENS // page_tokens) * page_tokens
    return (
        end <= min(prompt.usable_tokens, len(leader.tokens))
        and end > leader.cached_tokens  # else the leader had it before this chunk, and the tree does not give it
        and prompt.tokens[end - 1] == leader.tokens[end - 1]  # most that differ do so here
        and prompt.tree == leader.tree
        and prompt.tokens[start:end] == leader.tokens[start:end]  # and most others here, behind a long cached prefix
        and prompt.tokens[:end] == leader.tokens[:end]
    )


@dataclass
class Held:
    """Totals since the process started.

    Attributes:
        requests: requests that waited (again after they were retracted).
        passes: passes in which one was held, summed over requests.
        prefix_tokens: tokens that these requests found in the tree after a wait, and not when it began.
        reason: why nobody is held here; None: requests are held.
    """

    requests: int = 0
    passes: int = 0
    prefix_tokens: int = 0
    reason: str | None = None

    def count_held(self, before: Wait | None, now: Wait) -> None:
        self.passes += 1
        if before is None:
            self.requests += 1
        else:
            self.count_found(before, now.cached_tokens)

    def count_found(self, before: Wait, cached_tokens: int) -> None:
        """A request that waited has ``cached_tokens`` in the tree now."""
        self.prefix_tokens += max(0, cached_tokens - before.cached_tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
