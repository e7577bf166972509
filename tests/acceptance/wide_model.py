"""The tiny model, which understands more tokens than it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from packinfer_sgl.tools.tiny_model import write_tiny_model

VOCABULARY = 2048  # a kit's prompts are the ids from 0 to 1,999


def write_wide_model(path: Path) -> Path:
    write_tiny_model(path, layers=2, heads=4, kv_heads=2)
    config = json.loads((path / "config.json").read_text())
    more = VOCABULARY - config["vocab_size"]
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY}))
    weights = load_file(path / "model.safetensors")
    embed, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    new = np.random.default_rng(0).standard_normal((more, embed.shape[1]), dtype=np.float32) * embed.std()
    weights["model.embed_tokens.weight"] = np.concatenate([embed, new])
    weights["lm_head.weight"] = np.concatenate([head, np.zeros_like(new)])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
