"""An engine in this process: eight samples of one prompt, whose prefix is read once for all of them.

python examples/engine.py MODEL
"""

from __future__ import annotations

import sys

import sglang


def main(model: str) -> None:
    # the settings are JSON in the environment: PACKINFER_CONFIG='{"grouping": "single"}'
    engine = sglang.Engine(model_path=model, attention_backend="packinfer", log_level="error")
    try:
        prompt = "Count on from one thousand: " + " ".join(map(str, range(1000)))
        answers = engine.generate(prompt, {"n": 8, "temperature": 0.8, "max_new_tokens": 32})
        for answer in answers:
            print(answer["text"].strip())
        state = engine.get_server_info()["internal_states"][0]["packinfer"]
    finally:
        engine.shutdown()
    if not state["active"]:
        sys.exit(f"packinfer is not active: {state['reason']}")
    print(f"{state['rows_grouped']} of {state['rows']} samples in groups; ", end="")
    print(f"KV tokens read: {state['kv_tokens_read']:,} instead of {state['kv_tokens_logical']:,}")


if __name__ == "__main__":  # SGLang starts processes that import this file again
    main(*sys.argv[1:])
