"""A real model: packinfer answers as stock SGLang does, and as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare import check
from engines import POOL, Ran, run_engine

pytestmark = [pytest.mark.engine, pytest.mark.contract]

# 24 greedy tokens of the GGUF file as transformers 5.19 reads it by itself (`gguf_file=`, float32, with accelerate):
# its own order of q and k rows, its own quantities, its own tokenizer. The best token leads by 0.06 or more.
REFERENCE = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Why is the sky blue? Answer in one sentence.": "The sky is blue because of a process called Rayleigh Scavenger "
    "Blood, which is a natural phenomenon that occurs when",
    "Write a haiku about the sea.": "The waves of the sea, a silent beauty,\nA gentle lapping of the shore,\n"
    "A reminder of the",
}
DOCUMENT = (Path(__file__).parents[2] / "LICENSE").read_text()[:1600]
ABOUT_IT = ("What is this document?", "Who is the licensor?", "What are derivative works?", "Is it free?")


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


CHATS = [*map(ask, REFERENCE), *(ask(f"{DOCUMENT}\n\n{question}") for question in ABOUT_IT)]


def run(model: Path, backend: str) -> Ran:
    engine = {"model_path": str(model), "attention_backend": backend, **POOL}
    return run_engine({"engine": engine, "rounds": ["chats"], "logprobs": backend != "packinfer", "chats": CHATS})


@pytest.fixture(scope="module")
def packed(real_model) -> Ran:
    return run(real_model, "packinfer")


def test_answers_are_those_of_stock(real_model, packed):
    check(packed.said, {"chats": run(real_model, "torch_native").said["0-chats"]})
    assert packed.state["active"] and 0 < packed.state["kv_tokens_read"] < 0.5 * packed.state["kv_tokens_logical"]


def test_answers_are_those_of_transformers(real_model, packed):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    for (question, text), said in zip(REFERENCE.items(), packed.said["0-chats"]):
        prompt = tokenizer.apply_chat_template(
            ask(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert said["ids"] == answer.tolist(), question
        assert tokenizer.decode(said["ids"], skip_special_tokens=True) == text
