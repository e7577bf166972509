"""The attention backend: a stock backend of SGLang whose decode runs on the packed kernels."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from packinfer_sgl.config import Config
from packinfer_sgl.cpu_decode import CpuDecode
from packinfer_sgl.groups import CPU, AttentionShape
from packinfer_sgl.metrics import STATS
from packinfer_sgl.plan import TilePolicy
from packinfer_sgl.radix import running_rows
from packinfer_sgl.reasons import BatchReason, LayerReason

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from packinfer_sgl.kernels.reference import PackedReference

logger = logging.getLogger(__name__)

# One tile holds all queries of a node; pieces bound the memory of a batched product.
CPU_TILES = TilePolicy(tile_queries=(1 << 20, 1), chunk_tokens=4096)


class UnsupportedModel(RuntimeError):
    """No layer of the model can run on the packed kernels."""


class PackInferMixin:
    """Decode by work items over the batch's prefix tree; everything else by ``super()``, the stock backend.

    The class is ``type("PackInfer" + Base, (PackInferMixin, Base), {})`` over the ``__dict__`` of a built stock
    backend, so that its flags, buffers and metadata keep working (see ``wrap``).
    """

    _packinfer_planner: CpuDecode
    _packinfer_layers: dict[int, LayerReason | None]
    _packinfer_step: PackedReference | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        self._packinfer_step = self._packinfer_plan(forward_batch)

    def _packinfer_plan(self, batch: ForwardBatch) -> PackedReference | None:
        if batch.forward_mode.is_idle():
            return None
        rows = running_rows()
        reason = _batch_reason(batch, rows is not None)
        if reason is not None:
            STATS.count_fallback(reason)
            return None
        if batch.batch_size != len(rows.reqs):  # beams: rows beyond the requests alias their leader's slots
            rows = None
        return self._packinfer_planner.step(rows, batch.req_pool_indices, batch.seq_lens, batch.out_cache_loc)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        step = self._packinfer_step
        if step is None or kwargs or k is None or not save_kv_cache or self._packinfer_layer_reason(layer) is not None:
            if step is not None and (kwargs or k is None or not save_kv_cache):
                STATS.set_layer(layer.layer_id, LayerReason.EXTRA_ARGUMENTS)
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)  # type: ignore[misc]
        _write_kv(self.token_to_kv_pool, layer, forward_batch.out_cache_loc, k, v)  # type: ignore[attr-defined]
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        out, _ = step.run(
            q,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),  # type: ignore[attr-defined]
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),  # type: ignore[attr-defined]
            sm_scale=layer.scaling,
            logits_soft_cap=layer.logit_cap,
        )
        return out.view(len(q), -1)

    def _packinfer_layer_reason(self, layer: RadixAttention) -> LayerReason | None:
        if layer.layer_id not in self._packinfer_layers:
            reason = layer_reason(layer, self.token_to_kv_pool)  # type: ignore[attr-defined]
            self._packinfer_layers[layer.layer_id] = reason
            if reason is not None:
                STATS.set_layer(layer.layer_id, reason)
        return self._packinfer_layers[layer.layer_id]


def _batch_reason(batch: ForwardBatch, known: bool) -> BatchReason | None:
    if not batch.forward_mode.is_decode():
        return BatchReason.SPECULATIVE if batch.forward_mode.is_target_verify() else BatchReason.EXTEND
    if getattr(batch, "spec_info", None) is not None:
        return BatchReason.SPECULATIVE
    if batch.encoder_lens is not None:
        return BatchReason.ENCODER_DECODER
    if not known:
        return BatchReason.NO_BATCH
    if getattr(batch, "num_padding", 0):
        return BatchReason.PADDED
    return None


def layer_reason(layer: RadixAttention, pool: Any) -> LayerReason | None:
    """Why this layer can never run on the packed kernels, or None."""
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return LayerReason.SLIDING_WINDOW
    if layer.is_cross_attention:
        return LayerReason.CROSS_ATTENTION
    if layer.attn_type != AttentionType.DECODER:
        return LayerReason.NOT_DECODER
    if layer.qk_head_dim != layer.v_head_dim:
        return LayerReason.UNEQUAL_HEAD_DIMS
    if getattr(layer, "xai_temperature_len", -1) > 0:
        return LayerReason.TEMPERATURE_BY_LENGTH
    if type(pool) is not MHATokenToKVPool or getattr(pool, "use_hnd", False):
        return LayerReason.KV_POOL
    if not pool.dtype.is_floating_point or pool.dtype.itemsize < 2:
        return LayerReason.KV_DTYPE
    return None


def _write_kv(pool: Any, layer: RadixAttention, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v)


@functools.cache
def packed_class(base: type) -> type:
    """``PackInfer<Base>``, a subclass of the stock backend class."""
    return type(f"PackInfer{base.__name__}", (PackInferMixin, base), {})


def wrap(stock: AttentionBackend, runner: Any, config: Config) -> AttentionBackend:
    """Give a built stock backend packed decode.

    The new object shares the stock object's ``__dict__``: helpers that hold the stock object stay coherent with it.

    Raises:
        UnsupportedModel: no layer of the model can be packed, or the device has no packed kernels.
    """
    if torch.device(runner.device).type != "cpu":
        raise UnsupportedModel(
            f"packinfer: this version has packed kernels for the CPU only, not for {runner.device}; "
            "choose a stock --attention-backend"
        )
    shape = _shape(runner)
    backend = object.__new__(packed_class(type(stock)))
    backend.__dict__ = stock.__dict__
    backend._packinfer_layers = {}
    backend._packinfer_planner = CpuDecode(
        shape,
        CPU,
        CPU_TILES,
        grouping=config.grouping,
        verify=config.verify,
        req_to_token=runner.req_to_token_pool.req_to_token,
        stats=STATS,
    )
    return backend


def _shape(runner: Any) -> AttentionShape:
    """The attention shape of the model's packable layers; raises UnsupportedModel if there are none."""
    from sglang.srt.layers.radix_attention import RadixAttention

    name = type(runner.model).__name__
    if runner.use_mla_backend:
        raise UnsupportedModel(
            f"packinfer: {name} uses multi-head latent attention, which packinfer never packs; "
            "choose a stock --attention-backend"
        )
    if getattr(runner.model_config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"packinfer: {name} is an encoder-decoder model, which packinfer never packs; "
            "choose a stock --attention-backend"
        )
    layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
    reasons = [layer_reason(layer, runner.token_to_kv_pool) for layer in layers]
    packable = [layer for layer, reason in zip(layers, reasons) if reason is None]
    if not packable:
        why = ", ".join(sorted({reason.value for reason in reasons if reason})) or "it has no attention layers"
        raise UnsupportedModel(
            f"packinfer: no attention layer of {name} can be packed ({why}); choose a stock --attention-backend"
        )
    layer = packable[0]
    return AttentionShape(
        layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim, runner.token_to_kv_pool.dtype.itemsize
    )
