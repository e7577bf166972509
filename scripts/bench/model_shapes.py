"""The models of the measurements as folders for ``--load-format dummy``: a configuration and a tokenizer, no weights.

    python scripts/bench/model_shapes.py DIR [NAME ...]

Writes DIR/NAME for each name, by default all: llama8b (Llama-3-8B), llama70b40 (Llama-3-70B with 40 of its layers),
eagle8b (a draft of one layer for llama8b), qwen35_9b (Qwen3.5-9B, the text model), gptoss12 (gpt-oss-20b with 12 of its
layers). The tokenizer is the tiny model's, whose ids are the lowest of each vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from packinfer_sgl.tools.tiny_model import (
    CHAT_TEMPLATE,
    SPECIALS,
    build_tokenizer,
    has_mark,
    write_json,
    write_tokenizer,
)

MARK = "packinfer_model_shape"  # this key in config.json says that we may overwrite the folder
POSITIONS = 32_768

_ANY: dict[str, Any] = {
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "vocab_size": 128_256,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": _LLAMA_8B,
    "llama70b40": _LLAMA_8B | {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 40, "num_attention_heads": 64,
    },
    "eagle8b": _LLAMA_8B | {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1},
    "qwen35_9b": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 32,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25},
        "partial_rotary_factor": 0.25,
        "attn_output_gate": True,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "vocab_size": 248_320,
    },
    "gptoss12": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 12,
        "layer_types": ["sliding_attention", "full_attention"] * 6,
        "sliding_window": 128,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "vocab_size": 201_088,
    },
}  # fmt: skip


def write_shape(name: str, path: Path) -> Path:
    """The folder of the shape ``name`` (a key of SHAPES) at ``path``; FileExistsError if another model is there."""
    if path.exists() and not has_mark(path, MARK):
        raise FileExistsError(f"{path} exists and is no folder of this script; name another one")
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", _ANY | SHAPES[name] | {MARK: name})
    tokenizer, _ = build_tokenizer()
    write_tokenizer(path, tokenizer, bos=SPECIALS[0], eos=SPECIALS[1], positions=POSITIONS, template=CHAT_TEMPLATE)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHAPES)}; default: all")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in SHAPES]:
        parser.error(f"there is no shape {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    try:
        for name in args.names or SHAPES:
            print(write_shape(name, args.dir / name))
    except OSError as e:
        sys.exit(f"model_shapes: {e}")


if __name__ == "__main__":
    main()
