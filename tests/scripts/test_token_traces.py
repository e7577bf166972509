"""A trace becomes prompts: equal hash ids are equal tokens, lengths are the trace's, every process makes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lib import token_traces
from lib.token_traces import BLOCK_TOKENS, TraceError, choose, read_trace, token_ids

VOCABULARY = range(100, 1300)
SHARED = 2 * BLOCK_TOKENS


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    rows = [
        {"timestamp": 0, "input_length": 1200, "output_length": 7, "hash_ids": [0, 1, 2]},
        {"timestamp": 9, "input_length": 1536, "output_length": 500, "hash_ids": [0, 1, 3]},
        {"timestamp": 9, "input_length": 100, "output_length": 1, "hash_ids": [4]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,600,44\n2023-11-16 18:16,600,9\n")
    return path


def prompts(path: Path) -> list[list[int]]:
    return [token_ids(request, VOCABULARY) for request in read_trace(path)]


def test_equal_hash_ids_are_equal_tokens(mooncake: Path) -> None:
    first, second, third = prompts(mooncake)
    assert first[:SHARED] == second[:SHARED]
    assert first[:BLOCK_TOKENS] != first[BLOCK_TOKENS:SHARED]
    assert first[SHARED:] != second[SHARED : len(first)]
    assert third[0:50] != first[0:50]


def test_lengths_and_vocabulary(mooncake: Path, azure: Path) -> None:
    assert [len(p) for p in prompts(mooncake)] == [1200, 1536, 100]
    assert [len(p) for p in prompts(azure)] == [600, 600]
    assert [r.output_tokens for path in (mooncake, azure) for r in read_trace(path)] == [7, 500, 1, 44, 9]
    ids = {token for p in prompts(mooncake) for token in p}
    assert ids <= set(VOCABULARY) and len(ids) > 0.7 * len(VOCABULARY)
    assert all(type(token) is int for token in prompts(mooncake)[0])  # they are sent as JSON


def test_prompts_without_hash_ids_share_nothing(azure: Path) -> None:
    first, second = prompts(azure)
    assert first[:20] != second[:20]
    assert first[:20] != first[BLOCK_TOKENS : BLOCK_TOKENS + 20]


def test_every_process_makes_the_same_prompts(mooncake: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from lib.token_traces import *\n"
        "print([token_ids(r, range(100, 1300)) for r in read_trace(Path(sys.argv[1]))])"
    )
    command = [sys.executable, "-c", code, str(mooncake), str(Path(token_traces.__file__).parents[1])]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == prompts(mooncake)


def test_the_first_requests_that_fit_are_chosen(mooncake: Path) -> None:
    chosen, too_long = choose(mooncake, 2, 1300)
    assert [r.input_tokens for r in chosen] == [1200, 100] and too_long == 1
    chosen, too_long = choose(mooncake, 1, 10000)
    assert [r.input_tokens for r in chosen] == [1200] and too_long == 0
    with pytest.raises(TraceError, match="no request that fits into 50 tokens"):
        choose(mooncake, 2, 50)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "no json"),
        ("a.jsonl", '{"input_length": 5}'),
        ("a.jsonl", "5"),
        ("a.jsonl", '{"input_length": 513, "output_length": 1, "hash_ids": [1]}'),
        ("a.csv", "Some,Columns\n1,2"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match=r"is no trace of Mooncake \(\.jsonl\) or Azure \(\.csv\)"):
        list(read_trace(tmp_path / name))
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        list(read_trace(tmp_path / f"missing-{name}"))
