"""Greedy answers of two engines, compared."""

from __future__ import annotations

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
