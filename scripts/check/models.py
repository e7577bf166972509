"""Tiny models of the kinds that ``check_engine.py`` starts: random weights, written to disk, no download.

Those whose outputs are compared get real weights, in which attention decides every token as in
``packinfer_sgl.tools.tiny_model``; those that only have to start and answer get a configuration for
``load_format="dummy"``.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from check.gpt_oss import WINDOW, gpt_oss
from check.hybrid_models import SHARP, Weights, nemotron_h, qwen3_next
from check.qwen2_vl import write_qwen2_vl
from safetensors.numpy import load_file, save_file

from packinfer_sgl.tools.tiny_model import write_tiny_model


def write_model(kind: str, folder: Path) -> Path:
    """Writes the model ``kind`` (a key of WRITERS or KINDS) below ``folder``; returns its own folder."""
    path = folder / kind
    if kind in WRITERS:
        return WRITERS[kind](path)
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 256} if kind == "gemma2" else {}
    llama = write_tiny_model(folder / ("llama-256" if shape else "llama"), **shape)
    path.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, path)
    config = json.loads((llama / "config.json").read_text())
    config, weights = KINDS[kind](config, load_file(llama / "model.safetensors"))
    (path / "config.json").write_text(json.dumps(config, indent=1))
    if weights:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _qwen3(config: dict, weights: Weights) -> tuple[dict, Weights]:
    """Qwen3: a dense model that SGLang's data-parallel attention knows; its Llama does not."""
    norm = np.full(config["head_dim"], SHARP, np.float32)
    for i in range(config["num_hidden_layers"]):
        weights |= {f"model.layers.{i}.self_attn.{x}_norm.weight": norm for x in "qk"}
    return config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}, weights


def _eagle(config: dict, weights: Weights) -> tuple[dict, Weights]:
    """A draft model for the tiny Llama: its first layer behind a random projection; most drafts are refused."""
    hidden = config["hidden_size"]
    draft = {
        name.removeprefix("model."): tensor
        for name, tensor in weights.items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    rng = np.random.default_rng(1)
    draft["fc.weight"] = rng.standard_normal((hidden, 2 * hidden), dtype=np.float32) * np.float32(hidden**-0.5)
    draft["fc.bias"] = np.zeros(hidden, np.float32)
    return config | {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}, draft


def _gemma(config: dict, weights: Weights) -> tuple[dict, Weights]:
    """What Gemma 2 and 3 have in common: every second layer has a window, norms before and behind, tied embeddings."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"] *= np.float32(0.1)  # Gemma multiplies by sqrt(hidden_size)
    weights["model.norm.weight"] = np.zeros(hidden, np.float32)  # Gemma's norms add one
    norms = {
        "input_layernorm": 0.0,
        "post_attention_layernorm": 2.0,
        "pre_feedforward_layernorm": 0.0,
        "post_feedforward_layernorm": -0.5,
    }
    for i in range(layers):
        for name, value in norms.items():
            weights[f"model.layers.{i}.{name}.weight"] = np.full(hidden, value, np.float32)
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["head_dim"],
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "pad_token_id": 0,
    }
    return config, weights


def _gemma2(config: dict, weights: Weights) -> tuple[dict, Weights]:
    config, weights = _gemma(config, weights)
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}
    return config | caps | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, weights


def _gemma3(config: dict, weights: Weights) -> tuple[dict, Weights]:
    config, weights = _gemma(config, weights)
    norm = np.full(config["head_dim"], SHARP - 1, np.float32)
    for i in range(config["num_hidden_layers"]):
        weights |= {f"model.layers.{i}.self_attn.{x}_norm.weight": norm for x in "qk"}
    del config["rope_theta"]
    rope = {f"{kind}_attention": {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding", "full")}
    config |= {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "rope_parameters": rope}
    return config, weights


def _small(config: dict, **more: object) -> dict:
    return config | {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, **more}


def _llama4(config: dict, _: Weights) -> tuple[dict, Weights]:
    text = _small(
        config,
        model_type="llama4_text",
        intermediate_size_mlp=512,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=WINDOW,
        pad_token_id=0,
    )
    del text["architectures"]
    top = {key: config[key] for key in ("torch_dtype", "bos_token_id", "eos_token_id", "vocab_size")}
    return top | {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {"num_hidden_layers": 1},
    }, {}


def _gemma4(config: dict, _: Weights) -> tuple[dict, Weights]:
    config = _small(
        config,
        architectures=["Gemma4ForCausalLM"],
        model_type="gemma4_text",
        hidden_activation="gelu_pytorch_tanh",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=2,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    del config["rope_theta"]
    return config, {}


WRITERS: dict[str, Callable[[Path], Path]] = {
    "llama": write_tiny_model,  # 16 query heads, 4 KV heads
    "llama-kv8": functools.partial(write_tiny_model, kv_heads=8),
    "llama128": functools.partial(write_tiny_model, heads=8, kv_heads=2, head_dim=128),
    "llama-wide": functools.partial(write_tiny_model, heads=16, kv_heads=2, head_dim=128),
    "qwen2_vl": write_qwen2_vl,
}
# made of the tiny Llama's configuration and weights
KINDS: dict[str, Callable[[dict, Weights], tuple[dict, Weights]]] = {
    "qwen3": _qwen3,
    "eagle": _eagle,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt_oss": gpt_oss,
    "llama4": _llama4,
    "gemma4": _gemma4,
    "qwen3_next": qwen3_next,
    "nemotron_h": nemotron_h,
}
