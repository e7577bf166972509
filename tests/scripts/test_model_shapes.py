"""The models of the measurements: SGLang reads their configurations, and finds the heads that the documents name."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.model_shapes import SHAPES, write_shape

# query heads, KV heads, head dimension, layers with full attention
SEEN = {
    "llama8b": (32, 8, 128, 32),
    "llama70b40": (64, 8, 128, 40),
    "eagle8b": (32, 8, 128, 1),
    "qwen35_9b": (16, 4, 256, 8),
    "gptoss12": (64, 8, 64, 6),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", SHAPES)
def test_sglang_reads_it(name: str, tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig
    from transformers import AutoTokenizer

    path = write_shape(name, tmp_path / name)
    config = ModelConfig(str(path))
    text = config.hf_text_config
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    full = sum(kind in ("full_attention", "attention") for kind in kinds) if kinds else config.num_hidden_layers
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, full) == SEEN[name]
    assert config.vocab_size == SHAPES[name]["vocab_size"] > len(AutoTokenizer.from_pretrained(path))


def test_another_model_is_not_overwritten(tmp_path: Path) -> None:
    write_shape("llama8b", tmp_path / "m")
    write_shape("eagle8b", tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is no folder of this script"):
        write_shape("llama8b", tmp_path / "m")
