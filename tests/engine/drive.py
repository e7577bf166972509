"""Run one SGLang engine through the rounds of the exactness tests and print what it said, as one line of JSON.

    python drive.py '{"engine": {...}, "rounds": [...]}'

Rounds: ``tree`` (16 requests in a three-level tree), ``cold`` (8 identical prompts at once), ``family`` (8 prompts
behind 900 unseen tokens, and 2 unrelated ones between them), ``samples`` (n = 4),
``beams`` (beam search of width 4 on two prompts), ``abort`` (half of the tree's requests aborted in mid-generation),
``flush`` (empties the cache), ``busy`` (long generations that overflow a small pool), ``low`` (two prompts, one after
the other), ``preempted`` (those prompts, each again and again preempted by others of a higher priority, as the
scenario's ``preempt`` says: ``at_once`` of them run at a time, the others have so many ``tokens`` and generate none or
one), ``chats`` (the scenario's ``chats``, each a list of messages, answered until the model ends or 24 tokens). Every
round but ``flush`` yields a list of outputs. What /server_info says is read after each round.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys

# ids of whole words in the tiny model's vocabulary
FIRST, LAST = 300, 1200


def tree_prompts(seed: int = 0, shared: int = 300) -> list[list[int]]:
    """16 prompts: ``shared`` tokens for all, 100 for each four, 50 for each two, then 1 to 30 of their own."""
    rng = random.Random(seed)

    def words(n: int) -> list[int]:
        return [rng.randrange(FIRST, LAST) for _ in range(n)]

    root = words(shared)
    prompts = []
    for _ in range(4):
        middle = root + words(100)
        for _ in range(2):
            low = middle + words(50)
            prompts += [low + words(rng.randint(1, 30)) for _ in range(2)]
    return prompts


def greedy(tokens: int, **more: object) -> dict[str, object]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True, **more}


class Driver:
    def __init__(self, engine, scenario: dict) -> None:
        self.engine, self.logprobs = engine, scenario.get("logprobs", False)
        self.preempt, self.conversations = scenario.get("preempt", {}), scenario.get("chats", [])

    def generate(self, prompts: list[list[int]], params: dict[str, object]) -> list[dict]:
        more = {"return_logprob": True, "top_logprobs_num": 5} if self.logprobs else {}
        outs = self.engine.generate(input_ids=prompts, sampling_params=params, **more)
        return [self.said(out) for out in outs]

    def said(self, out: dict) -> dict:
        about = out["meta_info"]
        said = {"ids": out["output_ids"], "cached": about["cached_tokens"], "retracted": about["num_retractions"]}
        if self.logprobs:
            top = about["output_top_logprobs"]
            said["top"] = [{str(token): lp for lp, token, _ in position} for position in top]
        return said

    def tree(self) -> list[dict]:
        return self.generate(tree_prompts(), greedy(40))

    def cold(self) -> list[dict]:
        prompt = tree_prompts(seed=1)[0]
        return self.generate([prompt] * 8, greedy(24))

    def family(self) -> list[dict]:
        rng = random.Random(6)
        words = lambda n: [rng.randrange(FIRST, LAST) for _ in range(n)]  # noqa: E731
        shared = words(900)
        prompts = [[*shared, *words(1 + 7 * i)] for i in range(8)]
        return self.generate([*prompts[:3], words(40), *prompts[3:], words(50)], greedy(16))

    def samples(self) -> list[dict]:
        return self.generate(tree_prompts(seed=2)[:3], greedy(24, n=4))

    def beams(self) -> list[dict]:
        """The best beam of each prompt; SGLang gives no log-probabilities of beams."""
        params = greedy(24, beam_width=4, n=2)
        outs = self.engine.generate(input_ids=tree_prompts(seed=5)[:2], sampling_params=params)
        return [{"ids": out["output_ids"], "top": []} for out in outs]

    def busy(self) -> list[dict]:
        return self.generate(tree_prompts(seed=3), greedy(150))

    def low(self) -> list[dict]:
        return [self.generate([prompt[:150]], greedy(80))[0] for prompt in tree_prompts(seed=7)[::8]]

    def preempted(self) -> list[dict]:
        """Outputs of the prompts of ``low`` in turn, ``at_once`` of which run while others come."""
        rng = random.Random(8)
        at_once, outs = self.preempt["at_once"], []
        for after, new in itertools.product((1, 20), (0, 1)):
            highs = [[rng.randrange(FIRST, LAST) for _ in range(self.preempt["tokens"])] for _ in range(at_once)]
            outs += self.engine.loop.run_until_complete(self._preempt(at_once, highs, after, new))
        assert all(out["meta_info"]["num_retractions"] for out in outs), "nobody was preempted"
        return [self.said(out) for out in outs]

    async def _preempt(self, at_once: int, highs: list[list[int]], after: int, new: int) -> list[dict]:
        async def one(nth: int) -> dict:
            prompt = tree_prompts(seed=7)[::8][nth][:150]
            stream = await self.engine.async_generate(
                input_ids=prompt, sampling_params=greedy(80), priority=nth, stream=True
            )
            last, parts = None, 0
            async for part in stream:
                last, parts = part, parts + 1
                if nth == 0 and parts == after:
                    params = {"sampling_params": greedy(new), "priority": 1000}
                    sent.append(asyncio.create_task(self.engine.async_generate(input_ids=highs, **params)))
            return last

        sent: list[asyncio.Task] = []
        outs = await asyncio.gather(*(one(nth) for nth in range(at_once)))
        await asyncio.gather(*sent)
        return outs

    def chats(self) -> list[dict]:
        tokenizer = self.engine.tokenizer_manager.tokenizer
        prompts = [
            tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            for chat in self.conversations
        ]
        return self.generate(prompts, greedy(24, ignore_eos=False))

    def flush(self) -> None:
        assert self.engine.flush_cache() is not None

    def abort(self) -> list[dict]:
        """The outputs of the requests that were not aborted."""
        prompts = tree_prompts(seed=4)

        async def one(i: int, prompt: list[int]) -> dict:
            more = {"return_logprob": True, "top_logprobs_num": 5} if self.logprobs else {}
            stream = await self.engine.async_generate(
                input_ids=prompt, sampling_params=greedy(60), rid=f"abort-{i:02d}", stream=True, **more
            )
            last, parts = None, 0
            async for part in stream:
                last, parts = part, parts + 1
                if i % 2 and parts == 5 + i:
                    self.engine.tokenizer_manager.abort_request(rid=f"abort-{i:02d}")
            return last

        async def all_of_them() -> list[dict]:
            return await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))

        outs = self.engine.loop.run_until_complete(all_of_them())
        assert any(out["meta_info"]["finish_reason"]["type"] == "abort" for out in outs[1::2])
        return [self.said(out) for out in outs[::2]]


def main() -> None:
    import sglang

    scenario = json.loads(sys.argv[1])
    engine = sglang.Engine(dtype="float32", random_seed=0, log_level="warning", **scenario["engine"])
    driver = Driver(engine, scenario)
    said, states = {}, {}
    for i, name in enumerate(scenario["rounds"]):
        said[f"{i}-{name}"] = getattr(driver, name)()
        states[f"{i}-{name}"] = engine.get_server_info()["internal_states"][0]["packinfer"]
    engine.shutdown()
    print("RESULT " + json.dumps({"said": said, "states": states}))


if __name__ == "__main__":
    main()
