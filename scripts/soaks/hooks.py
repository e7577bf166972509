"""SGLang's entry into a soak, in its processes: counts what happens, and looks at slots and arena at each decode step.

The counts are in ``/server_info``, under ``packinfer`` and there under ``soak``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

SEEN: Counter[str] = Counter()
CACHE = "sglang.srt.mem_cache"


def count(what: str, n: int = 1) -> None:
    from packinfer_sgl.serving.metrics import STATS

    if n:
        SEEN[what] += n
        STATS.details["soak"] = dict(SEEN)


def retracted(result: Any, *args: Any, **kwargs: Any) -> None:
    count("retractions", len(result[0]))


def preempted(result: bool, *args: Any, **kwargs: Any) -> None:
    count("preemptions", int(bool(result)))


def flushed(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    count("flushes", int(bool(result)))
    count("overlapped_flushes", int(bool(result and scheduler.enable_overlap)))


def evicted(result: Any, *args: Any, **kwargs: Any) -> None:
    count("evictions", int(result.num_tokens_evicted > 0))


def mixed(result: Any, *args: Any, **kwargs: Any) -> None:
    count("mixed_batches")


def watch_steps() -> None:
    """Count packed steps, those with groups, and replays of graphs; compare the slots of decode steps with SGLang's
    table, unless the setting ``check`` does."""
    from packinfer_sgl.runners.slots import audit_reads
    from packinfer_sgl.serving.metrics import STATS
    from packinfer_sgl.serving.packed_path import Kind, PackedPath
    from packinfer_sgl.serving.router import Router

    step, replay = PackedPath.step, Router._replay

    def watched_step(self: PackedPath, batch: Any) -> bool:
        packed = step(self, batch)
        if self.kind is Kind.DECODE and not self.check:
            audit_reads(self._loaded, self.runner.kv_slots, batch, newest_is_there=True)
            STATS.audited_steps += 1
        if packed:
            count(f"{self.kind.value}_steps")
        if self.kind is not Kind.EXTEND and STATS.last_tree is not None and STATS.last_tree.n_nodes:
            count(f"grouped_{self.kind.value}_steps")
        return packed

    def watched_replay(self: Router, path: PackedPath, batch: Any) -> None:
        count("replays")
        replay(self, path, batch)

    PackedPath.step, Router._replay = watched_step, watched_replay


def watch_arena() -> None:
    """At each step with an arena: its books balance, and each copy that is read equals what it was copied from."""
    from packinfer_sgl.runners.arena import Arena

    count_step = Arena.count_step

    def audited(self: Arena) -> None:
        held = [s for s in (*self._copies.values(), *self._waiting.values()) if s.slot >= 0]
        slots = [slot for span in held for slot in range(span.slot, span.slot + span.tokens)]
        assert len(slots) == len(set(slots)) == self.as_dict()["used_tokens"], "the arena's books do not balance"
        assert set(slots) <= set(self.slots), "a copy lies outside the arena"
        assert set(self._used) <= set(self._copies), "a copy was given up while a plan reads it"
        for span in self._used.values():
            self._check(span)
        count("arena_steps")
        count_step(self)

    Arena.count_step = audited


def register() -> None:
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    watch_steps()
    watch_arena()
    unified = f"{CACHE}.unified_radix_cache.UnifiedRadixCache"
    hooks = {
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode": retracted,
        "sglang.srt.managers.schedule_batch.ScheduleBatch.mix_with_running": mixed,
        "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule": preempted,
        "sglang.srt.managers.scheduler.Scheduler.flush_cache": flushed,
        f"{CACHE}.radix_cache.RadixCache.evict": evicted,
        f"{unified}.evict": evicted,
    }
    if hasattr(UnifiedRadixCache, "evict_for_alloc"):  # 0.5.23
        hooks[f"{unified}.evict_for_alloc"] = evicted
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AFTER)
