"""Which attention layers of a model can run on the packed kernels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from packinfer_sgl.kernels.tiles import FP8_CAPABILITY, TILES, most_group_size
from packinfer_sgl.reasons import LayerReason
from packinfer_sgl.serving.metrics import Stats

FP8 = torch.float8_e4m3fn

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention


class UnsupportedModel(RuntimeError):
    """Models of this kind never run on the packed kernels."""


def heads_of(layer: RadixAttention) -> tuple[int, int, int]:
    """Query heads, KV heads and head dimension of this process's part of a layer."""
    return layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim


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


def check_base(stock: Any, base: str, runner: Any) -> None:
    """Raise UnsupportedModel if the stock backend would end the server or answer wrongly where it runs a part: layers
    with attention sinks over one that takes none, FP8 KV with scales over one that ignores them.

    On a CPU the second are layers that are not packed (``layer_reason``): there is no other base.
    """
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    if sinks_of(runner.model):
        takes = inspect.signature(stock.forward_decode).parameters
        if "sinks" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise UnsupportedModel(
                f"packinfer: {type(runner.model).__name__} has attention sinks, which SGLang's {base} does not take; "
                "choose --packinfer-base-backend triton or fa3 (with --packinfer-wrap: --attention-backend)"
            )
    on_gpu = torch.device(runner.device).type == "cuda"
    if on_gpu and is_fp8(runner.token_to_kv_pool) and isinstance(stock, TorchNativeAttnBackend):
        raise UnsupportedModel(
            f"packinfer: SGLang's {base} ignores the scales of FP8 KV; choose --packinfer-base-backend fa3, flashinfer "
            "or triton (with --packinfer-wrap: --attention-backend)"
        )


def linear_layers(runner: Any) -> list[int]:
    """Ids of the layers that keep a state instead of KV: linear attention, Mamba."""
    return list(getattr(runner.req_to_token_pool, "mamba_map", ()))


def is_fp8(pool: Any) -> bool:
    """Whether a pool holds KV of 8 bits with one scale for the keys and one for the values of a layer."""
    return bool(pool.dtype == FP8)


def kv_scales(layer: RadixAttention) -> tuple[float, float]:
    """Factors of a layer's keys and values as an FP8 pool holds them. May wait for the GPU: not in a capture."""
    scales = []
    for name in ("k_scale", "v_scale"):
        # not ``k_scale_float``, which new weights leave as it was until some time after the cache was flushed
        known = getattr(layer, name, None)
        scales.append(1.0 if known is None else float(known))
    return scales[0], scales[1]


def _kv_reason(layer: RadixAttention, pool: Any) -> LayerReason | None:
    """Why the kernels cannot read the KV of a pool, for its dtype or its scales, or None."""
    device = torch.device(pool.device)
    if not is_fp8(pool):
        on_gpu = device.type == "cuda"
        known = pool.dtype in (torch.bfloat16, torch.float16) if on_gpu else pool.dtype.is_floating_point
        return None if known and pool.dtype.itemsize >= 2 else LayerReason.KV_DTYPE
    if getattr(pool, "is_quantized_kv_cache", False):
        return LayerReason.KV_DTYPE
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return LayerReason.KV_DTYPE
    if any(isinstance(s, torch.Tensor) and s.numel() != 1 for s in (layer.k_scale, layer.v_scale)):
        return LayerReason.KV_SCALES
    if device.type == "cpu" and kv_scales(layer) != (1.0, 1.0):
        return LayerReason.KV_SCALES
    return None


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
    return _kv_reason(layer, pool)


class LayerGate:
    """Which layers are packed: those that can be, of the shape for which plans are made; and their scales."""

    def __init__(self, heads: tuple[int, int, int], stats: Stats, layers: Sequence[RadixAttention] = ()) -> None:
        """
        Args:
            heads: ``heads_of`` the layers that are packed.
            layers: those with an FP8 pool.
        """
        self._heads, self._stats, self._layers = heads, stats, layers
        self._reasons: dict[int, LayerReason | None] = {}
        self._scales: dict[int, tuple[float, float]] = {}
        self.read_scales()

    def read_scales(self) -> bool:
        """Read the scales of FP8 KV, which new weights may have changed; whether they did."""
        before, self._scales = self._scales, {layer.layer_id: kv_scales(layer) for layer in self._layers}
        return before != self._scales

    def scales(self, layer: RadixAttention) -> tuple[float, float]:
        """Factors of its keys and values as they lie in the pool."""
        return self._scales.get(layer.layer_id, (1.0, 1.0))

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
                if device == "cuda" and runner.dtype == torch.float32 and reasons[layer] is None:
                    reasons[layer] = LayerReason.KV_DTYPE  # KV is FP8; there are no kernels for such queries
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
