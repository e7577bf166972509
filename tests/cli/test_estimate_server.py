"""What ``estimate --server`` makes of a server's metrics; tests/engine/test_start.py asks a real one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packinfer_sgl.cli import main
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.runners.cpu import decode_planner
from packinfer_sgl.tools import estimate_server
from packinfer_sgl.tools.estimate_server import LENGTHS, RUNNING, SLOTS, Look, new_look, planned_looks, prefixes

INFO = {"tp_size": 1, "disable_radix_cache": False, "internal_states": [{}]}
LABELS = 'model_name="m",tp_rank="{tp}",pp_rank="{pp}",priority="{priority}"'


class Clock:
    """Time goes by where it is slept away."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def serve(http_server, monkeypatch):
    """Starts a server with ``info`` and, one after the other, the texts ``metrics``; gives its URL."""
    monkeypatch.setattr(estimate_server, "time", Clock())

    def start(info: dict | list, *metrics: str | None) -> str:
        texts = list(metrics)

        def answer(path, headers):
            text = json.dumps(info)
            if path == "/metrics":
                text = texts.pop(0) if len(texts) > 1 else texts[0]
            return 404 if text is None else 200, text or ""

        return http_server(answer)

    return start


def metrics(running: int, logical: int, slots: int, decoded: int = 0, tp=0, pp=0, priority="") -> str:
    labels = LABELS.format(tp=tp, pp=pp, priority=priority)
    gauges = {RUNNING: running, LENGTHS: logical, SLOTS: slots}
    lines = [f"# TYPE {name} gauge\n{name}{{{labels}}} {value}.0" for name, value in gauges.items()]
    counts = {"decode": decoded, "prefill_compute": decoded / 4, "prefill_cache": decoded}
    lines += ["# TYPE sglang:realtime_tokens_total counter"]
    lines += [f'sglang:realtime_tokens_total{{{labels},mode="{mode}"}} {n}' for mode, n in counts.items()]
    return "\n".join(lines) + "\n"


