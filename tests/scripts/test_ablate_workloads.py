"""The workloads of the ablation: who shares what, and what a prefix cache can save at best."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from ablate.workloads import (
    MAKERS,
    SIZES,
    Size,
    Turn,
    as_json,
    from_trace,
    least_prefill_tokens,
    make,
    requests_of,
)
from lib.token_traces import TraceError

SIZE = SIZES["cpu"]
ANSWER = [-1]


def shared(a: list[int], b: list[int]) -> int:
    return len(os.path.commonprefix([a, b]))


def prompts(turns: list[Turn], before: tuple[int, ...] = ()) -> list[list[int]]:
    """Parents first; answers are stood in for by one token that no workload has."""
    found = []
    for turn in turns:
        prompt = [*before, *turn.own]
        found += [prompt, *prompts(turn.then, (*prompt, *ANSWER))]
    return found


@pytest.mark.parametrize(("name", "size"), [(name, size) for size in SIZES for name in SIZES[size].workloads])
def test_every_workload_fits_its_size_and_is_the_same_twice(name: str, size: str) -> None:
    workload = make(name, SIZES[size])
    assert as_json(workload.turns) == as_json(make(name, SIZES[size]).turns)
    longest = max(map(len, prompts(workload.turns)))
    assert longest < SIZES[size].pool_tokens / 4
    assert set(prompts(workload.turns)[0]) <= set(SIZES[size].vocabulary)
    least = least_prefill_tokens(prompts(workload.turns), 0)
    assert (least < sum(map(len, prompts(workload.turns)))) == (name not in ("unrelated", "n-sampling"))


def test_every_workload_is_in_a_size() -> None:
    assert {name for size in SIZES.values() for name in size.workloads} == set(MAKERS)


def test_shared_prefix() -> None:
    p = SIZE.workloads["shared-prefix"]
    turns = make("shared-prefix", SIZE).turns
    assert [turn.new_tokens for turn in turns] == [1] * p["groups"] and requests_of(turns) == p["groups"] * (
        1 + p["prompts"]
    )
    first, *group = prompts(turns)[: 1 + p["prompts"]]
    assert len(first) == p["shared"] and {shared(first, prompt) for prompt in group} == {p["shared"]}
    assert {len(prompt) for prompt in group} == {p["shared"] + len(ANSWER) + p["own"]}
    assert shared(first, prompts(turns)[1 + p["prompts"]]) < 5


def test_nested_fork() -> None:
    p = SIZE.workloads["nested-fork"]
    turns = make("nested-fork", SIZE).turns
    assert len(turns) == p["roots"] and [len(twig.then) for twig in turns[0].then] == [p["leaves"]] * p["branches"]
    assert requests_of(turns) == p["roots"] * (1 + p["branches"] * (1 + p["leaves"]))
    leaf = prompts(turns)[2]
    assert len(leaf) == p["shared"] + p["branch"] + p["leaf"] + 2 * len(ANSWER)
    assert leaf[: p["shared"] + 1] == turns[0].own + ANSWER


def test_conversations_few_shot_samples_and_unrelated() -> None:
    p = SIZE.workloads["multi-turn"]
    found = prompts(make("multi-turn", SIZE).turns)
    assert len(found) == p["talks"] * p["turns"]
    assert shared(found[0], found[1]) == len(found[0]) and shared(found[0], found[p["turns"]]) == p["system"]
    p = SIZE.workloads["few-shot"]
    found = prompts(make("few-shot", SIZE).turns)
    assert {shared(found[0], other) for other in found[1:]} <= {p["shared"], p["shared"] + 1}
    turns = make("n-sampling", SIZE).turns
    assert {turn.samples for turn in turns} == {SIZE.workloads["n-sampling"]["n"]}
    assert requests_of(turns) == len(turns) * turns[0].samples
    found = prompts(make("unrelated", SIZE).turns)
    assert max(shared(found[0], other) for other in found[1:]) < 5


def test_a_trace_is_cut_to_the_size(tmp_path: Path) -> None:
    rows = [
        {"input_length": 600, "output_length": 500, "hash_ids": [0, i]} for i in range(1, 4)
    ] + [{"input_length": 51200, "output_length": 5, "hash_ids": list(range(100))}]  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    size = Size(range(300, 400), 4, 9999, 1, 1, {}, {"requests": 2, "limit": 2500, "new": 24})
    workload = from_trace(path, size)
    assert [(len(t.own), t.new_tokens) for t in workload.turns] == [(600, 24)] * 2
    assert 512 <= shared(*prompts(workload.turns)) < 520 and "(1 longer ones" in workload.about
    path.write_text("no trace\n")
    with pytest.raises(TraceError, match="is no trace"):
        from_trace(path, size)


def test_the_least_prefill() -> None:
    assert least_prefill_tokens([[1, 2, 3], [1, 2, 4], [5]], 0) == 5
    assert least_prefill_tokens([[1, 2, 3], [1, 2, 3]], 0) == 3
    assert least_prefill_tokens([[1, 2], [1, 2, 9, 9, 3]], 2) == 3  # 9, 9 was the first answer
    assert least_prefill_tokens([[1, 2, 3], [1]], 0) == 3
