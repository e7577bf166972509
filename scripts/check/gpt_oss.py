"""A tiny gpt-oss of random weights: attention sinks, every second layer with a window, a mixture of experts."""

from __future__ import annotations

import numpy as np
from check.hybrid_models import EXPERTS, HIDDEN, MIDDLE, QUIET, SHARP, Random, Weights, ends, shape

WINDOW = 128  # tokens; the prompts of the checks are longer
SINK = 12.0  # about the logarithm of what a query's tokens add up to, so that leaving it out shows


def gpt_oss(config: dict, llama: Weights) -> tuple[dict, Weights]:
    """64 query heads and 8 KV heads of 64; a window, full attention, twice. In bfloat16: SGLang makes its router of the
    configuration's type, whatever ``--dtype`` says."""
    heads, kv_heads, dim, layers = 64, 8, 64, 4
    random, ones = Random(), np.ones(HIDDEN, np.float32)
    weights = ends(llama, random, "model.embed_tokens.weight", "model.norm.weight", ones)
    for i in range(layers):
        layer = _attention(random, heads, kv_heads, dim) | _experts(random)
        layer |= {f"{name}_layernorm.weight": ones for name in ("input", "post_attention")}
        weights |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return shape(config, "GptOssForCausalLM", "gpt_oss", heads, kv_heads, dim, layers) | {
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "sliding_window": WINDOW,
        "attention_bias": True,
        "intermediate_size": MIDDLE,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "swiglu_limit": 7.0,  # 0.5.17 asks the configuration for it, newer releases of transformers leave it out
        "pad_token_id": 0,
    }, weights


def _attention(random: Random, heads: int, kv_heads: int, dim: int) -> Weights:
    layer = {"self_attn.sinks": random.normal(heads, std=2.0) + np.float32(SINK)}
    for name, out, into, gain in (
        ("q", heads * dim, HIDDEN, SHARP), ("k", kv_heads * dim, HIDDEN, SHARP), ("v", kv_heads * dim, HIDDEN, 3.0),
        ("o", HIDDEN, heads * dim, 3.0),
    ):  # fmt: skip
        layer[f"self_attn.{name}_proj.weight"] = random.linear(out, into, gain)
        layer[f"self_attn.{name}_proj.bias"] = np.zeros(out, np.float32)
    return layer


def _experts(random: Random) -> Weights:
    """Of all experts at once, as published: [expert, in, out]."""
    return {
        "mlp.router.weight": random.linear(EXPERTS, HIDDEN),
        "mlp.router.bias": np.zeros(EXPERTS, np.float32),
        "mlp.experts.gate_up_proj": random.normal(EXPERTS, HIDDEN, 2 * MIDDLE, std=QUIET * HIDDEN**-0.5),
        "mlp.experts.gate_up_proj_bias": np.zeros((EXPERTS, 2 * MIDDLE), np.float32),
        "mlp.experts.down_proj": random.normal(EXPERTS, MIDDLE, HIDDEN, std=QUIET * MIDDLE**-0.5),
        "mlp.experts.down_proj_bias": np.zeros((EXPERTS, HIDDEN), np.float32),
    }
