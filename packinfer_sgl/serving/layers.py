"""Which attention layers of a model can run on the packed kernels."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from packinfer_sgl.kernels.tiles import TILES, device_profile, is_hopper, most_group_size
from packinfer_sgl.planning.device_profile import EXTEND_HEAD_DIM
from packinfer_sgl.reasons import LayerReason
from packinfer_sgl.serving.metrics import Stats

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


class UnsupportedModel(RuntimeError):
    """Models of this kind never run on the packed kernels."""


def heads_of(layer: RadixAttention) -> tuple[int, int, int]:
    """Query heads, KV heads and head dimension of this process's part of a layer."""
    return layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim


def is_measured(layer: RadixAttention, device: torch.device) -> bool:
    """Whether prefill times of such layers on this GPU are known, so that a batch can go where it is faster."""
    known = is_hopper(device) and device_profile(device).is_measured
    return known and layer.head_dim == EXTEND_HEAD_DIM and not layer.logit_cap


def full_pool(pool: Any) -> Any:
    """The KV pool of layers without a window, whose slots SGLang's table has: ``pool`` itself, or a part of it in
    models that have layers of another kind, too (windows, linear attention)."""
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    return pool.full_kv_pool if type(pool) in (SWAKVPool, HybridLinearKVPool) else pool


def sinks_of(model: Any) -> dict[RadixAttention, torch.Tensor]:
    """The attention sinks that layers will be called with, by the name that they have in SGLang's models; what counts
    is the call."""
    from sglang.srt.layers.radix_attention import RadixAttention

    return {
        layer: module.sinks
        for module in model.modules()
        for layer in module.children()
        if isinstance(layer, RadixAttention) and isinstance(getattr(module, "sinks", None), torch.Tensor)
    }


def check_base(stock: Any, base: str, model: Any) -> None:
    """Raise UnsupportedModel if layers have attention sinks and the stock backend does not take them: its batches would
    end the server."""
    if not sinks_of(model):
        return
    takes = inspect.signature(stock.forward_decode).parameters
    if "sinks" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise UnsupportedModel(
            f"packinfer: {type(model).__name__} has attention sinks, which SGLang's {base} does not take; choose "
            "--packinfer-base-backend triton or fa3 (with --packinfer-wrap: --attention-backend)"
        )


def linear_layers(runner: Any) -> list[int]:
    """Ids of the layers that keep a state instead of KV: linear attention, Mamba."""
    return list(getattr(runner.req_to_token_pool, "mamba_map", ()))


def layer_reason(layer: RadixAttention, pool: Any) -> LayerReason | None:
    """Why this layer can never run on the packed kernels, or None."""
    from sglang.srt.layers.radix_attention import AttentionType
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = full_pool(pool)
    if (layer.sliding_window_size is not None and layer.sliding_window_size > -1) or layer.use_irope:
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
    if torch.device(pool.device).type == "cuda":
        if layer.head_dim not in TILES:
            return LayerReason.HEAD_DIM
        if layer.tp_q_head_num > most_group_size(layer.head_dim) * layer.tp_k_head_num:
            return LayerReason.GROUP_SIZE
        if pool.dtype not in (torch.bfloat16, torch.float16):
            return LayerReason.KV_DTYPE
    if not pool.dtype.is_floating_point or pool.dtype.itemsize < 2:
        return LayerReason.KV_DTYPE
    return None


class LayerGate:
    """Which layers are packed: those that can be, of the shape for which plans are made."""

    def __init__(self, heads: tuple[int, int, int], stats: Stats) -> None:
        """``heads``: ``heads_of`` the layers that are packed."""
        self._heads, self._stats = heads, stats
        self._reasons: dict[int, LayerReason | None] = {}

    def reason(self, layer: RadixAttention, pool: Any) -> LayerReason | None:
        """Why this layer is not packed, or None; counted when first asked."""
        if layer.layer_id not in self._reasons:
            reason = layer_reason(layer, pool)
            if reason is None and self._heads != heads_of(layer):
                reason = LayerReason.OTHER_SHAPE
            self._reasons[layer.layer_id] = reason
            if reason is not None:
                self._stats.set_layer(layer.layer_id, reason)
        return self._reasons[layer.layer_id]


def layer_reasons(runner: Any) -> dict[RadixAttention, LayerReason | None]:
    """Why each attention layer of the model can never be packed, or None.

    Raises:
        UnsupportedModel: packinfer has nothing for such a model or device, whatever its settings.
    """
    from sglang.srt.environ import envs
    from sglang.srt.layers.radix_attention import RadixAttention

    device, name = torch.device(runner.device).type, type(runner.model).__name__
    if device not in ("cpu", "cuda"):
        raise UnsupportedModel(
            f"packinfer: there are packed kernels for CPU and CUDA, not for {device}; choose a stock "
            "--attention-backend"
        )
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
    reasons = {}
    for module in runner.model.modules():
        for layer in module.children():
            if isinstance(layer, RadixAttention):
                reasons[layer] = layer_reason(layer, runner.token_to_kv_pool)
    if getattr(runner.server_args, "dcp_size", 1) > 1:
        raise UnsupportedModel("packinfer: with --dcp-size nothing is packed; choose a stock --attention-backend")
    if getattr(runner.server_args, "enable_two_batch_overlap", False):
        raise UnsupportedModel(
            "packinfer: --enable-two-batch-overlap gives each half of a batch to a backend of its own, for which there "
            "are no plans; leave it out or choose a stock --attention-backend"
        )
    glue = getattr(envs, "SGLANG_ENABLE_METADATA_GLUE_GRAPH", None)  # not in 0.5.17
    if glue is not None and glue.get():
        raise UnsupportedModel(
            "packinfer: SGLANG_ENABLE_METADATA_GLUE_GRAPH captures what makes the plan of each step; leave it "
            "unset or choose a stock --attention-backend"
        )
    if not reasons:
        raise UnsupportedModel(f"packinfer: {name} has no attention layers; choose a stock --attention-backend")
    return reasons
