"""The attention backend: a stock backend of SGLang some of whose batches and layers run on the packed kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from packinfer_sgl.serving.router import Router

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class PackInferMixin:
    """SGLang's methods of an attention backend, over those of a stock backend (``super()``), which runs all that the
    router does not pack.

    The class is ``type("PackInfer" + Base, (PackInferMixin, Base), {})`` over the ``__dict__`` of a built stock
    backend, so that its flags, buffers and metadata keep working (``wrap``).
    """

    _packinfer: Router

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)  # type: ignore[misc]
        self._packinfer.hold_graphs(max_bs)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Before an eager forward pass. The stock backend's metadata is for the layers that are not packed."""
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        self._packinfer.begin_eager(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a graph is captured or replayed; some stock backends come here before an eager pass, too."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)  # type: ignore[misc]
        self._packinfer.begin_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Captured with the graph, and run at each replay."""
        super().init_forward_metadata_in_graph(forward_batch)  # type: ignore[misc]
        self._packinfer.append_in_graph(forward_batch)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> torch.Tensor:
        stock = super().forward_decode  # type: ignore[misc]
        return self._packinfer.attend(stock, self, q, k, v, layer, forward_batch, save_kv_cache, **more)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> torch.Tensor:
        stock = super().forward_extend  # type: ignore[misc]
        return self._packinfer.attend(stock, self, q, k, v, layer, forward_batch, save_kv_cache, **more)


@functools.cache
def packed_class(base: type) -> type:
    """``PackInfer<Base>``, a subclass of the stock backend class."""
    return type(f"PackInfer{base.__name__}", (PackInferMixin, base), {})


def wrap(stock: AttentionBackend, router: Router) -> AttentionBackend:
    """A stock backend of which ``router`` packs a part.

    The new object shares the stock object's ``__dict__``: helpers that hold the stock object stay coherent with it.
    """
    backend = object.__new__(packed_class(type(stock)))
    backend.__dict__ = stock.__dict__
    backend._packinfer = router
    return backend
