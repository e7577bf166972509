"""How long decode steps and prefills take on a GPU: an estimate by its record and the shape of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packinfer_sgl.kernels.tiles import (
    TILES,
    decode_cost,
    decodes_in_one_launch,
    hopper_decode_tiles,
    most_group_size,
    policy_of,
)
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.device_profile import EXTEND_ROWS, DeviceProfile
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.tools.estimate_batches import Step

# FA3 finds KV that another request has just read in the L2 cache: 6.2e6 to 7.4e6 on an H200 (D1, D2, D3, D7 and E2 of
# docs/measurements.md); the H100 has the same one.
STOCK_REREAD_BYTES_PER_US = 7e6
# With FP8 KV it is bound by conversions and products, whatever it finds in a cache: FD1 to FD11 there, within 14 %.
STOCK_FP8_BYTES_PER_US = 2.6e6
# Norms, sampling, gaps between kernels: what is left of the six step times under Engines in docs/measurements.md.
REST_LAYER_US = 60.0
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


class ModelError(ValueError):
    """A model that packinfer does not pack, or no config.json; the text is the one line that the user reads."""


@dataclass(frozen=True)
class Model:
    """What a rank of a model moves and multiplies.

    Attributes:
        shape: of an attention layer.
        layers: all of them; the packed ones are ``full_layers``, the others see ``window`` tokens (0: none).
        dense_params, expert_params: a token is multiplied with the first and ``expert_share`` of the second.
        weight_bytes: of a parameter.
    """

    shape: AttentionShape
    layers: int
    full_layers: int
    window: int
    dense_params: float
    expert_params: float
    expert_share: float
    weight_bytes: float

    @property
    def active_params(self) -> float:
        return self.dense_params + self.expert_share * self.expert_params

    def read_bytes(self, tokens: int) -> float:
        """Weights that a step of so many tokens reads: of the experts those that a token chooses, if all are alike."""
        chosen = 1 - (1 - self.expert_share) ** tokens
        return (self.dense_params + chosen * self.expert_params) * self.weight_bytes


# Bytes of an element of KV that packinfer packs, by SGLang's --kv-cache-dtype.
KV_BYTES = {"auto": 2, "bf16": 2, "bfloat16": 2, "fp8_e4m3": 1}


def read_model(path: Path | None, tp: int, kv_cache_dtype: str = "auto") -> Model:
    """The model of a ``config.json``, or of its folder; None: Llama-3-8B's shape. ``tp``: tensor-parallel ranks."""
    if kv_cache_dtype not in KV_BYTES:
        raise ModelError(f"no gain: packinfer does not pack KV in {kv_cache_dtype}")
    config = LLAMA_8B
    if path is not None:
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text())
        except ValueError:
            raise ModelError(f"{path} is no JSON") from None
    try:
        return _model(config, tp, KV_BYTES[kv_cache_dtype])
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise ModelError(f"{path} does not say what its attention is like: {type(e).__name__} {e}") from None


