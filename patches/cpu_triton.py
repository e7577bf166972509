"""SGLang decides between Triton and torch by the attention backend's name; on the CPU the answer is torch."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.patches.hook import Hook


def no_triton(backend: str) -> bool:
    return False


def hooks() -> list[Hook]:
    from sglang.srt.platforms import current_platform

    from packinfer_sgl.cpu_platform import PackInferCpuPlatform

    on_cpu = isinstance(current_platform, PackInferCpuPlatform)
    return [Hook("sglang.srt.utils.common.support_triton", no_triton, HookType.REPLACE)] if on_cpu else []
