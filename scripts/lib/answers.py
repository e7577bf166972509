"""Greedy answers of two engines, compared."""

from __future__ import annotations

from collections import Counter
from typing import Any

NEAR_TIE = 1e-4  # log-probabilities closer than this are a tie: summing in another order may swap them


def verdict(stock: dict[str, Any], packed: dict[str, Any]) -> str:
    """``equal``, ``near-tie`` or ``different``: two greedy answers with their log-probabilities."""
    pairs = zip(
        stock["output_token_logprobs"], packed["output_token_logprobs"], stock["output_top_logprobs"], strict=True
    )
    for (best, token, _), (_, other, _), top in pairs:
        if token != other:
            gaps = [best - logprob for logprob, candidate, _ in top if candidate == other]
            return "near-tie" if gaps and gaps[0] <= NEAR_TIE else "different"
    return "equal"


def compare(these: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> Counter[str]:
    """How often each verdict is given for answers of the same name, ``/turn/turn#sample``.

    Where an answer is not ``equal`` the turns after it have other prompts and are not compared.
    """
    counts: Counter[str] = Counter()
    apart: list[str] = []
    for name in sorted(these, key=lambda name: name.count("/")):
        if any(name.startswith(turn + "/") for turn in apart):
            continue
        found = verdict(these[name], others[name])
        counts[found] += 1
        if found != "equal":
            apart.append(name.partition("#")[0])
    return counts
