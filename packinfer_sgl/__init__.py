"""packinfer-sgl: packed, prefix-grouped attention for SGLang (PackInfer, arXiv 2602.06072)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packinfer_sgl.paged.prefill_wrapper import BatchPrefillWithPagedKVCacheWrapper
    from packinfer_sgl.paged.sink_wrapper import BatchAttentionWithAttentionSinkWrapper
    from packinfer_sgl.paged.wrapper import BatchDecodeWithPagedKVCacheWrapper

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():  # source checkout: kernels/ and patches/ sit beside this package
    __path__.append(str(_here.parent))

__version__ = "0.1.0"
__all__ = [
    "BatchAttentionWithAttentionSinkWrapper",
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
]


def __getattr__(name: str) -> object:
    """The wrappers are imported when first asked for: they need torch, the package does not."""
    if name in __all__:
        from packinfer_sgl.paged import prefill_wrapper, sink_wrapper, wrapper

        rooms = (sink_wrapper, wrapper, prefill_wrapper)
        return next(found for room in rooms if (found := vars(room).get(name)) is not None)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
