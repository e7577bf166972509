"""One change to SGLang, and whether it is in place."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookRegistry, HookType


class Hook(NamedTuple):
    """A function of ours on a function of SGLang's, through SGLang's own hook registry."""

    target: str
    function: Callable[..., Any]
    type: HookType

    def register(self) -> None:
        HookRegistry.register(self.target, self.function, self.type)

    def problem(self) -> str | None:
        """Why the hook is not in place, or None. Valid once SGLang has applied its hooks."""
        missing = self.missing()
        if missing is not None:
            return missing
        return None if _wraps(pkgutil.resolve_name(self.target), self.function) else "found, but the hook did not take"

    def missing(self) -> str | None:
        """Why there is nothing to hook, or None."""
        try:
            pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as e:
            return f"not found in this SGLang ({e})"
        return None


def _wraps(found: Any, ours: Callable[..., Any]) -> bool:
    """Whether ``ours`` is in the chain of wrappers that the registry builds around a target."""
    layer = getattr(found, "__func__", found)
    while layer is not None:
        closure = getattr(layer, "__closure__", None) or ()
        if any(cell.cell_contents is ours for cell in closure):
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False
