"""``packinfer-sgl estimate``: against small loads with known answers, a slow model of the same, and measured times."""

from __future__ import annotations

import json
import pickle
import sys
from dataclasses import replace

import pytest

from packinfer_sgl.cli import main
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.tools.estimate_batches import Step
from packinfer_sgl.tools.estimate_times import Clock, gpu_planner, read_model

SHARED, OWN, ROWS = 2000, 64, 64


def prompts(shared: int, own: int, rows: int, tokens: int = 256, **more: object) -> str:
    lines = [
        {"input_ids": [*range(shared), *range((i + 1) << 20, ((i + 1) << 20) + own)],
         "sampling_params": {"max_new_tokens": tokens}, **{name: i * step for name, step in more.items()}}
        for i in range(rows)
    ]  # fmt: skip
    return "\n".join(map(json.dumps, lines))


@pytest.fixture
def estimate(tmp_path, capsys):
    """Runs the command on a text; gives the printed JSON."""

    def run(text: str, *flags: str) -> dict:
        path = tmp_path / "load.jsonl"
        path.write_text(text)
        code = main(["estimate", str(path), "--json", *flags])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


def test_one_step_of_which_the_answer_is_known(estimate):
    row = estimate(prompts(SHARED, OWN - 1, ROWS, tokens=2), "--gpu", "cpu")["rows"][0]  # the step appends a token
    assert (row["running"], row["steps"]) == (ROWS, 1)
    assert (row["logical"], row["unique"], row["read"]) == (132096, 6096, 6096)
    # a GPU's tile holds 16 queries of 4 query heads a KV head
    row = estimate(prompts(SHARED, OWN - 1, ROWS, tokens=2), "--gpu", "h200")["rows"][0]
    assert row["read"] == SHARED * 4 + ROWS * OWN and row["ceiling"] == 132096 / 6096


def test_kv_of_8_bits(estimate):
    text = prompts(SHARED, OWN - 1, ROWS, tokens=2)
    wide, narrow = (estimate(text, "--kv-cache-dtype", dtype)["rows"][0] for dtype in ("bfloat16", "fp8_e4m3"))
    assert wide["read"] == narrow["read"] and wide["packed_ms"] == pytest.approx(narrow["packed_ms"], rel=0.05)
    assert narrow["stock_ms"] > wide["stock_ms"]  # FA3 is bound by its products


def test_tensor_parallel_ranks_and_concurrency(estimate):
    text = prompts(SHARED, OWN - 1, ROWS, tokens=2)
    one, two = (estimate(text, "--tp", tp)["rows"][0] for tp in ("1", "2"))
    assert one["read"] == two["read"] and one["stock_ms"] > 1.3 * two["stock_ms"]
    row = estimate(text, "--concurrency", "16")["rows"][0]
    assert (row["name"], row["running"], row["steps"], row["unique"]) == ("16", 16, 4, SHARED + 16 * OWN)
    # room for the prefix and the prompts and answers of ten
    row = estimate(text, "--pool-tokens", str(SHARED + 10 * (OWN + 1)))["rows"][0]
    assert row["steps"] == 7 and row["running"] == ROWS / 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (prompts(2000, 64, 64), "A gain is to be expected: "),
        (prompts(2000, 64, 64, timestamp=60), "hardly run together (1.0 at a time"),
        (prompts(0, 500, 64), "share next to nothing (1.00x)"),
        (
            '{"hash_ids": [1], "input_length": 2000, "output_length": 9}\n' * 9,
            "tells only 26% of what the prompts hold",
        ),
        (prompts(300, 1000, 64), "below 1.4x a GPU groups nothing"),
        (prompts(2000, 2000, 64, tokens=10), "answers are short for their prompts"),
        (prompts(100, 10, 32, tokens=20), "of a decode step"),
    ],
)
def test_the_sentence(estimate, text, says):
    assert says in estimate(text)["verdict"]


# output tokens per second of docs/measurements.md: shared, own, type of KV, packinfer, fa3
@pytest.mark.parametrize(
    ("shared", "own", "kv", "packinfer", "fa3"),
    [(16000, 64, "auto", 8345, 2492), (2000, 64, "auto", 10360, 7640), (0, 2000, "auto", 6601, 6594),
     (16000, 64, "fp8_e4m3", 8227, 2185)],
)  # fmt: skip
def test_times_against_those_that_were_measured(estimate, shared, own, kv, packinfer, fa3):
    row = estimate(prompts(shared, own, 64), "--gpu", "h200", "--kv-cache-dtype", kv)["rows"][0]
    assert 64e3 / row["packed_ms"] == pytest.approx(packinfer, rel=0.12)
    assert 64e3 / row["stock_ms"] == pytest.approx(fa3, rel=0.12)


def test_steps_are_no_slower_where_more_is_shared():
    model = read_model(None, 1)
    clock = Clock(model, H200)
    stock, packed, attention = clock.step_us(Step(rows=64, logical=10**6, unique=10**6, read=10**6, partials=0))
    assert stock == packed > attention > 0
    assert clock.step_us(Step(64, 10**6, 10**5, 10**5, 128))[1] < packed
    assert gpu_planner(model.shape, H200).cost is H200.decode_cost


