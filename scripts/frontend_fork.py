"""A program in SGLang's frontend language that shares prefixes: one long prompt, eight questions, two pursued further.

    python scripts/frontend_fork.py --url http://127.0.0.1:30000

The server's radix tree then holds the notes once, for 16 requests at a time; a prefix-aware backend also reads them
once.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import sglang as sgl

QUESTIONS = (
    " where is the cold water?",
    " who has the gold?",
    " when will the ship come?",
    " which road is closed?",
    " what grows by the river?",
    " how far is the town?",
    " why did the bird leave?",
    " is the bridge strong?",
)
FOLLOW_UPS = (" say it in short:", " say why:", " say who told you:", " say it again:")
PURSUED = 2  # so many questions come with notes of their own and are asked further
CHOICES = (" the farm", " the island", " the mountain")


def notes(lines: int, seed: int) -> str:
    """About 27 tokens a line, the same each time."""
    rng = random.Random(seed)
    things = "farm bridge ship garden school river town island horse king door road field boat mill".split()
    places = "by the river, on the hill, under the stone, in the valley, near the sea, behind the wall".split(", ")
    states = "old, very quiet, full of gold, closed in winter, far from home, warm and dry, never seen".split(", ")
    return "".join(
        f"note {i}: the {rng.choice(things)} {rng.choice(places)} is {rng.choice(states)};"
        f" ask the {rng.choice(things)} {rng.choice(places)}.\n"
        for i in range(1, lines + 1)
    )


def answer(name: str, tokens: int) -> sgl.SglGen:
    return sgl.gen(name, max_tokens=tokens, temperature=0, ignore_eos=True, return_logprob=True, top_logprobs_num=5)


@sgl.function
def ask_all(s: Any, tokens: int) -> dict[str, Any]:
    s += notes(74, seed=0)
    branches = s.fork(len(QUESTIONS))
    for i, (branch, question) in enumerate(zip(branches, QUESTIONS)):
        if i < PURSUED:
            branch += notes(8, seed=1 + i)
        branch += "question:" + question + " answer:"
    deeper = [branch.fork(len(FOLLOW_UPS)) for branch in branches[:PURSUED]]
    for branch in branches:
        branch += answer("answer", tokens)
    for twigs in deeper:
        for twig, follow_up in zip(twigs, FOLLOW_UPS):
            twig += follow_up + answer("answer", tokens)
    s += "question: which place is best? answer:" + sgl.select("place", choices=list(CHOICES), temperature=0)
    # Plain data only: SGLang ends the thread of a branch when nothing refers to the branch any more.
    answers = {q: outcome(branch, "answer") for q, branch in zip(QUESTIONS, branches)}
    for question, twigs in zip(QUESTIONS, deeper):
        answers |= {question + more: outcome(twig, "answer") for more, twig in zip(FOLLOW_UPS, twigs)}
    return {"answers": answers, "select": outcome(s, "place")}


def outcome(state: Any, name: str) -> dict[str, Any]:
    """Text and log-probabilities of a ``gen`` or ``select``, which is waited for; raises RuntimeError if it failed."""
    if state.error() is not None:
        raise RuntimeError(f"the server did not answer: {state.error()}")
    return {"text": state[name], **state.get_meta_info(name)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="an SGLang server (default %(default)s)")
    parser.add_argument("--api-key")
    parser.add_argument("--tokens", type=int, default=32, help="length of each answer (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all answers and log-probabilities there")
    args = parser.parse_args()
    try:
        backend = sgl.RuntimeEndpoint(args.url, api_key=args.api_key)
        result = ask_all.run(args.tokens, backend=backend).ret_value
    except (OSError, RuntimeError) as e:
        print(f"frontend_fork.py: {args.url}: {e}", file=sys.stderr)
        return 1

    answers, place = result["answers"], result["select"]
    lengths = [a["prompt_tokens"] for a in answers.values()]
    print(f"{len(answers)} answers to prompts of {min(lengths):,} to {max(lengths):,} tokens that begin alike")
    for question in QUESTIONS:
        print(f"{question[1:]}{answers[question]['text']}")
        for more in FOLLOW_UPS:
            if question + more in answers:
                print(f"    {more[1:]}{answers[question + more]['text']}")
    print(f"select: which place is best?{place['text']}")
    if args.json:
        args.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
