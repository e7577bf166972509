"""Comparing two engines' outputs, and finding the line that says why one ended."""

from __future__ import annotations

import json
import math

import pytest
from check import determinism, rounds
from check import models as check_models
from check import runs as check_runs
from check.areas import AREAS, CHECKS, ROUNDS, SCENARIOS
from check.compare import Ran, compare
from check.copies import PROMPT, apart
from check.judge import Judge
from check.runs import last_error
from check.scenarios import Scenario


def said(ids: list[int], top: list[dict[str, float]]) -> Ran:
    return Ran(said={"0-tree": [{"ids": ids, "top": top}]})


def test_a_near_tie_has_a_gap_and_a_wrong_token_an_infinite_one():
    stock = said([5, 6, 7], [{"5": -0.1}, {"6": -0.7, "9": -0.75}, {"7": -0.1}])
    near = compare(said([5, 9, 1], [{"5": -0.12}, {"9": -0.7}, {"1": -0.1}]), stock)
    assert (near.equal, near.of, near.common) == (0, 1, 1)
    assert near.drift == pytest.approx(0.02) and near.gap == pytest.approx(0.05)
    assert compare(said([5, 4, 1], []), stock).gap == math.inf
    same = compare(stock, stock)
    assert (same.equal, same.common, same.drift, same.gap) == (1, 3, 0.0, 0.0)


def test_only_rounds_of_both_are_compared():
    more = Ran(said={"0-tree": [{"ids": [1], "top": []}], "1-samples": [{"ids": [1], "top": []}]})
    assert compare(more, Ran(said={"0-tree": [{"ids": [1], "top": []}]})).of == 1
    assert compare(more, more, ("samples",)).of == 1 and compare(more, more).of == 2


def test_what_a_round_counted():
    said = {"0-tree": [], "1-keys": [{"ids": [1]}]}
    ran = Ran(said=said, after={"tree": {"steps": 3}, "keys": {"steps": 10}})
    assert (ran.counted("tree", "steps"), ran.counted("keys", "steps")) == (3, 7)
    assert ran.answers("keys") == [{"ids": [1]}]


@pytest.mark.parametrize(
    ("groups", "found", "copies", "share", "verdict"),
    [
        (2, 2, 2, 0.3, "PASS"),
        (2, 1, 1, 0.2, "FAIL"),  # both keys in one group
        (2, 2, 1, 0.3, "FAIL"),  # two groups that read the same copy
        (2, 0, 2, 1.0, "FAIL"),  # nobody shares
        (8, 0, 8, 1.0, "PASS"),
        (8, 1, 8, 0.9, "FAIL"),  # two of eight keys in one group
    ],
)
def test_copies_of_a_prompt_are_never_one_group(groups, found, copies, share, verdict):
    state = {
        "groups": found, "rows": 8, "rows_grouped": 8 if found else 0, "packed_steps": 10,
        "kv_tokens_logical": 80 * len(PROMPT), "kv_tokens_read": int(80 * len(PROMPT) * share),
        "kv_tokens_unique": 10 * copies * len(PROMPT),
    }  # fmt: skip
    judge = Judge({"x": Ran(said={"0-keys": []}, after={"keys": state})}, 0.0)
    apart(judge, "x", "keys", groups, 8)
    assert [row.verdict for row in judge.rows] == [verdict]


def test_the_line_that_says_why():
    log = """
[2026-01-01 00:00:00] Scheduler hit an exception: Traceback (most recent call last):
  File "x.py", line 1, in f
packinfer_sgl.serving.layers.UnsupportedModel: packinfer: M uses multi-head latent attention
During handling of the above exception, another exception occurred:
KeyError: 'x'
EOFError
RuntimeError: Rank 0 scheduler died during initialization (exit code: -9)
"""
    assert last_error(log).endswith("packinfer: M uses multi-head latent attention")
    assert last_error("a\nValueError: no\nEOFError: \nError details follow\n") == "ValueError: no"
    assert last_error("all is well") == ""


