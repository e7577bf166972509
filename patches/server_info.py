"""``packinfer`` in ``GET /server_info``: whether it is on, why not, and what it saves."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.patches.hook import Hook
from packinfer_sgl.serving.metrics import STATS, export


def add_state(output: Any, *args: Any, **kwargs: Any) -> None:
    output.internal_state["packinfer"] = STATS.as_dict()
    export(STATS)


def hooks() -> list[Hook]:
    return [Hook("sglang.srt.managers.scheduler.Scheduler.get_internal_state", add_state, HookType.AFTER)]
