"""What the plugin did: counters of this process, for ``/server_info`` and Prometheus."""

from __future__ import annotations

import logging
import os
import statistics
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from packinfer_sgl.planning.planners import Planned
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.reasons import BatchReason, LayerReason

logger = logging.getLogger(__name__)

EXPORT_INTERVAL_S = 1.0
_TOTALS = {
    "packed_steps": "decode steps, verify steps of speculative decoding included, that ran on the packed kernels",
    "kv_tokens_logical": "KV tokens a prefix-unaware kernel would have read in those steps, one layer",
    "kv_tokens_unique": "least KV tokens that any kernel could have read",
    "kv_tokens_read": "KV tokens that the work items read",
    "packed_extends": "extend batches (prefill, chunked prefill, mixed) that ran on the packed kernels",
    "extend_kv_tokens_logical": "KV tokens a prefix-unaware kernel would have read in those batches, one layer",
    "extend_kv_tokens_unique": "least KV tokens that any kernel could have read in those batches",
    "extend_kv_tokens_read": "KV tokens that the work items of those batches read, once for each query tile",
}
_ARENA_TOTALS = {
    "copies": "shared spans copied to the arena",
    "copied_bytes": "KV bytes copied to the arena",
    "hits": "shared spans of new plans found in the arena",
    "refused": "copies that found no room in the arena",
    "replaced": "copies given up for others",
    "shared_tokens_read": "KV tokens of shared spans, read once for their group",
    "contiguous_tokens_read": "those of them in the arena, or known to be contiguous by themselves",
}
_HELD_TOTALS = {
    "requests": "requests that waited while another computed the prefix that they share",
    "passes": "passes of the scheduler in which one was held, summed over requests",
    "prefix_tokens": "prompt tokens that they found in the radix cache after it, and not before",
}


