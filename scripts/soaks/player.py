"""One engine of a soak, in processes of its own: it is asked, and what it said is written to a file.

Rounds: ``together``: each prompt once, all at once; ``alone``, ``again``: each by itself, after a flush;
``soak``: the load, in waves.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SCRIPTS))

from check.runs import last_error  # noqa: E402
from lib.servers import Child, stop_all  # noqa: E402
from soaks.load import Load, Order, greedy, prompts, waves  # noqa: E402

TOP = {"return_logprob": True, "top_logprobs_num": 5}
URGENT = 1000  # a priority
METADATA = "Metadata-Version: 2.1\nName: packinfer-soak\nVersion: 0\n"


@dataclass(frozen=True)
class Play:
    """One engine and what it is asked: arguments of ``sglang.Engine``, environment, rounds."""

    engine: dict[str, Any]
    load: Load
    rounds: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


def played(plays: dict[str, Play], folder: Path, limit_s: float | None = None) -> tuple[dict[str, Any], list[str]]:
    """Runs the engines side by side; what they told, and a line for each that did not come to its end in ``limit_s``.
    Their logs stay in ``folder``."""
    info = folder / "packinfer_soak-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\npackinfer_soak = soaks.hooks:register\n")
    path = os.pathsep.join(filter(None, [str(folder), str(SCRIPTS), os.environ.get("PYTHONPATH")]))
    told, problems, children, began = {}, [], [], time.monotonic()
    try:
        for name, play in plays.items():
            (result := folder / f"{name}.json").unlink(missing_ok=True)
            order = json.dumps({**asdict(play), "result": str(result)})
            # several engines at once: more threads would only wait for each other
            env = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **play.env}
            children.append(Child(name, [sys.executable, __file__, order], folder / f"{name}.log", env))
        for child in children:
            code = f"nothing after {limit_s} s"
            with suppress(subprocess.TimeoutExpired):
                left_s = None if limit_s is None else max(0.0, began + limit_s - time.monotonic())
                code = f"exit code {child.process.wait(left_s)}"
            if (result := folder / f"{child.name}.json").exists():
                told[child.name] = json.loads(result.read_text())
                print(f"{child.name}: done after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            else:
                print("\n".join(child.tail(40)), file=sys.stderr)
                why = last_error(child.log.read_text(errors="replace")) or code
                problems.append(f"the {child.name} engine died: {why}; its last words are above")
    finally:
        stop_all(children)
    return told, problems


class Player:
    def __init__(self, engine: Any, load: Load) -> None:
        self.engine, self.load, self.prompts, self.aborted = engine, load, prompts(load), 0

    def together(self) -> list[dict[str, Any]]:
        outs = self.engine.generate(input_ids=self.prompts, sampling_params=greedy(self.load.longest), **TOP)
        return [said(out) for out in outs]

    def alone(self) -> list[dict[str, Any]]:
        self.engine.flush_cache()
        answers = []
        for prompt in self.prompts:
            out = self.engine.generate(input_ids=prompt, sampling_params=greedy(self.load.longest), **TOP)
            answers.append(said(out))
        self.engine.flush_cache()
        return answers

    again = alone

    def soak(self) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        done = 0
        for orders, flush in waves(self.load):
            for of_one in self.engine.loop.run_until_complete(self._wave(orders)):
                answers += of_one
            done += len(orders)
            print(f"{done} of {self.load.requests} requests", file=sys.stderr, flush=True)
            if flush:
                self.engine.flush_cache()
        return answers

    async def _wave(self, orders: list[Order]) -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*map(self._ask, orders))

    async def _ask(self, order: Order) -> list[dict[str, Any]]:
        is_short = order.tokens < self.load.longest
        if is_short:  # while others run
            await asyncio.sleep(self.load.within_s * (order.nth % 10) / 10)
        params: dict[str, Any] = {
            "input_ids": self.prompts[order.prompt],
            "sampling_params": greedy(order.tokens, order.samples),
            **({"priority": URGENT if is_short else 0} if self.load.urgent else {}),
            **(TOP if order.logprobs else {}),
        }
        about = {"nth": order.nth, "prompt": order.prompt, "tokens": order.tokens, "samples": order.samples}
        if order.samples > 1:
            outs = await self.engine.async_generate(**params)
            return [{**said(out), **about, "whole": True} for out in outs]
        rid = f"soak-{order.nth}"
        stream = await self.engine.async_generate(**params, rid=rid, stream=True)
        last, parts = None, 0
        async for part in stream:
            parts += 1
            # of a request that it aborts while it waits (retracted, say) SGLang's last part has the last token alone
            if last is None or len(part["output_ids"]) >= len(last["output_ids"]):
                last = part
            if parts == order.abort_at:
                self.engine.tokenizer_manager.abort_request(rid=rid)
                self.aborted += 1
        assert last is not None
        aborted = order.abort_at is not None and parts >= order.abort_at
        return [{**said(last), **about, "whole": not aborted}]


def said(out: dict[str, Any]) -> dict[str, Any]:
    ids, top = out["output_ids"], out["meta_info"].get("output_top_logprobs") or []
    by_token = [{str(token): lp for lp, token, _ in position} for position in top]
    return {"ids": ids, "top": by_token[: len(ids)] if len(top) >= len(ids) else []}


def main(order: dict[str, Any]) -> None:
    import sglang

    engine = sglang.Engine(**order["engine"])
    player = Player(engine, Load(**order["load"]))
    answers = {}
    for name in order["rounds"]:
        answers[name] = getattr(player, name)()
        print(f"round {name} is over", file=sys.stderr, flush=True)
    state = state_of(engine)
    engine.flush_cache()
    told = {"said": answers, "aborted": player.aborted, "state": state, "after_flush": state_of(engine)}
    engine.shutdown()
    partial = Path(order["result"] + ".part")
    partial.write_text(json.dumps(told))
    partial.rename(order["result"])


def state_of(engine: Any) -> dict[str, Any]:
    state = engine.get_server_info()["internal_states"][0]
    return {**(state.get("packinfer") or {}), "accept_length": state.get("avg_spec_accept_length")}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
