"""A tiny multimodal model: the tiny Llama as the text part of a Qwen2-VL with a vision tower of one layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from packinfer_sgl.tools.tiny_model import write_tiny_model

PATCH, MERGE, WIDTH, HEADS = 14, 2, 64, 2  # of the vision tower
SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
NORM = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": PATCH, "merge_size": MERGE,
        "temporal_patch_size": 2, "min_pixels": 56 * 56, "max_pixels": 224 * 224}  # fmt: skip


def write_qwen2_vl(path: Path) -> Path:
    """Writes model, tokenizer and image processor to ``path``; SGLang needs no download."""
    write_tiny_model(path)
    config, weights = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = json.loads((path / "tokenizer_config.json").read_text()) | {"pad_token": "</s>"}  # SGLang asks to pad
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    start, end, image, video = (tokenizer.token_to_id(token) for token in SPECIALS)
    hidden, rng = config["hidden_size"], np.random.default_rng(1)

    def linear(out: int, into: int, gain: float) -> np.ndarray:
        return rng.standard_normal((out, into), dtype=np.float32) * np.float32(gain * into**-0.5)

    weights["model.embed_tokens.weight"] = np.vstack([weights["model.embed_tokens.weight"], linear(4, hidden, 10.0)])
    weights["lm_head.weight"] = np.vstack([weights["lm_head.weight"], np.zeros((4, hidden), np.float32)])
    for i in range(config["num_hidden_layers"]):
        for x in "qkv":
            out = len(weights[f"model.layers.{i}.self_attn.{x}_proj.weight"])
            weights[f"model.layers.{i}.self_attn.{x}_proj.bias"] = np.zeros(out, np.float32)
    block, wide = "visual.blocks.0", WIDTH * MERGE**2
    patches = linear(WIDTH, 3 * 2 * PATCH**2, 1.0).reshape(WIDTH, 3, 2, PATCH, PATCH)
    weights["visual.patch_embed.proj.weight"] = patches
    for name, (out, into, gain) in {
        f"{block}.attn.qkv": (3 * WIDTH, WIDTH, 1.0),
        f"{block}.attn.proj": (WIDTH, WIDTH, 1.0),
        f"{block}.mlp.fc1": (2 * WIDTH, WIDTH, 1.0),
        f"{block}.mlp.fc2": (WIDTH, 2 * WIDTH, 1.0),
        "visual.merger.mlp.0": (wide, wide, 1.0),
        "visual.merger.mlp.2": (hidden, wide, 1.0),
    }.items():
        weights |= {f"{name}.weight": linear(out, into, gain), f"{name}.bias": np.zeros(out, np.float32)}
    for name in (f"{block}.norm1", f"{block}.norm2", "visual.merger.ln_q"):
        weights |= {f"{name}.weight": np.ones(WIDTH, np.float32), f"{name}.bias": np.zeros(WIDTH, np.float32)}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    rope = {"type": "mrope", "mrope_section": [8, 12, 12]}  # halves of a head of 64
    config |= {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": config["vocab_size"] + len(SPECIALS),
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "rope_scaling": rope,
        "vision_config": {
            "depth": 1, "embed_dim": WIDTH, "hidden_size": hidden, "num_heads": HEADS, "mlp_ratio": 2, "in_chans": 3,
            "in_channels": 3, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
            "model_type": "qwen2_vl",
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=1))
    image_config = {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor", **NORM}
    (path / "preprocessor_config.json").write_text(json.dumps(image_config))
    return path