def test_a_worker_that_ends_early_leaves_its_reason(tmp_path, monkeypatch):
    (tmp_path / "models" / "m").mkdir(parents=True)
    fake = tmp_path / "worker.py"
    fake.write_text("print('READY')\nraise ValueError('no such luck')\n")
    monkeypatch.setattr(check_runs, "__file__", str(fake))
    ran = check_runs.run("x", Scenario("m", {}), 21000, tmp_path)
    assert ran.problem == "while serving: ValueError: no such luck"
    fake.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(check_runs, "LIMIT_S", 1)
    ran = check_runs.run("x", Scenario("m", {}), 21000, tmp_path)
    assert ran.problem == "while starting: nothing after 1 s"


@pytest.mark.parametrize("kind", [*check_models.WRITERS, *check_models.KINDS])
def test_every_model_is_written(kind, tmp_path):
    path = check_models.write_model(kind, tmp_path)
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] and config["model_type"] and (path / "tokenizer.json").exists()


def test_every_check_has_its_scenarios_and_every_scenario_its_rounds_and_model():
    asked = {name for check in CHECKS.values() for name in check.scenarios}
    assert asked == set(SCENARIOS)
    for scenario in SCENARIOS.values():
        assert set(scenario.rounds) <= set(ROUNDS)
        assert scenario.model in {*check_models.WRITERS, *check_models.KINDS}
    for check in CHECKS.values():
        counts = {SCENARIOS[name].gpus for name in check.scenarios}
        assert check.gpus >= max(counts) or max(counts) == 1


def test_no_area_hides_what_another_has():
    for kind in ("SCENARIOS", "CHECKS", "ROUNDS"):
        names = [name for area in (*AREAS, rounds) for name in getattr(area, kind, {})]
        assert len(names) == len(set(names))


def test_bits_are_compared_within_a_kind_and_without_what_was_retracted():
    top = [{"5": -0.125}]

    def one(company: str, logprob: float = -0.125, ids: tuple[int, ...] = (5,), retracted: int = 0) -> dict:
        return {"prompt": 0, "company": company, "ids": [*ids], "top": [{"5": logprob}], "retracted": retracted}

    said = [one("alone, cold"), one("alone, warm"), one("sampled alone, cold", ids=(7,)), one("x", -0.3, retracted=1)]
    assert said[0]["top"] == top and determinism.others_than_first(said, "") == ({}, 1)
    near = math.nextafter(-0.125, 0)
    wrong, compared = determinism.others_than_first([*said, one("among siblings", near)], "")
    assert wrong == {"0 among siblings": 0} and compared == 2
    assert determinism.others_than_first([*said, one("sampled among siblings", ids=(8,))], "sampled")[0]


@pytest.mark.parametrize(
    ("ours", "fa3", "verdict"), [(-0.125, -0.125, "PASS"), (-0.3, -0.125, "FAIL"), (-0.3, -0.3, "PASS")]
)
def test_bits_that_fa3_keeps_must_be_kept(ours: float, fa3: float, verdict: str):
    def said(last: float) -> Ran:
        companies = ["alone, cold", "alone, warm", "among siblings", "the four, cold"]
        logprobs = [-0.125, -0.125, -0.125, last]
        answers = [
            {
                "prompt": 0,
                "company": kind + company,
                "ids": [5],
                "top": [{"5": x}],
                "retracted": 0,
                "cached": 2000 * warm,
            }
            for kind in ("", "sampled ")
            for company, x, warm in zip(companies, logprobs, (0, 1, 1, 0), strict=True)
        ]
        return Ran(said={"0-companies": answers}, states=[{}])

    judge = Judge({"x": said(ours), "deterministic-fa3": said(fa3)}, 0.0)
    determinism.rows(judge, "x")
    assert [row.verdict for row in judge.rows] == [verdict, verdict, "PASS", "FAIL"]  # the last: nothing is packed
