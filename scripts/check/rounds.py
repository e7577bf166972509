"""What is asked of an engine, round by round."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "engine"))
from drive import greedy, tree_prompts

TOP = 5  # log-probabilities of each output token
TOKENS = 40
Answers = list[dict[str, Any]]


class Talk:
    """An engine that is asked; ``asked`` are arguments of ``engine.generate`` for every request."""

    def __init__(self, engine: Any, logprobs: bool, asked: dict[str, Any]) -> None:
        self.engine = engine
        self.asked = {**({"return_logprob": True, "top_logprobs_num": TOP} if logprobs else {}), **asked}

    def outs(self, prompts: list[list[int]], params: dict[str, Any] | None = None, **more: Any) -> Any:
        """SGLang's outputs of TOKENS greedy tokens, or as the sampling parameters ``params`` say; ``more`` are fields
        of SGLang's request, of which ``engine.generate`` does not take all."""
        return self._send(
            {"input_ids": prompts, "sampling_params": {**greedy(TOKENS), **(params or {})}, **self.asked, **more}
        )

    def _send(self, fields: dict[str, Any]) -> Any:
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = self.engine.tokenizer_manager.generate_request(GenerateReqInput(**fields), None)
        return self.engine.loop.run_until_complete(anext(request))

    def ask(self, prompts: list[list[int]], params: dict[str, Any] | None = None, **more: Any) -> Answers:
        return [answer(out) for out in self.outs(prompts, params, **more)]


def answer(out: dict[str, Any]) -> dict[str, Any]:
    """The ids of an output, of each the likeliest tokens with their log-probabilities, and what became of its KV."""
    about = out["meta_info"]
    top = about.get("output_top_logprobs") or []
    return {
        "ids": out["output_ids"],
        "top": [{str(token): lp for lp, token, _ in position} for position in top],
        "cached": about["cached_tokens"],
        "retracted": about["num_retractions"],
    }


def tree(talk: Talk) -> Answers:
    """16 requests in a three-level tree of prefixes."""
    return talk.ask(tree_prompts(2))


def deep(talk: Talk) -> Answers:
    """The same with a longer prefix for all."""
    return talk.ask(tree_prompts(2, 1500))


def samples(talk: Talk) -> Answers:
    """4 samples of each of 3 prompts."""
    return talk.ask(tree_prompts(2)[:3], {"n": 4})


def three(talk: Talk) -> Answers:
    return talk.ask(tree_prompts(2)[:3])


def one(talk: Talk) -> Answers:
    return talk.ask(tree_prompts(2)[:1])


def turns(talk: Talk) -> Answers:
    """Two requests at each turn of a conversation of 48 turns."""
    said = tree_prompts(3, 48 * 64)[0]
    return talk.ask([[*said[: 64 * (1 + i // 2)], 300 + i] for i in range(96)])


ROUNDS: dict[str, Callable[[Talk], Answers]] = {f.__name__: f for f in (tree, deep, samples, three, one, turns)}
