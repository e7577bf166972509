"""A multimodal model: the same words behind the same image are one prefix, behind another image they are not."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
from check.judge import Judge
from check.qwen2_vl import MERGE, PATCH
from check.rounds import Answers, Talk, answer
from check.scenarios import CHECK, FA3, OURS, Check, Scenario
from drive import greedy
from PIL import Image

from packinfer_sgl.tools.tiny_model import WORDS

BEFORE, SIDE, BEHIND = 200, 168, 200  # words, the sides of an image, words
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
ROWS = 4  # requests behind each of two images
TOKENS = 200  # of each answer: images take a while, and all requests have to run at once


def images(talk: Talk) -> Answers:
    """Pairs of requests that differ in the image only, between words that all of them have; last come words of their
    own. ``tree``: who shares what while all of them run."""
    rng = random.Random(4)

    def words(n: int) -> str:
        return "".join(f" {rng.choice(WORDS)}" for _ in range(n))

    def image(seed: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))

    before, behind = words(BEFORE), words(BEHIND)
    own = [words(1 + i) for i in range(ROWS)]
    prompts = [f"{before}<|vision_start|><|image_pad|><|vision_end|>{behind}{last}" for last in own for _ in range(2)]
    parts, states = [0] * len(prompts), []

    async def one(i: int) -> dict[str, Any]:
        stream = await talk.engine.async_generate(
            prompt=prompts[i],
            image_data=[image(i % 2)],
            sampling_params=greedy(TOKENS),
            stream=True,
            **talk.asked,
        )
        last: dict[str, Any] = {}
        async for out in stream:
            last = out
            parts[i] += 1
            if min(parts) > 4 and not states:
                states.append([])
                states[0] = await talk.engine.tokenizer_manager.get_internal_state()
        return last

    async def all_of_them() -> list[dict[str, Any]]:
        return await asyncio.gather(*(one(i) for i in range(len(prompts))))

    outs = talk.engine.loop.run_until_complete(all_of_them())
    tree = (states[0][0].get("packinfer") or {}).get("tree")
    return [{**answer(out), "tree": tree} for out in outs]


ROUNDS = {"images": images}
TWICE = ("images", "images")  # the second time, all is in the tree
TOWER = {"mm_attention_backend": "sdpa"}

SCENARIOS = {
    "images-fa3": Scenario("qwen2_vl", {**FA3, **TOWER}, rounds=TWICE),
    "images-packinfer": Scenario("qwen2_vl", {**OURS, **TOWER}, rounds=TWICE),
    "images-audit": Scenario("qwen2_vl", {**OURS, **TOWER}, CHECK, rounds=TWICE),
}


def shared(judge: Judge) -> None:
    ours = ("images-packinfer", "images-audit")
    if not judge.started("images", *ours, stock=("fa3", "triton", "images-fa3")):
        return
    said = judge.ran["images-fa3"].said["1-images"]
    differ = sum(a["ids"] != b["ids"] for a, b in zip(said[::2], said[1::2], strict=True))
    judge.add("images matter", differ == ROWS, f"{differ} of {ROWS} pairs answer differently for another image")
    first, last = BEFORE + 1, BEFORE + 1 + IMAGE_TOKENS  # behind the mark where an image starts
    for name in ours:
        judge.same(name, name, "images-fa3")
        tree = judge.ran[name].said["1-images"][0]["tree"]
        apart = all(node["rows"] <= ROWS for node in tree if node["end"] > first)
        same = sum(node["rows"] > 1 and node["start"] <= first and node["end"] >= last for node in tree)
        spans = [f"{node['rows']} rows {node['start']} to {node['end']}" for node in tree]
        judge.add(f"{name} groups", apart and same == 2, f"images at {first} to {last}; {'; '.join(spans)}")
    judge.audited("images-audit")


CHECKS = {"images": Check(shared, ("fa3", "triton", *SCENARIOS), "images: the same shared, others not", gpus=0)}
