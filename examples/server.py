"""A server behind OpenAI's interface: eight chats at once behind one long system prompt, which is read once.

sglang serve --model-path MODEL --attention-backend packinfer --port 30000
python examples/server.py http://127.0.0.1:30000
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import requests

RULES = "You keep these rules. " + " ".join(f"Rule {i}: answer {i} is short." for i in range(200))
QUESTIONS = [f"What does rule {i} say?" for i in range(1, 9)]


def ask(url: str, question: str) -> str:
    messages = [{"role": "system", "content": RULES}, {"role": "user", "content": question}]
    body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": 32}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"].strip()


def main(url: str) -> None:
    ask(url, QUESTIONS[0])  # the rules are in the radix cache from here on
    with ThreadPoolExecutor(len(QUESTIONS)) as users:
        for question, answer in zip(QUESTIONS, users.map(lambda question: ask(url, question), QUESTIONS)):
            print(f"{question} {answer}")
    state = requests.get(f"{url}/server_info", timeout=30).json()["internal_states"][0]["packinfer"]
    if not state["active"]:
        sys.exit(f"packinfer is not active: {state['reason']}")
    print(f"KV tokens read: {state['kv_tokens_read']:,} instead of {state['kv_tokens_logical']:,}")


if __name__ == "__main__":
    main(*sys.argv[1:])
