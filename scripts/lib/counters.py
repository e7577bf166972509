"""packinfer's totals in the internal state of an engine or server."""

from __future__ import annotations

from collections import Counter
from typing import Any

COUNTERS = ("kv_tokens_logical", "kv_tokens_read", "kv_tokens_unique", "packed_steps", "plans", "plan_us_total")
ARENA = ("copies", "copied_bytes", "shared_tokens_read", "contiguous_tokens_read")


def totals(state: dict[str, Any]) -> Counter[str]:
    """Since the process started; ``state`` is ``internal_states[i]["packinfer"]``."""
    counts = Counter({name: state[name] for name in COUNTERS})
    counts["unpacked_steps"] = sum(n for reason, n in state["fallback_steps"].items() if reason != "extend")
    counts.update({f"arena_{name}": state["arena"][name] for name in ARENA} if state["arena"] else {})
    return counts