def test_layers_that_decode_in_one_launch_pay_for_one():
    """4 ranks of 64 query heads and 8 KV heads."""
    model, step = read_model(None, 1), Step(64, 10**6, 10**5, 10**5, 128)
    model = replace(model, shape=AttentionShape(16, 2, 128, 2))
    assert gpu_planner(model.shape, H200).policy.tile_queries == (16,)
    slower = replace(H200, small_item_us=100.0)
    assert Clock(model, slower).step_us(step) == Clock(model, H200).step_us(step)
    later = replace(H200, extend_call_us=H200.extend_call_us + 1)
    gained = Clock(model, later).step_us(step)[1] - Clock(model, H200).step_us(step)[1]
    assert gained == pytest.approx(model.full_layers)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"head_dim": 80}, "head dimension 80"),
        ({"num_attention_heads": 66, "num_key_value_heads": 2}, "33 heads a KV head"),
        ({"head_dim": 256, "num_attention_heads": 64, "num_key_value_heads": 2}, "32 heads a KV head"),
        ({"layer_types": ["sliding_attention"] * 2}, "no layer of the model has full attention"),
        ({"hidden_size": None}, "does not say"),
    ],
)
def test_models_that_are_not_packed(tmp_path, capsys, changes, says):
    config = {"hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32, "intermediate_size": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 128, "vocab_size": 1, **changes}))
    (tmp_path / "load.jsonl").write_text(prompts(10, 1, 2))
    assert main(["estimate", str(tmp_path / "load.jsonl"), "--model", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_parameters_of_models():
    """By the names that they are known by: Llama-3-8B, without its input embeddings; experts by their number."""
    assert read_model(None, 1).active_params == pytest.approx(8.03e9 - 0.525e9, rel=0.01)


def test_parameters_of_a_mixture_of_experts(tmp_path):
    qwen3_30b_a3b = {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(qwen3_30b_a3b))
    model = read_model(tmp_path, 1)
    assert model.dense_params + model.expert_params == pytest.approx(30.5e9 - 0.3e9, rel=0.02)
    assert model.active_params == pytest.approx(3.3e9 - 0.3e9, rel=0.1)
    assert 2 * model.active_params == pytest.approx(model.read_bytes(1))
    assert model.read_bytes(1) < model.read_bytes(16) < model.read_bytes(10**4) == pytest.approx(60.4e9, rel=0.02)


def test_for_people(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "load.jsonl").write_text(prompts(2000, 64, 300, timestamp=1))
    assert main(["estimate", str(tmp_path / "load.jsonl"), "--concurrency", "128"]) == 0
    out = capsys.readouterr().out
    assert "as logged" in out and "…" not in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path, capsys, suffix):
    pytest.importorskip("matplotlib", reason="an extra of the package")
    (tmp_path / "load.jsonl").write_text(prompts(20, 4, 8, tokens=2))
    for gpu in ("h100", "cpu"):
        drawn = tmp_path / f"{gpu}.{suffix}"
        assert main(["estimate", str(tmp_path / "load.jsonl"), "--gpu", gpu, "--plot", str(drawn)]) == 0
        assert drawn.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


def test_a_missing_matplotlib_is_one_clear_line(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    (tmp_path / "load.jsonl").write_text(prompts(20, 4, 8, tokens=2))
    assert main(["estimate", str(tmp_path / "load.jsonl"), "--plot", str(tmp_path / "p.png")]) == 1
    assert "pip install 'packinfer-sgl[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data", "flags", "says"),
    [
        ("dump.pkl", pickle.dumps([1]), [], "is a pickle, which can run code"),
        ("dump", pickle.dumps([1]), [], "--log-requests-format json"),
        ("notes.txt", b"hello\n[1, 2]\n{}\n", [], "has no requests that can be read"),
        ("many.jsonl", b'{"prompt": "a", "n": 1000000000}', [], "has no requests that can be read"),
        ("broken.json", b"[{", [], "broken.json is no JSON"),
        ("empty.jsonl", b"", [], "has no requests that can be read"),
        ("table.csv", b"a,b\n1,2\n", [], "needs the columns TIMESTAMP"),
        ("one.jsonl", b'{"prompt": "a", "max_tokens": 1}', [], "nothing decodes"),
        ("half.jsonl", b'{"prompt": "a", "created": 1}\n{"prompt": "b"}', [], "for some of its requests only"),
        ("timed.jsonl", prompts(9, 9, 3, timestamp=1).encode(), ["--gpu", "cpu"], "--ms-per-token"),
        ("plot.jsonl", b'{"prompt": "a"}', ["--plot", "a.pdf"], "draws .png and .svg"),
        ("words.jsonl", b'{"prompt": "a"}', ["--tokenizer", "nowhere"], "is no tokenizer.json"),
        ("model.jsonl", b'{"prompt": "a"}', ["--model", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, name, data, flags, says):
    (tmp_path / name).write_bytes(data)
    assert main(["estimate", str(tmp_path / name), *flags]) == 1
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and out == ""
