"""The workloads of ablate_radix.py: requests as token ids, and which of them wait for the answers of others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.token_traces import choose, token_ids

Words = Callable[[int], list[int]]  # so many token ids, new ones at each call


@dataclass(frozen=True)
class Turn:
    """A request: the prompt and answer of the turn before, then ``own``; ``then`` are sent when it is answered."""

    own: list[int]
    new_tokens: int
    samples: int = 1
    then: list[Turn] = field(default_factory=list)


@dataclass(frozen=True)
class Workload:
    """``turns`` are sent at once."""

    about: str
    turns: list[Turn]


@dataclass(frozen=True)
class Size:
    """What a kind of machine can do: ``workloads`` gives what is run there, with arguments of those in ``MAKERS``.

    ``start_s`` and ``run_s`` are rough times, for the estimate: an engine comes up, a workload runs once.
    """

    vocabulary: range
    running: int
    pool_tokens: int
    start_s: float
    run_s: float
    workloads: dict[str, dict[str, int]]
    trace: dict[str, int]


def shared_prefix(words: Words, groups: int, prompts: int, shared: int, own: int, new: int) -> Workload:
    """Like SGLang's generated-shared-prefix, but each prefix has been seen: a request of its own comes first."""
    turns = [Turn(words(shared), 1, then=[Turn(words(own), new) for _ in range(prompts)]) for _ in range(groups)]
    about = f"{groups} prefixes of {shared:,} tokens, then {prompts} prompts of {own} tokens behind each; {new} new"
    return Workload(about, turns)


def samples(words: Words, prompts: int, n: int, prompt: int, new: int) -> Workload:
    turns = [Turn(words(prompt), new, n) for _ in range(prompts)]
    return Workload(f"{prompts} prompts of {prompt:,} tokens, n = {n}, {new} new", turns)


def fork(
    words: Words, roots: int, shared: int, branches: int, branch: int, leaves: int, leaf: int, new: int
) -> Workload:
    """Tree of thought: each answer is continued in several ways."""

    def one() -> Turn:
        twigs = [[Turn(words(leaf), new) for _ in range(leaves)] for _ in range(branches)]
        return Turn(words(shared), new, then=[Turn(words(branch), new, then=twig) for twig in twigs])

    about = (
        f"{roots} x {shared:,} tokens, each forked into {branches} x {branch}, each of these into {leaves} x {leaf}; "
        f"{new} new at each place"
    )
    return Workload(about, [one() for _ in range(roots)])


def few_shot(words: Words, shared: int, questions: int, own: int, new: int) -> Workload:
    """A batch job on a server that has never seen the examples."""
    prefix = words(shared)
    turns = [Turn(prefix + words(own), new) for _ in range(questions)]
    return Workload(f"{questions} questions of {own} tokens behind {shared:,} tokens of examples, {new} new", turns)


def multi_turn(words: Words, talks: int, turns: int, system: int, own: int, new: int) -> Workload:
    prefix = words(system)

    def talk(left: int) -> list[Turn]:
        return [Turn(words(own), new, then=talk(left - 1))] if left else []

    first = [Turn(prefix + words(own), new, then=talk(turns - 1)) for _ in range(talks)]
    about = f"{talks} conversations of {turns} turns, {own} tokens each, behind {system} tokens for all; {new} new"
    return Workload(about, first)


def unrelated(words: Words, requests: int, own: int, new: int) -> Workload:
    return Workload(f"{requests} x {own:,} tokens, {new} new", [Turn(words(own), new) for _ in range(requests)])


MAKERS: dict[str, Callable[..., Workload]] = {
    "shared-prefix": shared_prefix,
    "hot-prefix": shared_prefix,
    "n-sampling": samples,
    "nested-fork": fork,
    "few-shot": few_shot,
    "cold-burst": few_shot,
    "multi-turn": multi_turn,
    "unrelated": unrelated,
}
SIZES = {
    "cpu": Size(
        range(300, 1200), running=16, pool_tokens=20000, start_s=40, run_s=3,
        workloads={
            "shared-prefix": {"groups": 2, "prompts": 8, "shared": 1024, "own": 16, "new": 32},
            "n-sampling": {"prompts": 2, "n": 6, "prompt": 768, "new": 32},
            "nested-fork": {"roots": 1, "shared": 512, "branches": 4, "branch": 48, "leaves": 3, "leaf": 16, "new": 16},
            "few-shot": {"shared": 512, "questions": 12, "own": 24, "new": 4},
            "multi-turn": {"talks": 6, "turns": 3, "system": 64, "own": 96, "new": 16},
            "unrelated": {"requests": 8, "own": 256, "new": 32},
        },
        trace={"requests": 8, "limit": 2500, "new": 24},
    ),
    "gpu": Size(
        range(1000, 30000), running=64, pool_tokens=155000, start_s=90, run_s=8,
        workloads={
            "shared-prefix": {"groups": 4, "prompts": 32, "shared": 4096, "own": 64, "new": 128},
            # long enough to tell what copies are worth that are made on the way
            "hot-prefix": {"groups": 1, "prompts": 256, "shared": 4096, "own": 64, "new": 256},
            "n-sampling": {"prompts": 8, "n": 8, "prompt": 2048, "new": 256},
            "nested-fork": {
                "roots": 4, "shared": 4096, "branches": 4, "branch": 128, "leaves": 4, "leaf": 64, "new": 64,
            },
            "few-shot": {"shared": 2048, "questions": 128, "own": 64, "new": 8},
            "cold-burst": {"shared": 8000, "questions": 64, "own": 64, "new": 64},
            "multi-turn": {"talks": 48, "turns": 5, "system": 256, "own": 512, "new": 128},
            "unrelated": {"requests": 64, "own": 2048, "new": 128},
        },
        trace={"requests": 64, "limit": 16000, "new": 512},
    ),
}  # fmt: skip


def make(name: str, size: Size) -> Workload:
    """The same in every process."""
    rng = random.Random(name)
    return MAKERS[name](lambda n: [rng.choice(size.vocabulary) for _ in range(n)], **size.workloads[name])


def from_trace(path: Path, size: Size) -> Workload:
    """The first requests that fit, answers cut to ``new`` tokens; raises token_traces.TraceError."""
    chosen, left_out = choose(path, size.trace["requests"], size.trace["limit"])
    turns = [Turn(token_ids(r, size.vocabulary), max(2, min(r.output_tokens, size.trace["new"]))) for r in chosen]
    about = (
        f"the first {len(turns)} requests of up to {size.trace['limit']:,} tokens ({left_out} longer ones before them "
        f"left out), at most {size.trace['new']} new"
    )
    return Workload(about, turns)


def requests_of(turns: list[Turn]) -> int:
    return sum(turn.samples + requests_of(turn.then) for turn in turns)


def least_prefill_tokens(prompts: list[list[int]], generated: int) -> int:
    """What a prefix cache that never forgets has to compute, its requests coming one after the other.

    Args:
        prompts: all prompts.
        generated: tokens within the prompts that the engine itself wrote: answers that later prompts contain.
    """
    distinct, before = -generated, []
    for prompt in sorted(prompts):
        same = next((i for i, (a, b) in enumerate(zip(before, prompt)) if a != b), min(len(before), len(prompt)))
        distinct, before = distinct + len(prompt) - same, prompt
    return distinct


def as_json(turns: list[Turn]) -> list[dict[str, Any]]:
    return [{"own": t.own, "new_tokens": t.new_tokens, "samples": t.samples, "then": as_json(t.then)} for t in turns]
