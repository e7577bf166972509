"""What a running SGLang server, stock or not, tells of its sharing by ``/metrics``.

Each report of a decode step (every 40th, ``--decode-log-interval``) has the requests of the batch, the sum of their
lengths and the KV slots that they hold. Lengths over slots is the ceiling of that step; who shares what is not told.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.tools.asking import CommandError, ask, server_info
from packinfer_sgl.tools.estimate_batches import Sharers, Step, planned_step

SAMPLE_S = 30.0
INTERVAL_S = 0.5  # shorter than the time of 40 decode steps
RUNNING, LENGTHS, SLOTS = "sglang:num_running_reqs", "sglang:decode_sum_seq_lens", "sglang:kv_used_tokens"
TOKENS = "sglang:realtime_tokens_total"
NO_METRICS = "exports no metrics of SGLang: start it with --enable-metrics (behind a router, name the server itself)"
Rank = tuple[tuple[str, str], ...]

NOTES = (
    "a server tells how much its requests share, not who shares what: the rows take one prefix for all of them, and "
    "as many as can be; a request log tells (estimate FILE)",
    "prompts that are being computed are among the KV tokens, so that the ceiling is a lower bound",
)


@dataclass(frozen=True)
class Look:
    """A decode step of one rank: requests, the sum of their lengths, and the KV slots that they hold together."""

    running: int
    logical: int
    unique: int


@dataclass(frozen=True)
class Seen:
    """What a server did while it was watched.

    Attributes:
        tokens: by ``decode``, ``prefill_compute`` and ``prefill_cache`` (found in the radix cache), of all ranks.
    """

    looks: list[Look]
    tokens: Counter[str]

    @property
    def steps(self) -> int:
        """Decode steps of all ranks."""
        return max(round(self.tokens["decode"] / float(np.mean([look.running for look in self.looks]))), 1)

    @property
    def cached(self) -> float:
        """The part of the prompt tokens that was found in the radix cache."""
        return self.tokens["prefill_cache"] / max(self.tokens["prefill_cache"] + self.tokens["prefill_compute"], 1)


def info_of(url: str, api_key: str | None = None) -> dict:
    """``/server_info`` of a server whose memory tells what is shared; raises CommandError if it does not."""
    info = server_info(url, api_key)
    if info.get("disable_radix_cache"):
        raise CommandError(
            f"the server at {url} runs without a radix cache, so its memory does not tell what requests share; "
            "its request log does (estimate FILE)"
        )
    return info


def watch(url: str, api_key: str | None = None) -> Seen:
    """Look at a server for ``SAMPLE_S``; raises CommandError if it has no metrics, or decodes nothing."""
    before, first = read_metrics(url, api_key)
    end, looks, tokens = time.monotonic() + SAMPLE_S, [], first
    while time.monotonic() < end:
        time.sleep(INTERVAL_S)
        now, tokens = read_metrics(url, api_key)
        looks += [look for rank in now if (look := new_look(before.get(rank, {}), now[rank]))]
        before = now
    if not looks:
        raise CommandError(f"the server at {url} decoded next to nothing within {SAMPLE_S:g} s; ask under its load")
    return Seen(looks, Counter({mode: round(tokens[mode] - first[mode]) for mode in tokens}))


def read_metrics(url: str, api_key: str | None) -> tuple[dict[Rank, dict[str, float]], Counter[str]]:
    """The gauges of each rank, and the tokens of all."""
    answer = ask(url, "/metrics", api_key)
    ranks: dict[Rank, dict[str, float]] = {}
    tokens: Counter[str] = Counter()
    if answer.ok and "sglang:" in answer.text:
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                labels = {**sample.labels}
                if labels.get("pp_rank", "0") != "0" or labels.get("priority"):
                    continue  # the same batch again, or a part of it
                if sample.name == TOKENS:
                    tokens[labels["mode"]] += sample.value  # type: ignore[assignment]
                elif sample.name in (RUNNING, LENGTHS, SLOTS):
                    ranks.setdefault(tuple(sorted(labels.items())), {})[sample.name] = sample.value
    if not answer.ok or "sglang:" not in answer.text:
        raise CommandError(f"the server at {url} {NO_METRICS}")
    return ranks, tokens


def new_look(before: dict[str, float], now: dict[str, float]) -> Look | None:
    """The decode step that was reported between two readings; None if there was none.

    Reports of prefills and of idleness write the requests and the slots, too. What such a report left does not go with
    the lengths of the step before it if the slots are fewer than those of a mean request.
    """
    running, logical, slots = (int(now.get(name, 0)) for name in (RUNNING, LENGTHS, SLOTS))
    if logical == before.get(LENGTHS, 0) or not running or slots < logical / running:
        return None
    return Look(running, logical, min(slots, logical))  # slots of prompts that are being computed count, too


def prefixes(look: Look, most: bool) -> tuple[PrefixTree, np.ndarray]:
    """A batch as it was looked at: one prefix for all its requests, or as many prefixes (``most``) as can be.

    Returns:
        the tree, and [running] int32 KV tokens of each request, all alike.
    """
    n = look.running
    lens = np.full(n, look.logical // n, np.int32)
    lens[: look.logical % n] += 1
    groups = max(min(look.unique * n // look.logical, n // 2), 1) if most else 1
    ends = {n * (i + 1) // groups - 1 for i in range(groups)}
    shared = min((look.logical - look.unique) // max(n - groups, 1), int(lens[-1]) - 1)
    return PrefixTree.from_neighbours(range(n), [0 if i in ends else shared for i in range(n - 1)]), lens


def planned_looks(looks: list[Look], planner: DecodePlanner, most: bool) -> list[Step]:
    """What plans of the steps that were looked at would read."""
    steps = []
    for look in looks:
        tree, kv_lens = prefixes(look, most)
        steps.append(planned_step(StepBatch(np.ones(look.running, np.int32), kv_lens, requests=Sharers(tree)), planner))
    return steps
