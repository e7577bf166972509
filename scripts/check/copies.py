"""One prompt behind several cache keys or adapters: its copies are never one group."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from check.judge import Judge
from check.rounds import Answers, Talk
from check.scenarios import CHECK, FA3, OURS, RECENT, Check, Scenario
from drive import tree_prompts
from safetensors.numpy import save_file

COPIES, PROMPT = 8, tree_prompts(6)[0]
FIELDS = ("extra_key", "cache_salt") if RECENT else ("extra_key",)
KEYED = {f"{field} {n}": n for field in FIELDS for n in (1, 2, COPIES)}  # rounds, and how many keys there are
ADAPTERS, RANK = ("north", "south", None), 16  # None: the model as it is
LORA = {
    "enable_lora": True,
    "max_lora_rank": RANK,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "max_loras_per_batch": len(ADAPTERS),
}

SCENARIOS = {
    "lora": Scenario("llama", {**OURS, **LORA}, CHECK, rounds=("adapters",)),
    "lora-fa3": Scenario("llama", {**FA3, **LORA}, rounds=("adapters",)),
}


def keyed(field: str, n: int, talk: Talk) -> Answers:
    """One prompt COPIES times, cached behind each of ``n`` keys."""
    keys = [f"{field} {i % n} of {n}" for i in range(COPIES)]
    talk.ask([PROMPT] * n, {"max_new_tokens": 1}, **{field: keys[:n]})
    return talk.ask([PROMPT] * COPIES, **{field: keys})


def adapters(talk: Talk) -> Answers:
    """One prompt, cached and three times behind each adapter."""
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(filter(None, ADAPTERS)):
            path = write_adapter(Path(folder) / name, Path(talk.engine.server_args.model_path), seed)
            assert talk.engine.load_lora_adapter(name, str(path)).success
        talk.ask([PROMPT] * len(ADAPTERS), {"max_new_tokens": 1}, lora_path=list(ADAPTERS))
        return talk.ask([PROMPT] * 3 * len(ADAPTERS), lora_path=list(ADAPTERS) * 3)


def write_adapter(path: Path, model: Path, seed: int) -> Path:
    """A random LoRA adapter of all of ``model``'s attention, about as large as its weights."""
    config = json.loads((model / "config.json").read_text())
    hidden, dim = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    rng, weights = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in {"q": (hidden, q), "k": (hidden, kv), "v": (hidden, kv), "o": (q, hidden)}.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            for part, shape, std in (("A", (RANK, into), into**-0.5), ("B", (out, RANK), RANK**-0.5)):
                weights[f"{module}.lora_{part}.weight"] = (rng.standard_normal(shape) * std).astype(np.float32)
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": LORA["lora_target_modules"]}
    (path / "adapter_config.json").write_text(json.dumps({**about, "bias": "none", "task_type": "CAUSAL_LM"}))
    return path


ROUNDS: dict[str, Callable[[Talk], Any]] = {"adapters": adapters}
ROUNDS |= {name: partial(keyed, name.split()[0], n) for name, n in KEYED.items()}


def apart(judge: Judge, name: str, round_: str, groups: int, rows: int) -> None:
    """A row: ``groups`` copies of PROMPT are each read once for all of their rows, not for those of another copy."""
    ran, n = judge.ran[name], 0 if groups == rows else groups
    steps, logical, unique, read = (
        ran.counted(round_, counter)
        for counter in ("packed_steps", "kv_tokens_logical", "kv_tokens_unique", "kv_tokens_read")
    )
    state = ran.after[round_]
    copies = unique / max(steps, 1) / (len(PROMPT) - 1)  # a little too many, by the answers; too few as requests end
    ok = state["groups"] == n and state["rows_grouped"] == (state["rows"] if n else 0)
    ok &= 0.9 * groups < copies < groups + 1 and (read == logical if groups == rows else read < 0.6 * logical)
    note = f"{state['groups']} groups, {copies:.2f} copies of the prompt at each of {steps} steps"
    judge.add(f"{round_}: {groups} apart", ok, f"{note}; KV tokens read {read} of {logical}")


def lora(judge: Judge) -> None:
    if not judge.started("lora", "lora", stock=("fa3", "triton", "lora-fa3")):
        return
    judge.same("lora", "lora", "lora-fa3")
    judge.audited("lora")
    said = judge.ran["lora"].answers("adapters")
    texts = {tuple(out["ids"]) for out in said[: len(ADAPTERS)]}
    judge.add("lora: other answers", len(texts) == len(ADAPTERS), f"{len(texts)} of {len(ADAPTERS)} adapters")
    apart(judge, "lora", "adapters", len(ADAPTERS), len(said))


# SGLang's layers for adapters of fused projections pin memory, which needs a GPU
CHECKS = {"lora": Check(lora, ("fa3", "triton", "lora-fa3", "lora"), "LoRA adapters")}
