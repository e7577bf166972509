"""Thousands of random requests against a KV pool that is far too small, with every step audited.

    python scripts/soak.py [--requests 2000] [--seed 0] [--out DIR]
    python scripts/soak.py --gpu [--kv-canary none]

A tiny model behind families of prompts that are many times the pool, so that eviction never stops, with aborts, cache
flushes and retractions. Every request must be answered, SGLang's own leak check, which runs whenever the server is
idle, must stay silent, and in each decode step the plan must read just the slots that SGLang's table has.

On the CPU there are also preemptions by requests of a higher priority, many of which generate nothing, siblings held
back, and an arena that is far too small: its books must balance, and each copy that is read must equal what it was
copied from. Answers must be those of the stock backend, up to near-ties.

On a GPU there are CUDA graphs, n samples, chunked prefill mixed with decodes, and an engine with EAGLE chains, whose
verify steps are audited, too. Answers must be those that the same server gives to each prompt alone, up to twice what
batches change in those of stock fa3, and SGLang's KV canary must stay silent. Exit code 0: all of that held.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from lib.servers import undone_at_end
from soaks import cpu, gpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="models, answers and logs; default: nothing is kept")
    parser.add_argument("--gpu", action="store_true", help="the soak of a Hopper GPU")
    parser.add_argument("--kv-canary", choices=("raise", "none"), default="raise", help="with --gpu")
    args = parser.parse_args()
    with undone_at_end() as undo:
        folder = args.out or Path(undo.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if args.gpu:
            engines = gpu.runs(folder, canary=args.kv_canary == "raise")
            problems = gpu.soak(engines, replace(gpu.LOAD, requests=args.requests, seed=args.seed), folder)
        else:
            problems = cpu.soak(args.requests, args.seed, folder)
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
