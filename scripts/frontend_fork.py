"""A program in SGLang's frontend language that shares prefixes: questions about one document, or about two.

    python scripts/frontend_fork.py --url http://127.0.0.1:30000

The server's radix tree then holds each document once, for all questions about it; a prefix-aware backend also reads
them once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import sglang as sgl

SYSTEM = "You answer questions about documents, each in one short sentence."
# Each document of this repository follows on those before it, and its questions on both.
QUESTIONS = {
    "LICENSE": (
        "What is the name of this licence?",
        "What must a copy of the work include?",
        "What is a Contribution?",
        "When does the patent licence end?",
        "May I sell the work?",
    ),
    "SECURITY.md": (
        "Does it load pickles?",
        "What may it write to disk?",
        "Which commands write nothing?",
    ),
}
SELECT, CHOICES = "Which licence is it?", ("Apache", "MIT", "GPL")


@sgl.function
def ask_all(s: Any, tokens: int) -> dict[str, Any]:
    s += sgl.system(SYSTEM) + sgl.user_begin()
    asked = {}
    for name, questions in QUESTIONS.items():
        s += f"Here is a document.\n\n{(Path(__file__).parents[1] / name).read_text()}\n\n"
        asked |= zip(questions, s.fork(len(questions)))
    for question, branch in asked.items():
        branch += question + sgl.user_end() + sgl.assistant_begin()
    prompts = {question: branch.text() for question, branch in asked.items()}
    for branch in asked.values():
        branch += sgl.gen("answer", max_tokens=tokens, temperature=0, return_logprob=True, top_logprobs_num=5)
    s += SELECT + sgl.user_end() + sgl.assistant_begin() + sgl.select("choice", choices=list(CHOICES), temperature=0)
    # Plain data only: SGLang ends the thread of a branch when nothing refers to the branch any more.
    answers = {question: {"prompt": prompts[question], **outcome(asked[question], "answer")} for question in asked}
    return {"answers": answers, "select": outcome(s, "choice")}


def outcome(state: Any, name: str) -> dict[str, Any]:
    """Text and log-probabilities of a ``gen`` or ``select``, which is waited for; raises RuntimeError if it failed."""
    if state.error() is not None:
        raise RuntimeError(f"the server did not answer: {state.error()}")
    return {"text": state[name], **state.get_meta_info(name)}


def ask(url: str, tokens: int, api_key: str | None = None, chat_template: str | None = None) -> dict[str, Any]:
    """What the server says: under ``answers`` by question, and under ``select``.

    Raises OSError or RuntimeError if it does not answer.
    """
    backend = sgl.RuntimeEndpoint(url, api_key=api_key, chat_template_name=chat_template)
    return ask_all.run(tokens, backend=backend).ret_value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="an SGLang server (default %(default)s)")
    parser.add_argument("--api-key")
    parser.add_argument("--chat-template", help="its name in SGLang's frontend (default: by the model's path)")
    parser.add_argument("--tokens", type=int, default=32, help="most of each answer (default %(default)s)")
    args = parser.parse_args()
    try:
        said = ask(args.url, args.tokens, args.api_key, args.chat_template)
    except (OSError, RuntimeError) as e:
        print(f"frontend_fork.py: {args.url}: {e}", file=sys.stderr)
        return 1
    for question, answer in {**said["answers"], SELECT: said["select"]}.items():
        print(f"{question}\n    {' '.join(answer['text'].split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