def _model(config: dict[str, Any], tp: int, kv_bytes: int) -> Model:
    text = config.get("text_config") or config
    if text.get("kv_lora_rank"):
        raise ModelError("no gain: the model has MLA, which packinfer refuses")
    hidden, layers, qo_heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or qo_heads
    head_dim = text.get("head_dim") or hidden // qo_heads
    if head_dim not in TILES or qo_heads // kv_heads > most_group_size(head_dim):
        why = f"head dimension {head_dim}" if head_dim not in TILES else f"{qo_heads // kv_heads} heads a KV head"
        raise ModelError(f"no gain: packinfer does not pack {why}")
    kinds = text.get("layer_types") or ["full_attention"] * layers
    full = sum(kind == "full_attention" for kind in kinds)
    if not full:
        raise ModelError("no gain: no layer of the model has full attention")
    experts = next((text[x] for x in ("num_local_experts", "num_experts", "n_routed_experts") if text.get(x)), 0)
    mlp = 3 * hidden * text["intermediate_size"]
    expert = 3 * hidden * (text.get("moe_intermediate_size") or text["intermediate_size"])
    dense_layers = text.get("first_k_dense_replace") or 0 if experts else layers
    shared = (text.get("n_shared_experts") or 0) * expert * (layers - dense_layers)
    attention = hidden * head_dim * (2 * qo_heads + 2 * kv_heads)
    dense = layers * attention + dense_layers * mlp + shared + hidden * text["vocab_size"]
    quantized = config.get("quantization_config") or {}
    is_8_bit = quantized.get("quant_method") in ("fp8", "modelopt", "compressed-tensors")
    bits = quantized.get("bits") or quantized.get("w_bit") or (8 if is_8_bit else 16)
    return Model(
        AttentionShape(max(qo_heads // tp, 1), max(kv_heads // tp, 1), head_dim, kv_bytes),
        layers=layers,
        full_layers=full,
        window=text.get("sliding_window") or 0 if full < layers else 0,
        dense_params=dense / tp,
        expert_params=experts * expert * (layers - dense_layers) / tp,
        expert_share=text["num_experts_per_tok"] / experts if experts else 0.0,
        weight_bytes=bits / 8,
    )


def gpu_planner(shape: AttentionShape, profile: DeviceProfile) -> DecodePlanner:
    """Plans as on the GPU of ``profile``; each step anew."""
    tiles, limits = hopper_decode_tiles(shape), Capacity.unlimited()
    policy, cost = policy_of(shape, tiles, profile.multiprocessors, profile), decode_cost(shape, tiles, profile)
    return DecodePlanner(shape, cost, policy, grouping="multi", limits=limits, room_tokens=0)


@dataclass(frozen=True)
class Clock:
    """Times of a model on a GPU."""

    model: Model
    profile: DeviceProfile

    def step_us(self, step: Step) -> tuple[float, float, float]:
        """Of a decode step: with the stock backend (FA3), with packinfer, and the part of the first that is attention
        that may be packed."""
        model, profile, shape = self.model, self.profile, self.model.shape
        bandwidth = profile.bytes_per_us
        once = step.unique * shape.token_bytes / bandwidth
        again = (step.logical - step.unique) * shape.token_bytes / STOCK_REREAD_BYTES_PER_US
        if shape.kv_bytes == 1:
            once, again = 0.0, step.logical * shape.token_bytes / STOCK_FP8_BYTES_PER_US
        stock = packed = once + again + profile.large_item_us
        if step.read < step.logical:
            token_bytes = 2 * shape.token_bytes // shape.kv_bytes  # FP8 takes as long as 16 bits where spans are shared
            once = step.unique * token_bytes / bandwidth
            again = (step.read - step.unique) * token_bytes / profile.reread_bytes_per_us
            partials = step.partials * profile.decode_cost.partials_us(shape)
            packed = once + again + partials + self._launches_us
        weights = max(model.read_bytes(step.rows) / bandwidth, self.prefill_us(step.rows))
        seen = min(step.logical, step.rows * model.window)
        windows = (model.layers - model.full_layers) * seen * shape.token_bytes / bandwidth
        rest = weights + windows + model.layers * REST_LAYER_US
        return rest + model.full_layers * stock, rest + model.full_layers * packed, model.full_layers * stock

    @property
    def _launches_us(self) -> float:
        """Of a packed decode layer besides what it reads."""
        if decodes_in_one_launch(self.model.shape):
            return self.profile.extend_item_us + self.profile.extend_call_us
        return self.profile.large_item_us + self.profile.small_item_us

    def prefill_us(self, tokens: int) -> float:
        """Of so many prompt tokens: their products with the weights, at the rate of the record's extend kernel."""
        return 2 * self.model.active_params * tokens / self.profile.extend_cost(EXTEND_ROWS).flops_per_us

    def mean_step_us(self, steps: Sequence[Step]) -> tuple[float, float, float]:
        times = [self.step_us(step) for step in steps]
        stock, packed, attention = (sum(column) / len(steps) for column in zip(*times))
        return stock, packed, attention
