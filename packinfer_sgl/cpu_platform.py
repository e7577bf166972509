"""``packinfer_cpu``: SGLang's out-of-tree platform for machines without an accelerator (torch on the CPU).

SGLang's own CPU engine (``SGLANG_USE_CPU_ENGINE=1``) is built around its AMX kernels. This platform needs no compiled
kernels: the stock ``torch_native`` backend and packinfer's CPU kernels run on it. The demo, tests and CI use it.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

try:
    from sglang.srt.platforms.interface import PlatformCapabilities
except ImportError:  # 0.5.17 asks methods instead; its base class answers them conservatively
    PlatformCapabilities = None

PLATFORM = "packinfer_cpu"


class PackInferCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Torch on the CPU behind SGLang's platform interface, for 0.5.17 and 0.5.23."""

    _enum = PlatformEnum.OOT
    if PlatformCapabilities is not None:
        capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_device(self, device_id: int = 0) -> str:
        # 0.5.23 uses the answer as the default of --device, which must be a string.
        return "cpu"

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def is_pin_memory_available(self, device=None) -> bool:
        return False

    if PlatformCapabilities is None:
        # 0.5.17 asks an out-of-tree platform for the pool classes that 0.5.23 takes from its own tree.

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_mla_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

            return MLATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator


def activate() -> str | None:
    """SGLang's platform entry point: the name of the class to use, or None to leave the machine to SGLang.

    Named in ``SGLANG_PLATFORM=packinfer_cpu``, the platform is always active. Otherwise it is active only without an
    accelerator, without another platform plugin, and unless SGLang's own CPU engine was asked for.
    """
    qualname = f"{__name__}.{PackInferCpuPlatform.__name__}"
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected:
        return qualname if selected == PLATFORM else None
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    if any(ep.name != PLATFORM for ep in entry_points(group="sglang.srt.platforms")):
        return None
    return None if torch.accelerator.is_available() else qualname
