"""What SGLang does to batches: pages, chunks, preemption, retraction, aborts, pauses, new weights, memory released."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from check.compare import Ran, compare
from check.judge import Judge, account
from check.rounds import Answers, Talk, answer
from check.scenarios import CHECK, FA3, OURS, RECENT, Check, Scenario
from drive import Driver, greedy, tree_prompts
from safetensors.numpy import load_file, save_file

PREEMPT = {"at_once": 2, "tokens": 300}
TWO_AT_ONCE = {"enable_priority_scheduling": True, "max_running_requests": 2, "max_total_tokens": 1000}
CHUNK = 256  # tokens
CHUNKS = {"chunked_prefill_size": CHUNK, "enable_mixed_chunk": True}
SMALL = {"max_total_tokens": 2600}
RETRACT = {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "25"}
BETWEEN = ("tree", "abort", "flushed", "paused", "updated", "alone")
SAVER = {"enable_memory_saver": True}
ROLLOUTS = ("tree", "resumed")
PAUSED_TOKENS = 120  # a GPU says some before a pause arrives
CHANGED = "model.layers.1.self_attn.v_proj.weight"

SCENARIOS = {
    "page16": Scenario("llama", {**OURS, "page_size": 16}, CHECK),
    "page64": Scenario("llama", {**OURS, "page_size": 64}, CHECK),
    # SGLang mixes no batches of requests that ask for log-probabilities
    "chunks": Scenario("llama", {**OURS, **CHUNKS}, {**CHECK, "extend": "on"}, logprobs=False),
    "retracted": Scenario("llama", {**OURS, **SMALL}, CHECK, env=RETRACT),
    "preempted": Scenario("llama", {**OURS, **TWO_AT_ONCE}, CHECK, rounds=("preempted",)),
    "between": Scenario("llama", OURS, CHECK, rounds=BETWEEN),
    "between-fa3": Scenario("llama", FA3, rounds=BETWEEN),
    "rollouts": Scenario("llama", {**OURS, **SAVER}, CHECK, rounds=ROLLOUTS),
    "rollouts-fa3": Scenario("llama", {**FA3, **SAVER}, rounds=ROLLOUTS),
}


def preempted(talk: Talk) -> Answers:
    """The prompts of ``alone`` in turn, again and again preempted by others."""
    return [{**out, "top": []} for out in Driver(talk.engine, False, PREEMPT).preempted()]


def alone(talk: Talk) -> Answers:
    return Driver(talk.engine, True, {}).low()


def abort(talk: Talk) -> Answers:
    """What those say that are not aborted in mid-stream."""
    return Driver(talk.engine, True, {}).abort()


def flushed(talk: Talk) -> Answers:
    assert talk.engine.flush_cache().success
    return talk.ask(tree_prompts(2))


def paused(talk: Talk) -> Answers:
    """All wait in place; later they are retracted, and weights (the same) are loaded meanwhile."""
    return [answer(out) for out in talk.engine.loop.run_until_complete(_paused(talk))]


async def _paused(talk: Talk) -> list[dict[str, Any]]:
    from sglang.srt.managers import io_struct

    manager, path = talk.engine.tokenizer_manager, talk.engine.server_args.model_path
    first = asyncio.Condition()
    said = 0  # tokens of the first request

    async def one(i: int, prompt: list[int]) -> dict[str, Any]:
        nonlocal said
        stream = await talk.engine.async_generate(
            input_ids=prompt, sampling_params=greedy(PAUSED_TOKENS), stream=True, **talk.asked
        )
        async for out in stream:
            if i == 0:
                async with first:
                    said = out["meta_info"]["completion_tokens"]
                    first.notify_all()
        return out

    async def until(tokens: int) -> None:
        async with first:
            await first.wait_for(lambda: said >= tokens)
        assert said < PAUSED_TOKENS, "too late to pause"

    async def pauses() -> None:
        await until(5)
        await manager.pause_generation(io_struct.PauseGenerationReqInput(mode="in_place"))
        await asyncio.sleep(0.5)
        before = said
        await asyncio.sleep(0.5)
        assert said == before, "a token was said in the pause"
        await manager.continue_generation(io_struct.ContinueGenerationReqInput())
        await until(before + 5)
        await manager.pause_generation(io_struct.PauseGenerationReqInput(mode="retract"))
        # the older release does not flush its cache while a retracted request waits
        loaded, why, *_ = await manager.update_weights_from_disk(
            io_struct.UpdateWeightFromDiskReqInput(model_path=path, flush_cache=RECENT), None
        )
        assert loaded, why
        await manager.continue_generation(io_struct.ContinueGenerationReqInput())

    *outs, _ = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(tree_prompts(5))), pauses())
    return outs


def updated(talk: Talk) -> Answers:
    """With the values of one layer negated, and with the first weights again."""
    model = Path(talk.engine.server_args.model_path)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(shutil.copytree(model, Path(folder) / "changed"))
        weights = load_file(model / "model.safetensors")
        weights[CHANGED] = -weights[CHANGED]
        save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
        return _with_weights(talk, changed) + _with_weights(talk, model)


def _with_weights(talk: Talk, path: Path) -> Answers:
    loaded, why, *_ = talk.engine.update_weights_from_disk(str(path))
    assert loaded, why
    return talk.ask(tree_prompts(2))


def resumed(talk: Talk) -> Answers:
    """After the memory of weights and KV cache was given back, as for a training step, and the weights came anew."""
    talk.engine.release_memory_occupation()
    talk.engine.resume_memory_occupation()
    return _with_weights(talk, Path(talk.engine.server_args.model_path))


ROUNDS = {f.__name__: f for f in (preempted, alone, abort, flushed, paused, updated, resumed)}


def pages(judge: Judge) -> None:
    for name in ("page16", "page64"):
        if judge.started(name, name, stock=("fa3", "triton")):
            judge.same(name, name, "fa3")
            judge.audited(name)


def chunks(judge: Judge) -> None:
    if judge.started("chunks", "chunks", stock=("fa3", "triton")):
        judge.same("chunks", "chunks", "fa3")
        judge.audited("chunks")
        state = judge.ran["chunks"].state
        prompts = tree_prompts(2)
        least = len({(*prompt[: i + 1],) for prompt in prompts for i in range(len(prompt))}) // CHUNK
        ok = state["packed_extends"] >= least and not state["fallback_steps"]
        note = (
            f"{state['packed_extends']} prefills, chunks and mixed batches were packed, at least {least} chunks in them"
        )
        judge.add("chunks packed", ok, note)


def retracted(judge: Judge) -> None:
    if judge.started("retracted", "retracted", stock=("fa3", "triton")):
        judge.same("retracted", "retracted", "fa3")
        judge.audited("retracted")
        counts = [out["retracted"] for said in judge.ran["retracted"].said.values() for out in said]
        judge.add("retractions", sum(counts) > 0, f"{sum(map(bool, counts))}/{len(counts)} answers came through one")


def preemption(judge: Judge) -> None:
    if judge.started("preempted", "preempted", stock=("fa3", "triton", "between-fa3")):
        ours, lone = judge.ran["preempted"], judge.ran["between-fa3"].answers("alone")
        said = ours.answers("preempted")
        diff = compare(ours, Ran(said={"0-preempted": lone * (len(said) // len(lone))}))
        limit = 2 * judge.limit()
        counts = [out["retracted"] for out in said]
        note = f"against the same alone on fa3: {diff} (limit {limit:.3g}); preempted {counts} times; {account(ours)}"
        judge.add("preempted", diff.of > 0 and diff.gap <= limit and all(counts), note)
        judge.audited("preempted")


def between(judge: Judge) -> None:
    if not judge.started("between", "between", stock=("fa3", "triton", "between-fa3")):
        return
    for name in BETWEEN[:-1]:
        judge.same(f"between: {name}", "between", "between-fa3", rounds=(name,))
    judge.audited("between")
    ran = judge.ran["between"]
    answers = {name: ran.answers(name) for name in BETWEEN}
    n = len(answers["tree"])
    changed, restored = answers["updated"][:n], answers["updated"][n:]
    for what, said in (("flushed", answers["flushed"]), ("weights changed", changed), ("weights restored", restored)):
        judge.add(f"{what}: cache", said[0]["cached"] == 0, f"{said[0]['cached']} cached tokens of the first prompt")
    counts = [out["retracted"] for out in answers["paused"]]
    judge.add("paused: retracted", sum(counts) > 0, f"{sum(map(bool, counts))}/{len(counts)} answers came through it")
    other = sum(a["ids"] != b["ids"] for a, b in zip(answers["tree"], changed, strict=True))
    judge.add("weights changed: other answers", other == n, f"{other}/{n}")


def rollouts(judge: Judge) -> None:
    if judge.started("rollouts", "rollouts", stock=("fa3", "triton", "rollouts-fa3")):
        for name in ROLLOUTS:
            judge.same(f"rollouts: {name}", "rollouts", "rollouts-fa3", rounds=(name,))
        judge.audited("rollouts")
        cached = judge.ran["rollouts"].answers("resumed")[0]["cached"]
        judge.add("resumed: cache", cached == 0, f"{cached} cached tokens of the first prompt")


CHECKS = {
    # the older release allocates pages on a GPU only
    "pages": Check(pages, ("fa3", "triton", "page16", "page64"), "page sizes 16 and 64", gpus=0 if RECENT else 1),
    "chunks": Check(chunks, ("fa3", "triton", "chunks"), "packed prefill in chunks, mixed chunks allowed", gpus=0),
    "retraction": Check(retracted, ("fa3", "triton", "retracted"), "retraction", gpus=0),
    "preemption": Check(preemption, ("fa3", "triton", "between-fa3", "preempted"), "preemption by priority", gpus=0),
    "between": Check(
        between, ("fa3", "triton", "between-fa3", "between"), "aborts, flushes, pauses and new weights", gpus=0
    ),
    "rollouts": Check(
        rollouts, ("fa3", "triton", "rollouts-fa3", "rollouts"), "memory given back and taken again between rollouts"
    ),
}
