"""Start SGLang as a framework for reinforcement learning does, roll out, and print what was said as one line of JSON.

    python rollouts.py verl|slime|miles '{"model": ..., "other": ..., "sleeps": false, "args": {...}}'

``args`` are SGLang's settings; ``other`` has the shape of ``model``, and its weights are loaded between rollouts. How
the frameworks start SGLang was read in their sources of 2026; none of them is needed here. It counts which process has
loaded SGLang's plugins when, so each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import requests
from drive import greedy, tree_prompts

SAMPLES, TOKENS, PAUSE_AFTER = 8, 32, 6
PROMPT = tree_prompts(seed=9)[0]
START_S = 400


# --- verl (workers/rollout/sglang_rollout): a Ray actor makes ServerArgs from keywords before any plugin is loaded,
# starts the other processes by Engine's own launcher, and has the tokenizer manager in its own.


class Verl:
    def __init__(self, args: dict[str, Any]) -> None:
        from sglang.srt.entrypoints import engine
        from sglang.srt.entrypoints.http_server import Engine
        from sglang.srt.server_args import ServerArgs

        self.manager, *_ = Engine._launch_subprocesses(
            server_args=ServerArgs(**args),
            init_tokenizer_manager_func=engine.init_tokenizer_manager,
            run_scheduler_process_func=engine.run_scheduler_process,
            run_detokenizer_process_func=engine.run_detokenizer_process,
        )

    async def roll_out(self, under_way: asyncio.Event | None = None) -> list[dict]:
        """The last parts of the samples of one prompt, each a request of its own; ``under_way`` is set when all of them
        have ``PAUSE_AFTER`` tokens."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        has_some: set[int] = set()

        async def one(nth: int) -> dict:
            request = GenerateReqInput(input_ids=PROMPT, sampling_params=greedy(TOKENS), stream=True)
            async for part in self.manager.generate_request(request, None):
                if part["meta_info"]["completion_tokens"] >= PAUSE_AFTER:
                    has_some.add(nth)
                if under_way is not None and len(has_some) == SAMPLES:
                    under_way.set()
            return part

        return await asyncio.gather(*(one(nth) for nth in range(SAMPLES)))

    async def load(self, model: str, *, flush: bool) -> None:
        from safetensors.torch import load_file
        from sglang.srt.managers import io_struct
        from sglang.srt.utils import MultiprocessingSerializer

        tensors = MultiprocessingSerializer.serialize(list(load_file(f"{model}/model.safetensors").items()))
        request = io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=[tensors], flush_cache=flush)
        calls = [self.manager.update_weights_from_tensor(request, None)]
        if hasattr(io_struct, "BeginWeightUpdateReqInput"):  # not in 0.5.17
            calls.insert(0, self.manager.begin_weight_update(io_struct.BeginWeightUpdateReqInput(), None))
            calls.append(self.manager.end_weight_update(io_struct.EndWeightUpdateReqInput(), None))
        for call in calls:
            done, message = await call
            assert done, message

    async def sleep(self) -> None:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput

        tags = ["kv_cache", "weights"]
        await self.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=tags), None)
        await self.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags), None)

    async def interrupted(self, mode: str, model: str) -> list[dict]:
        """A rollout in the middle of which the weights of ``model`` are loaded; the cache stays as it is."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

        under_way = asyncio.Event()
        rollout = asyncio.create_task(self.roll_out(under_way))
        await under_way.wait()
        await self.manager.pause_generation(PauseGenerationReqInput(mode=mode))
        await self.load(model, flush=False)
        assert not rollout.done(), "paused too late"
        await self.manager.continue_generation(ContinueGenerationReqInput())
        return await rollout


async def verl(scenario: dict) -> dict:
    model, other = scenario["model"], scenario["other"]
    engine = Verl({"model_path": model, **scenario["args"]})
    said, states = {}, {}

    async def note(name: str, samples: list[dict]) -> None:
        about = ("output_ids", "meta_info")
        ids, info = zip(*([sample[key] for key in about] for sample in samples))
        said[name] = [{"ids": i, "retracted": m["num_retractions"]} for i, m in zip(ids, info)]
        states[name] = (await engine.manager.get_internal_state())[0].get("packinfer")

    await note("first", await engine.roll_out())
    await note("in_place", await engine.interrupted("in_place", other))
    await note("retract", await engine.interrupted("retract", model))
    for name, weights in {"other": other, "again": model}.items():
        await engine.load(weights, flush=True)
        await note(name, await engine.roll_out())
    if scenario["sleeps"]:
        await engine.sleep()
        await note("slept", await engine.roll_out())
    return {"said": said, "states": states}


# --- slime (backends/sglang_utils): the trainer's parser has SGLang's flags behind a prefix, and is made before any
# plugin is loaded; a Ray actor makes ServerArgs from what was parsed, and runs SGLang's server in a new process.


def prefixed_parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    add = parser.add_argument

    def add_prefixed(*flags: str, **more: Any) -> None:
        if "dest" in more:
            more["dest"] = f"sglang_{more['dest']}"
        add(*(f"--sglang-{flag.lstrip('-')}" for flag in flags), **more)

    parser.add_argument = add_prefixed
    ServerArgs.add_cli_args(parser)
    parser.add_argument = add
    return parser


def parsed(args: dict[str, Any]) -> dict[str, Any]:
    """Keywords for ServerArgs, by way of the trainer's command line."""
    from sglang.srt.server_args import ServerArgs

    given = vars(prefixed_parser().parse_args(flags("--sglang-", args)))
    # a dataclass; in 0.5.23 a struct
    names = getattr(ServerArgs, "__struct_fields__", None) or list(ServerArgs.__dataclass_fields__)
    return {name: given[f"sglang_{name}"] for name in names if f"sglang_{name}" in given}