def test_a_server_that_shares(serve, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    # a decode step of 8 requests, a prefill behind it, another decode step, and nothing
    texts = metrics(0, 0, 0), metrics(8, 4096, 1088, 320), metrics(9, 4096, 1100, 320), metrics(8, 4416, 1408, 640)
    url = serve(INFO, *texts, metrics(0, 4416, 0, 640))
    assert main(["estimate", "--server", url, "--gpu", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["looks"], found["kind"], found["cached"]) == (2, "server", 0.8)
    one, many = found["rows"]
    assert (one["running"], one["steps"], one["logical"]) == (8, 80, 4256)
    # two prefixes at most, for requests of 512 tokens would need as many slots for each
    assert one["read"] == one["unique"] == pytest.approx(1248, abs=7) and many["ceiling"] == pytest.approx(3.41, 0.01)
    assert len(found["notes"]) == 2 and "A gain in attention is to be expected: 3.4 times" in found["verdict"]
    assert main(["estimate", "--server", serve(INFO, *texts)]) == 0
    out = capsys.readouterr().out
    assert "2 of 80 decode steps in 30 s" in out and "80% of the prompt" in out
    assert "one prefix" in out and max(map(len, out.splitlines())) <= 80


def test_the_type_of_a_servers_kv_cache(serve, capsys):
    texts, stock_ms = [metrics(8, 4096 * step, 1088, 320 * step) for step in (1, 2)], []
    for dtype, flags in (("auto", []), ("fp8_e4m3", []), ("fp8_e4m3", ["--kv-cache-dtype", "auto"])):
        url = serve({**INFO, "kv_cache_dtype": dtype}, *texts)
        assert main(["estimate", "--server", url, "--json", *flags]) == 0
        stock_ms.append(json.loads(capsys.readouterr().out)["rows"][0]["stock_ms"])
    assert stock_ms[0] == stock_ms[2] != stock_ms[1]


def test_ranks(serve, capsys):
    """Data-parallel ranks have batches of their own, pipeline ranks the same one, priorities are parts of one."""
    both = [
        metrics(4, 400 * step, 300, 100 * step)
        + metrics(8, 800 * step, 900, 200 * step, tp=1)
        + metrics(8, 700 * step, 700, 200 * step, pp=1)
        + metrics(8, 600 * step, 700, 200 * step, priority="5")
        for step in (1, 2)
    ]
    assert main(["estimate", "--server", serve({**INFO, "tp_size": 2}, *both), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["looks"] == 2 and "2 ranks" in found["about"]
    assert (found["rows"][0]["running"], found["rows"][0]["logical"], found["rows"][0]["steps"]) == (6, 1200, 50)


@pytest.mark.parametrize(
    ("info", "text", "flags", "says"),
    [
        (INFO, None, [], "exports no metrics of SGLang: start it with --enable-metrics"),
        (INFO, "# TYPE python_info gauge\npython_info 1.0\n", [], "exports no metrics of SGLang"),
        (INFO, metrics(8, 4096, 1088), [], "decoded next to nothing within 30 s"),
        ({**INFO, "disable_radix_cache": True}, metrics(1, 1, 1), [], "runs without a radix cache"),
        ([], None, [], "is no SGLang server"),
        (INFO, metrics(1, 1, 1), ["--pool-tokens", "9"], "--pool-tokens is for files"),
        ({**INFO, "kv_cache_dtype": "fp8_e5m2"}, metrics(1, 1, 1), [], "packinfer does not pack KV in fp8_e5m2"),
    ],
)
def test_what_a_server_does_not_tell_is_one_line(serve, capsys, info, text, flags, says):
    assert main(["estimate", "--server", serve(info, text), *flags]) == 1
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""


def test_a_key_for_a_file(tmp_path, capsys):
    assert main(["estimate", str(tmp_path / "log"), "--api-key", "secret"]) == 1
    assert "--api-key goes with --server" in capsys.readouterr().err


def test_an_active_packinfer_is_noted(serve, capsys):
    info = {**INFO, "internal_states": [{"packinfer": {"active": True}}]}
    assert main(["estimate", "--server", serve(info, metrics(0, 0, 0), metrics(8, 99, 50, 9)), "--json"]) == 0
    assert "packinfer-sgl explain http" in json.loads(capsys.readouterr().out)["notes"][-1]


@pytest.mark.parametrize(
    ("running", "logical", "slots", "look"),
    [
        (16, 10784, 1800, Look(16, 10784, 1800)),
        (16, 10784, 11000, Look(16, 10784, 10784)),  # a prompt is being computed
        (16, 9000, 1800, None),  # the same step again
        (7, 13344, 928, None),  # a prefill's report, after requests had ended
        (0, 6680, 0, None),  # idle
    ],
)
def test_which_reports_are_of_a_decode_step(running, logical, slots, look):
    assert new_look({LENGTHS: 9000.0}, {RUNNING: running, LENGTHS: logical, SLOTS: slots}) == look


@given(st.integers(1, 64), st.integers(2, 5000), st.data())
def test_batches_hold_what_was_seen(running, mean, data):
    logical = running * mean - data.draw(st.integers(0, running - 1))
    look = Look(running, logical, data.draw(st.integers(-(-logical // running), logical)))
    groups = {}
    for most in (False, True):
        tree, lens = prefixes(look, most)
        tree.check_integrity()
        assert lens.sum() == look.logical
        # each prefix is shorter by a part of a token than it would have to be, and leaves each request one of its own
        off = tree.unique_tokens(lens[tree.row_order]) - look.unique
        assert 0 <= off <= 2 * running
        groups[most] = int((tree.parent == -1).sum())
    assert groups[False] <= 1 and groups[True] <= max(running // 2, 1)


def test_as_many_prefixes_as_can_be():
    tree, _ = prefixes(Look(16, 16 * 640, 4 * 640), most=True)
    assert tree.n_nodes == 4 and set((tree.row_hi - tree.row_lo).tolist()) == {4}
    one, four = (
        planned_looks([Look(16, 16 * 640, 2560)], decode_planner(AttentionShape(4, 2, 16, 4), grouping="multi"), most)[
            0
        ]
        for most in (False, True)
    )
    assert (one.rows, one.read) == (16, 2560) and four.read == pytest.approx(2560, abs=16)
