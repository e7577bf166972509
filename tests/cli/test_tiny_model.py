from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from packinfer_sgl.tools.tiny_model import SPECIALS, WORDS, build_tokenizer, write_tiny_model

SMALL = {"layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 8}
TOKENIZER, SAID = build_tokenizer()


def digest(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_same_seed_same_bytes(tmp_path):
    first = digest(write_tiny_model(tmp_path / "a", **SMALL))
    again = digest(write_tiny_model(tmp_path / "b", **SMALL))
    other = digest(write_tiny_model(tmp_path / "c", **SMALL, seed=1))
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


def test_overwrites_a_tiny_model_and_nothing_else(tmp_path):
    path = write_tiny_model(tmp_path / "model", **SMALL)
    before = digest(path)
    assert digest(write_tiny_model(path, **SMALL, seed=1)) != before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "llama"}')
    for taken in (tmp_path / "mine", tmp_path / "mine" / "config.json"):
        with pytest.raises(FileExistsError, match="mine"):
            write_tiny_model(taken, **SMALL)
    assert digest(tmp_path / "mine").keys() == {"config.json"}


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"layers": 0}, {"head_dim": 7}, {"kv_heads": 0}])
def test_impossible_shapes(tmp_path, wrong):
    with pytest.raises(ValueError):
        write_tiny_model(tmp_path / "model", **{**SMALL, **wrong})
    assert not (tmp_path / "model").exists()


@given(st.text())
def test_tokenizer_round_trip(text):
    if any(special in text for special in SPECIALS):
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_words_are_single_tokens():
    assert len(set(WORDS)) == len(WORDS) == len(set(SAID))
    assert TOKENIZER.encode("".join(f" {word}" for word in WORDS)).ids == SAID


def test_only_words_are_said(tmp_path):
    """The end of text never comes, so every answer has the length that was asked for."""
    weights = load_file(write_tiny_model(tmp_path / "model", **SMALL) / "model.safetensors")
    (spoken,) = np.abs(weights["lm_head.weight"]).sum(1).nonzero()
    assert spoken.tolist() == sorted(SAID)


@pytest.mark.contract
def test_transformers_loads_it(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    path = write_tiny_model(tmp_path / "model", **SMALL)
    config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        *("llama", 4, 2, 8),
    )
    assert (config.eos_token_id, config.vocab_size) == (tokenizer.eos_token_id, len(tokenizer))
    text = " the river is\n\twide, señor ✓"
    assert tokenizer.encode(text) == TOKENIZER.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = [{"role": "user", "content": "hello"}]
    assert "hello" in tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.contract
def test_attention_decides_the_next_token(tmp_path):
    """Without one token of a long prefix, wherever it stands, the model goes on differently."""
    import torch
    from transformers import AutoModelForCausalLM

    path = write_tiny_model(tmp_path / "model", layers=2, heads=4, kv_heads=2, head_dim=32)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.tensor(np.random.default_rng(0).choice(SAID, (1, 300)))

    @torch.no_grad()
    def logprobs(attended: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(prompt.shape[1])[None]
        logits = model(prompt, attention_mask=attended, position_ids=positions).logits
        return logits[0, -1].double().log_softmax(-1)

    everything = torch.ones_like(prompt)
    whole = logprobs(everything)
    for dropped in range(0, 280, 40):
        attended = everything.clone()
        attended[0, dropped] = 0
        assert (logprobs(attended) - whole).abs().max() > 1e-3  # ten times what counts as a near-tie
