"""A tiny random Llama on disk, for the demo and the tests: no download, and attention decides every token.

Weights of the usual size (std 0.02) would hide an attention bug: greedy decoding would repeat the last token whatever
the prompt says. The gains below make attention sharp and its output the largest part of the residual stream, so that
one missing prefix token changes the text.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

MARK = "packinfer_tiny_model"  # this key in config.json says that we may overwrite the directory
SPECIALS = ("<s>", "</s>")
MAX_POSITIONS = 32768

# The model can say only these words; each is one token, its leading space included.
WORDS = """
a about above after again air all almost along also always among an and animal answer any are as ask at away back be
because been before began begin being below best better between big bird black blue boat body book both box bridge
bright bring brown build but by call came can car care carry change child city clear close cloud cold color come cook
corn could country cross cut dark day deep did do does dog door down draw dream drive dry each early earth east eat
end enough even ever every eye face fall family far farm fast father feel few field find fire first fish five fly
follow food foot for forest form found four free from front full game garden gave get girl give glass go gold good
grass gray great green ground group grow had half hand happy hard has have he head hear heart heavy help her here high
hill him his hold home horse hot hour house how hundred ice idea if in iron is island it its keep key kind king know
lake land large last late laugh lead leaf learn leave left less letter life light like line list little live long look
lost loud low made make man many map mark may me mean men metal mile milk mind money moon more morning most mother
mountain move much music must my name near need never new next night no north not note now number ocean of off often
old on once one only open or order other our out over own page paint paper part pass path people piece place plain
plan plant play point pond poor power press question quick quiet rain read ready red rest rice rich ride right ring
rise river road rock room round rule run said salt same sand say school sea second see seed seven shade she ship shop
short should show side silver simple sing sister six sky sleep slow small snow so soft some song soon sound south
space stand star start stay step still stone story street strong summer sun table take tall tell ten than that the
their them then there these they thing think this those three time to today town travel tree true turn two under
until up upon use valley very voice wait walk wall want warm was watch water wave way we well were west what wheel
when where which while white who why wide will wind window winter wise wish with wood word work world would write
year yellow yes yet you young your zero
""".split()

CHAT_TEMPLATE = (
    "{% for message in messages %} {{ message['role'] }} say: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %} answer:{% endif %}"
)


def write_tiny_model(
    path: Path, *, layers: int = 4, heads: int = 16, kv_heads: int = 4, head_dim: int = 64, seed: int = 0
) -> Path:
    """Writes config, tokenizer and float32 weights to ``path``; the same arguments give the same bytes.

    Raises FileExistsError if ``path`` holds something other than a tiny model, ValueError for an impossible shape.
    """
    if min(layers, heads, kv_heads) < 1 or heads % kv_heads:
        raise ValueError(f"a Llama needs layers, heads and heads a multiple of kv-heads: {layers}, {heads}, {kv_heads}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head-dim must be even for rotary embedding, is {head_dim}")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file")
    if path.is_dir() and any(path.iterdir()) and not has_mark(path, MARK):
        raise FileExistsError(f"{path} is not empty and no tiny model; name another directory")

    tokenizer, said = build_tokenizer()
    shape = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "seed": seed}
    config = _config(tokenizer.get_vocab_size(), shape)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", config)  # first: it marks the folder, so a write can be repeated
    write_tokenizer(path, tokenizer, bos=SPECIALS[0], eos=SPECIALS[1], positions=MAX_POSITIONS, template=CHAT_TEMPLATE)
    save_file(_weights(config, said, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def has_mark(path: Path, mark: str) -> bool:
    """Whether the configuration of the model in the folder ``path`` has this key."""
    try:
        return mark in json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False


def build_tokenizer() -> tuple[Tokenizer, list[int]]:
    """A byte-level BPE that round-trips any text, and the ids of WORDS.

    The merges are a trie of the words, read from the left: no training, so every release builds the same file.
    """
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    known = set(tokens)
    for word in WORDS:
        head = "Ġ"  # byte-level BPE's space
        for letter in word:
            if head + letter not in known:
                known.add(head + letter)
                tokens.append(head + letter)
                merges.append((head, letter))
            head += letter
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer, [vocab["Ġ" + word] for word in WORDS]


def _config(vocab_size: int, shape: dict[str, int]) -> dict[str, object]:
    hidden = shape["heads"] * shape["head_dim"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 1,
        MARK: shape,
    }


def _weights(config: dict, said: list[int], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    q_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]

    def normal(rows: int, columns: int, std: float) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(std)

    def linear(out: int, into: int, gain: float) -> np.ndarray:
        return normal(out, into, gain * into**-0.5)

    ones = np.ones(hidden, np.float32)
    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, 0.5), "model.norm.weight": ones}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": linear(q_width, hidden, 1.9),
            "self_attn.k_proj": linear(kv_width, hidden, 1.9),
            "self_attn.v_proj": linear(kv_width, hidden, 2.0),
            "self_attn.o_proj": linear(hidden, q_width, 2.0),
            "mlp.gate_proj": linear(middle, hidden, 0.5),
            "mlp.up_proj": linear(middle, hidden, 0.5),
            "mlp.down_proj": linear(hidden, middle, 0.5),
            "input_layernorm": ones,
            "post_attention_layernorm": ones,
        }
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    # A logit of 0 never wins: the model says no single bytes, no word pieces and no end of text.
    lm_head = np.zeros((config["vocab_size"], hidden), np.float32)
    lm_head[said] = linear(len(said), hidden, 3.0)
    return weights | {"lm_head.weight": lm_head}


def write_tokenizer(path: Path, tokenizer: Tokenizer, *, bos: str, eos: str, positions: int, template: str) -> None:
    """A tokenizer's files in the folder ``path``, as transformers reads them; ``template``: of chats."""
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    write_json(path / "tokenizer_config.json", config)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