@dataclass
class Stats:
    """Counters since the process started, and the groups of the last packed step.

    Written by ``serving.router``, ``serving.packed_path`` and ``serving.layers``, and at the start by ``plugin``. Side
    features add a section: what they count stays with them.

    ``kv_tokens_*`` count the KV tokens of one layer, summed over packed decode and verify steps, ``extend_kv_tokens_*``
    those over packed extend batches. ``ungrouped_steps`` counts the packed decode and verify steps without groups.
    ``fitted_plans`` counts the plans that had to be made smaller, by what of the buffers they overflowed
    (``fitting.Capacity``). ``check_error`` is the largest relative difference of a row from the stock backend that the
    setting ``check`` saw, ``audited_steps`` the decode and verify steps whose slots it compared with SGLang's table.
    """

    active: bool = False
    base_backend: str = ""
    reason: str | None = "no packinfer backend was built in this process"
    details: dict[str, Any] = field(default_factory=dict)
    packed_steps: int = 0
    fallback_steps: Counter[str] = field(default_factory=Counter)
    fallback_layers: dict[int, str] = field(default_factory=dict)
    ungrouped_steps: Counter[str] = field(default_factory=Counter)
    kv_tokens_logical: int = 0
    kv_tokens_unique: int = 0
    kv_tokens_read: int = 0
    packed_extends: int = 0
    extend_kv_tokens_logical: int = 0
    extend_kv_tokens_unique: int = 0
    extend_kv_tokens_read: int = 0
    plans: int = 0
    fitted_plans: Counter[str] = field(default_factory=Counter)
    plan_us: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    plan_us_total: float = 0.0
    last_tree: PrefixTree | None = None
    last_private_tokens: int = 0
    check_error: float = 0.0
    audited_steps: int = 0
    sections: dict[str, Callable[[], dict[str, int]]] = field(default_factory=dict)
    _exported_at: float = 0.0
    _errors: set[str] = field(default_factory=set)

    def count_decode(self, planned: Planned, grown_tokens: int) -> None:
        """A decode or verify step runs on a plan whose rows have grown by ``grown_tokens`` since it was made."""
        if planned.is_new:
            self._count_plan(planned)
        plan = planned.plan
        self.packed_steps += 1
        if planned.fitted.ungrouped is not None:
            self.ungrouped_steps[planned.fitted.ungrouped.value] += 1
        self.kv_tokens_logical += plan.kv_tokens_logical + grown_tokens
        self.kv_tokens_unique += plan.kv_tokens_unique + grown_tokens
        self.kv_tokens_read += plan.kv_tokens_read + grown_tokens
        self._export()

    def count_extend(self, planned: Planned) -> None:
        """An extend batch will run on a plan; its groups are gone with it."""
        plan = planned.plan
        self.fitted_plans.update(planned.fitted.overflowed)
        self.packed_extends += 1
        self.extend_kv_tokens_logical += plan.kv_tokens_logical
        self.extend_kv_tokens_unique += plan.kv_tokens_unique
        self.extend_kv_tokens_read += plan.kv_tokens_read
        self._export()

    def _count_plan(self, planned: Planned) -> None:
        kept = planned.fitted.kept
        self.plans += 1
        self.fitted_plans.update(planned.fitted.overflowed)
        self.plan_us.append(planned.took_us)
        self.plan_us_total += planned.took_us
        self.last_tree = kept
        self.last_private_tokens = planned.plan.kv_tokens_read - int((kept.end - kept.start).sum())

    def count_fallback(self, reason: BatchReason) -> None:
        self.fallback_steps[reason.value] += 1
        self._export()

    def count_error(self, error: Exception, then: str) -> None:
        """Planning failed, ``then`` is what happens instead; logged once for each place where it does."""
        self.count_fallback(BatchReason.ERROR)
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        place = f"{type(error).__name__} {frame.f_code.co_filename} {line}"
        if place not in self._errors:
            self._errors.add(place)
            text = "packinfer: planning failed, %s; please report this with the SGLang version"
            logger.error(text, then, exc_info=error)

    def set_layer(self, layer_id: int, reason: LayerReason) -> None:
        self.fallback_layers[layer_id] = reason.value

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts: the value of ``internal_states[i]["packinfer"]``."""
        tree = self.last_tree
        nodes = [] if tree is None else zip(tree.parent, tree.row_hi - tree.row_lo, tree.start, tree.end)
        return {
            "active": self.active,
            "base_backend": self.base_backend,
            "reason": self.reason,
            **self.details,
            "packed_steps": self.packed_steps,
            "fallback_steps": dict(self.fallback_steps),
            "fallback_layers": dict(Counter(self.fallback_layers.values())),
            "ungrouped_steps": dict(self.ungrouped_steps),
            "groups": 0 if tree is None else tree.n_nodes,
            "rows": 0 if tree is None else tree.n_rows,
            "rows_grouped": 0 if tree is None else int((tree.tail_start > 0).sum()),
            "kv_tokens_logical": self.kv_tokens_logical,
            "kv_tokens_unique": self.kv_tokens_unique,
            "kv_tokens_read": self.kv_tokens_read,
            "packed_extends": self.packed_extends,
            "extend_kv_tokens_logical": self.extend_kv_tokens_logical,
            "extend_kv_tokens_unique": self.extend_kv_tokens_unique,
            "extend_kv_tokens_read": self.extend_kv_tokens_read,
            "plans": self.plans,
            "fitted_plans": dict(self.fitted_plans),
            "plan_us_p50": round(statistics.median(self.plan_us), 1) if self.plan_us else None,
            "plan_us_total": round(self.plan_us_total, 1),
            "check_error": self.check_error,
            "audited_steps": self.audited_steps,
            **{name: self.sections[name]() if name in self.sections else None for name in ("arena", "held")},
            "private_tokens": self.last_private_tokens,
            "tree": [{"parent": int(p), "rows": int(r), "start": int(s), "end": int(e)} for p, r, s, e in nodes],
        }

    def _export(self) -> None:
        """To Prometheus, at most once a second: its multi-process files cost microseconds a value."""
        now = time.monotonic()
        if now - self._exported_at >= EXPORT_INTERVAL_S:
            self._exported_at = now
            try:
                export(self)
            except OSError:  # no room for its files: the server goes on without
                logger.exception("packinfer: the metrics could not be written and stay as they are")
                stop_prometheus()


_ALL_TOTALS = {
    **_TOTALS,
    **{f"arena_{name}": text for name, text in _ARENA_TOTALS.items()},
    **{f"held_{name}": text for name, text in _HELD_TOTALS.items()},
}
_BY_REASON = {
    "fallback_steps": "forward passes that ran on the stock backend",
    "ungrouped_steps": "packed decode and verify steps in which nothing was read once for several requests",
}
_prometheus: dict[str, Any] | None = None
_exported: Counter[str] = Counter()


def start_prometheus(labels: dict[str, str]) -> None:
    """Create the metrics ``packinfer:*``, once per process, if the server runs with ``--enable-metrics``."""
    global _prometheus
    if _prometheus is not None or not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return
    from prometheus_client import Counter as PromCounter
    from prometheus_client import Gauge

    names = list(labels)
    _prometheus = {"labels": labels}
    for name, text in _ALL_TOTALS.items():
        _prometheus[name] = PromCounter(f"packinfer:{name}", text, names)
    for name, text in _BY_REASON.items():
        _prometheus[name] = PromCounter(f"packinfer:{name}", text, [*names, "reason"])
    for name, text in (
        ("groups", "groups of the last packed step"),
        ("rows_grouped", "requests of the last packed step that share a prefix read"),
        ("plan_us_p50", "median time of a plan, microseconds"),
        ("arena_used_tokens", "KV slots of the arena in use"),
    ):
        _prometheus[name] = Gauge(f"packinfer:{name}", text, names, multiprocess_mode="mostrecent")


def stop_prometheus() -> None:
    """Export nothing more."""
    global _prometheus
    _prometheus = None


def export(stats: Stats) -> None:
    """Bring the Prometheus metrics up to ``stats``; nothing without ``start_prometheus``."""
    if _prometheus is None:
        return
    labels, values = _prometheus["labels"], stats.as_dict()
    for part in ("arena", "held"):
        values |= {f"{part}_{name}": value for name, value in (values[part] or {}).items()}
    for name in _ALL_TOTALS:
        _prometheus[name].labels(**labels).inc(values.get(name, 0) - _exported[name])
        _exported[name] = values.get(name, 0)
    for name in _BY_REASON:
        for reason, count in values[name].items():
            key = f"{name}.{reason}"
            _prometheus[name].labels(**labels, reason=reason).inc(count - _exported[key])
            _exported[key] = count
    for name in ("groups", "rows_grouped", "plan_us_p50", "arena_used_tokens"):
        _prometheus[name].labels(**labels).set(values.get(name) or 0)


# One per process, like the metrics of any process.
STATS = Stats()
