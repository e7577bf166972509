"""EAGLE's draft model runs on the stock backend beneath packinfer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.config import Config
from packinfer_sgl.patches.hook import Hook
from packinfer_sgl.plugin import NAME, base_backend


def base_for_draft(
    create: Callable[..., Any], factory: Any, name: str, makers: dict[str, Callable[[], Any]], error: str, **kwargs: Any
) -> Any:
    """Around ``DraftBackendFactory._create_backend(name, makers, error)``, whose table has stock backends only.

    Raises:
        ValueError: the base backend has no draft form either; SGLang's own words for it.
    """

    def of_base() -> Any:
        base = base_backend(Config.load(), factory.draft_model_runner.device)
        if base not in makers:
            raise ValueError(error.format(backend_type=f"{base}, packinfer's base backend"))
        return makers[base]()

    return create(factory, name, {**makers, NAME: of_base}, error, **kwargs)


def hooks() -> list[Hook]:
    target = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"
    return [Hook(target, base_for_draft, HookType.AROUND)]
