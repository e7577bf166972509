"""Tiny hybrids of linear and full attention, of random weights; the names are those of published checkpoints."""

from __future__ import annotations

import numpy as np

Weights = dict[str, np.ndarray]
HIDDEN, MIDDLE, EXPERTS = 512, 128, 4
SHARP = 1.9  # gain of queries and keys, as of the tiny Llama's projections: attention is not flat
QUIET = 0.5  # gain of all that is not attention, so that attention decides the text


class Random:
    """Weights whose outputs have the variance of their inputs times ``gain`` squared."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(2)

    def normal(self, *shape: int, std: float) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    def linear(self, out: int, into: int, gain: float = 1.0) -> np.ndarray:
        return self.normal(out, into, std=gain * into**-0.5)

    def decays(self, heads: int) -> np.ndarray:
        """Logarithms of how fast the state of each head is forgotten."""
        return np.log(self.rng.uniform(1, 16, heads)).astype(np.float32)


def qwen3_next(config: dict, llama: Weights) -> tuple[dict, Weights]:
    """Qwen3-Next: a gated delta net, full attention of 16 and 2 heads of 256, twice; a mixture of experts; and a layer
    of full attention that drafts tokens (MTP), most of which are refused. Its norms add one."""
    heads, kv_heads, dim, layers = 16, 2, 256, 4
    random, zeros = Random(), np.zeros(HIDDEN, np.float32)
    weights = ends(llama, random, "model.embed_tokens.weight", "model.norm.weight", zeros)
    for i in range(layers):
        layer = _full(random, heads, kv_heads, dim) if i % 2 else _delta_net(random)
        weights |= _named(f"model.layers.{i}", layer | _norms(zeros) | _experts(random))
    draft = _full(random, heads, kv_heads, dim) | _norms(zeros) | _experts(random)
    weights |= _named("mtp.layers.0", draft) | {
        "mtp.fc.weight": random.linear(HIDDEN, 2 * HIDDEN),
        "mtp.pre_fc_norm_embedding.weight": zeros,
        "mtp.pre_fc_norm_hidden.weight": zeros,
        "mtp.norm.weight": zeros,
    }
    return shape(config, "Qwen3NextForCausalLM", "qwen3_next", heads, kv_heads, dim, layers) | {
        "full_attention_interval": 2,
        "layer_types": ["linear_attention", "full_attention"] * (layers // 2),
        "partial_rotary_factor": 0.25,
        "intermediate_size": MIDDLE,
        "moe_intermediate_size": MIDDLE,
        "shared_expert_intermediate_size": MIDDLE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }, weights


def _named(prefix: str, layer: Weights) -> Weights:
    return {f"{prefix}.{name}": tensor for name, tensor in layer.items()}


def _norms(values: np.ndarray) -> Weights:
    return {f"{name}_layernorm.weight": values for name in ("input", "post_attention")}


def _full(random: Random, heads: int, kv_heads: int, dim: int) -> Weights:
    """Of each head the rows of its query, then those of its output gate, of which 0 halves the output."""
    q = random.linear(heads * dim, HIDDEN).reshape(heads, 1, dim, HIDDEN)
    norm = np.full(dim, SHARP - 1, np.float32)
    return {
        "self_attn.q_proj.weight": np.concatenate([q, np.zeros_like(q)], 1).reshape(2 * heads * dim, HIDDEN),
        "self_attn.k_proj.weight": random.linear(kv_heads * dim, HIDDEN),
        "self_attn.v_proj.weight": random.linear(kv_heads * dim, HIDDEN, 4.0),
        "self_attn.o_proj.weight": random.linear(HIDDEN, heads * dim, 2.0),
        "self_attn.q_norm.weight": norm,
        "self_attn.k_norm.weight": norm,
    }


def _delta_net(random: Random) -> Weights:
    k_heads, v_heads, dim = 2, 4, 128
    keys, values = k_heads * dim, v_heads * dim
    return {
        "linear_attn.in_proj_qkvz.weight": random.linear(2 * keys + 2 * values, HIDDEN),
        "linear_attn.in_proj_ba.weight": random.linear(2 * v_heads, HIDDEN),
        "linear_attn.conv1d.weight": random.normal(2 * keys + values, 1, 4, std=0.5),
        "linear_attn.A_log": random.decays(v_heads),
        "linear_attn.dt_bias": random.normal(v_heads, std=0.5),
        "linear_attn.norm.weight": np.ones(dim, np.float32),
        "linear_attn.out_proj.weight": random.linear(HIDDEN, values, QUIET),
    }


def _experts(random: Random) -> Weights:
    layer = {
        "mlp.gate.weight": random.linear(EXPERTS, HIDDEN),
        "mlp.shared_expert_gate.weight": random.linear(1, HIDDEN),
    }
    for expert in (*(f"experts.{i}" for i in range(EXPERTS)), "shared_expert"):
        layer[f"mlp.{expert}.gate_proj.weight"] = random.linear(MIDDLE, HIDDEN, QUIET)
        layer[f"mlp.{expert}.up_proj.weight"] = random.linear(MIDDLE, HIDDEN, QUIET)
        layer[f"mlp.{expert}.down_proj.weight"] = random.linear(HIDDEN, MIDDLE, QUIET)
    return layer


def nemotron_h(config: dict, llama: Weights) -> tuple[dict, Weights]:
    """Nemotron-H: Mamba 2, full attention of 32 and 2 heads of 128 without positions, MLP; twice."""
    heads, kv_heads, dim, kinds = 32, 2, 128, "M*-M*-"
    random = Random()
    ones = np.ones(HIDDEN, np.float32)
    weights = ends(llama, random, "backbone.embeddings.weight", "backbone.norm_f.weight", ones)
    for i, kind in enumerate(kinds):
        layer = {"norm.weight": ones}
        if kind == "M":
            layer |= _mamba(random)
        elif kind == "*":
            layer |= {
                "mixer.q_proj.weight": random.linear(heads * dim, HIDDEN, SHARP),
                "mixer.k_proj.weight": random.linear(kv_heads * dim, HIDDEN, SHARP),
                "mixer.v_proj.weight": random.linear(kv_heads * dim, HIDDEN, 2.0),
                "mixer.o_proj.weight": random.linear(HIDDEN, heads * dim, 2.0),
            }
        else:
            layer["mixer.up_proj.weight"] = random.linear(HIDDEN, HIDDEN, QUIET)
            layer["mixer.down_proj.weight"] = random.linear(HIDDEN, HIDDEN, QUIET)
        weights |= {f"backbone.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    return shape(config, "NemotronHForCausalLM", "nemotron_h", heads, kv_heads, dim, len(kinds)) | {
        "hybrid_override_pattern": kinds,
        "intermediate_size": HIDDEN,
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": False,
        "ssm_state_size": 128,
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "mamba_n_groups": 2,  # the name that newer releases of transformers read
        "conv_kernel": 4,
        "mamba_d_conv": 4,
        "expand": 1,
        "mamba_expand": 1,
        "mamba_hidden_act": "silu",
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "chunk_size": 128,
        "time_step_limit": [0.0, 1e9],
        "pad_token_id": 0,
    }, weights


def _mamba(random: Random) -> Weights:
    heads, dim, groups, state = 8, 64, 2, 128
    inner, conv = heads * dim, heads * dim + 2 * groups * state
    return {
        "mixer.in_proj.weight": random.linear(inner + conv + heads, HIDDEN),
        "mixer.conv1d.weight": random.normal(conv, 1, 4, std=0.5),
        "mixer.conv1d.bias": random.normal(conv, std=0.1),
        "mixer.A_log": random.decays(heads),
        "mixer.D": np.ones(heads, np.float32),
        "mixer.dt_bias": random.normal(heads, std=0.5),
        "mixer.norm.weight": np.ones(inner, np.float32),
        "mixer.out_proj.weight": random.linear(HIDDEN, inner, QUIET),
    }


def ends(llama: Weights, random: Random, embed: str, norm: str, norms: np.ndarray) -> Weights:
    """Embeddings, last norm and head; only the words that the tiny Llama says have rows in the head."""
    said = np.flatnonzero(np.abs(llama["lm_head.weight"]).sum(1))
    head = np.zeros((len(llama["lm_head.weight"]), HIDDEN), np.float32)
    head[said] = random.linear(len(said), HIDDEN, 3.0)
    return {embed: random.normal(len(head), HIDDEN, std=0.5), norm: norms, "lm_head.weight": head}


def shape(config: dict, name: str, kind: str, heads: int, kv_heads: int, dim: int, layers: int) -> dict:
    return config | {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "torch_dtype": "bfloat16",  # in which some of their norms are made, whatever --dtype says
    }
