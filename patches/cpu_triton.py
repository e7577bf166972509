"""0.5.17 decides between Triton and torch by the attention backend's name; on the CPU the answer is torch."""

from __future__ import annotations

import pkgutil

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.patches.hook import Hook


def no_triton(backend: str) -> bool:
    return False


def hooks() -> list[Hook]:
    from sglang.srt.platforms import current_platform

    from packinfer_sgl.cpu_platform import PackInferCpuPlatform

    target = "sglang.srt.utils.common.support_triton"
    try:
        pkgutil.resolve_name(target)
    except AttributeError:  # 0.5.23 asks the platform's capabilities
        return []
    return [Hook(target, no_triton, HookType.REPLACE)] if isinstance(current_platform, PackInferCpuPlatform) else []