def flags(prefix: str, args: dict[str, Any]) -> list[str]:
    names = {name: prefix + name.replace("_", "-") for name in args}
    return [word for name, value in args.items() for word in (names[name], *([] if value is True else [str(value)]))]


def slime(args: dict[str, Any]) -> Callable[[], bool]:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    multiprocessing.set_start_method("spawn", force=True)
    server = multiprocessing.Process(target=launch_server, args=(ServerArgs(**parsed(args)),))
    server.start()
    return server.is_alive


# --- miles (backends/sglang_utils): slime's parser; what was parsed becomes SGLang's own command line, and is parsed
# again to see that it means the same, again before any plugin is loaded.


def miles(args: dict[str, Any]) -> Callable[[], bool]:
    from sglang.srt.server_args import prepare_server_args

    parsed(args)
    command = flags("--", args)
    prepare_server_args(command)
    server = subprocess.Popen([sys.executable, "-m", "sglang.launch_server", *command])
    return lambda: server.poll() is None


def over_http(scenario: dict, start: Callable[[dict[str, Any]], Callable[[], bool]]) -> dict:
    model, other = scenario["model"], scenario["other"]
    args = {"model_path": model, **scenario["args"]}
    with contextlib.redirect_stderr(io.StringIO()) as refusal, contextlib.suppress(SystemExit):
        parsed({**args, "attention_backend": "packinfer"})
    url, alive, deadline = f"http://127.0.0.1:{args['port']}", start(args), time.monotonic() + START_S

    def is_healthy() -> bool:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            return requests.get(f"{url}/health_generate", timeout=60).status_code == 200
        return False

    while not is_healthy():
        assert alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(1)

    def post(path: str, **body: Any) -> Any:
        answer = requests.post(f"{url}/{path}", json=body, timeout=300)
        answer.raise_for_status()
        return answer.json()

    def roll_out() -> list[dict]:
        outs = post("generate", input_ids=[PROMPT] * SAMPLES, sampling_params=greedy(TOKENS))
        return [{"ids": out["output_ids"]} for out in outs]

    said = {"refusal": [refusal.getvalue()], "first": roll_out()}
    for name, weights in {"other": other, "again": model}.items():
        post("pause_generation")
        requests.get(f"{url}/flush_cache", timeout=60).raise_for_status()
        post("update_weights_from_disk", model_path=weights)
        post("continue_generation")
        said[name] = roll_out()
    state = requests.get(f"{url}/server_info", timeout=60).json()["internal_states"][0].get("packinfer")
    return {"said": said, "states": {"again": state}}


def main() -> None:
    from sglang.srt.utils import kill_process_tree

    framework, scenario = sys.argv[1], json.loads(sys.argv[2])
    try:
        said = asyncio.run(verl(scenario)) if framework == "verl" else over_http(scenario, globals()[framework])
        print("RESULT " + json.dumps(said), flush=True)
    except BaseException:
        traceback.print_exc()  # now: when its children end, SGLang ends this process
        raise
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
