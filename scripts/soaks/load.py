"""What a soak asks of an engine: families of prompts, and waves of random requests for them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

HOT = 15  # prompts that most requests of a wave are for


@dataclass(frozen=True)
class Load:
    """
    Attributes:
        requests, seed: how many, and which.
        prompts: different ones.
        root: fewest and most tokens that all prompts of a family share.
        lengths: each answer has one of these, in tokens; those below the longest come while others run.
        within_s: how much later than the others of their wave they come, at most.
        urgent: whether they have a priority that preempts others.
        samples: answers to a request for several, which one in ten is; 1: none is.
        logprobs: share of waves that ask for log-probabilities, without which SGLang mixes decodes into prefills.
    """

    requests: int
    seed: int
    prompts: int = 60
    root: tuple[int, int] = (100, 400)
    lengths: tuple[int, ...] = (0, 3, 20, 60, 60, 60, 60)
    within_s: float = 2.0
    urgent: bool = False
    samples: int = 1
    logprobs: float = 0.0

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Order:
    """A request.

    Attributes:
        nth: of the load.
        abort_at: part of the streamed answer at which it is aborted; None: it is not.
        samples: answers; only a single one is streamed.
    """

    nth: int
    prompt: int
    tokens: int
    abort_at: int | None
    samples: int
    logprobs: bool


def prompts(load: Load) -> list[list[int]]:
    """Families of three levels: many tokens for all of a family, less for each branch, some for each prompt."""
    rng = random.Random(load.seed)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(300, 1200) for _ in range(rng.randint(low, high))]

    made: list[list[int]] = []
    while len(made) < load.prompts:
        root = words(*load.root)
        for _ in range(rng.randint(1, 3)):
            branch = root + words(1, 80)
            made += [branch + words(1, 40) for _ in range(rng.randint(1, 4))]
    return made[: load.prompts]


def waves(load: Load) -> Iterator[tuple[list[Order], bool]]:
    """Requests that come together, and whether the cache is flushed once they are answered."""
    rng, at = random.Random(load.seed + 1), 0
    while at < load.requests:
        hot = rng.sample(range(load.prompts), min(HOT, load.prompts))
        logprobs = load.logprobs > 0 and rng.random() < load.logprobs
        orders = []
        for nth in range(at, min(load.requests, at + rng.randint(20, 80))):
            tokens = rng.choice(load.lengths)
            abort_at = rng.randint(1, tokens - 1) if tokens > 1 and rng.random() < 0.1 else None
            samples = load.samples if load.samples > 1 and abort_at is None and rng.random() < 0.1 else 1
            prompt = rng.choice(hot if rng.random() < 0.9 else range(load.prompts))
            orders.append(Order(nth, prompt, tokens, abort_at, samples, logprobs))
        at += len(orders)
        yield orders, at == len(orders) or rng.random() < 0.2  # at least once


def greedy(tokens: int, samples: int = 1) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, "n": samples}
