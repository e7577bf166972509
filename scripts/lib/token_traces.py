"""Request traces as prompts of token ids, for bench_serving.py.

Two formats: Mooncake's JSON lines (``input_length``, ``output_length``, ``hash_ids``: one id for each 512 tokens of the
prompt; equal ids = equal tokens) and Azure's CSV (``ContextTokens``, ``GeneratedTokens``: lengths only, so that its
prompts share nothing). Requests keep the trace's order; its times are not used.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK_TOKENS = 512


class TraceError(Exception):
    """A trace cannot be read; the text is the one line that the user reads."""


@dataclass(frozen=True)
class TraceRequest:
    """``blocks`` names what each 512 tokens of the prompt hold: equal names, equal tokens."""

    blocks: tuple[tuple[int, ...], ...]
    input_tokens: int
    output_tokens: int


def read_trace(path: Path) -> Iterator[TraceRequest]:
    try:
        with path.open(newline="") as file:
            yield from (_mooncake(file) if path.suffix == ".jsonl" else _azure(file))
    except OSError as e:
        raise TraceError(f"{path} cannot be read: {e.strerror}") from None
    except (KeyError, TypeError, ValueError) as e:
        raise TraceError(f"{path} is no trace of Mooncake (.jsonl) or Azure (.csv): {type(e).__name__} {e}") from None


def _mooncake(lines: Iterator[str]) -> Iterator[TraceRequest]:
    for line in lines:
        row = json.loads(line)
        blocks = tuple((block,) for block in row["hash_ids"])
        if len(blocks) != -(-row["input_length"] // BLOCK_TOKENS):
            raise ValueError(f"{len(blocks)} hash_ids for {row['input_length']} tokens")
        yield TraceRequest(blocks, row["input_length"], row["output_length"])


def _azure(lines: Iterator[str]) -> Iterator[TraceRequest]:
    for i, row in enumerate(csv.DictReader(lines)):
        tokens = int(row["ContextTokens"])
        blocks = tuple((i, block) for block in range(-(-tokens // BLOCK_TOKENS)))
        yield TraceRequest(blocks, tokens, int(row["GeneratedTokens"]))


def token_ids(request: TraceRequest, vocabulary: Sequence[int]) -> list[int]:
    """The prompt, of ids from ``vocabulary``; the same in every process."""
    picks = [np.random.default_rng(block).integers(len(vocabulary), size=BLOCK_TOKENS) for block in request.blocks]
    return np.asarray(vocabulary)[np.concatenate(picks)[: request.input_tokens]].tolist()


def choose(path: Path, requests: int, limit_tokens: int) -> tuple[list[TraceRequest], int]:
    """The first ``requests`` that fit into ``limit_tokens`` with their answers, and how many had to be left out."""
    chosen: list[TraceRequest] = []
    too_long = 0
    for request in read_trace(path):
        if len(chosen) == requests:
            break
        if request.input_tokens + request.output_tokens > limit_tokens:
            too_long += 1
        else:
            chosen.append(request)
    if not chosen:
        raise TraceError(f"{path} has no request that fits into {limit_tokens} tokens")
    return chosen, too_long
