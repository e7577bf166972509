"""Starting a server: it runs as asked, or stops with one line that says why and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faults
import psutil
import pytest
import requests
from engines import POOL, SGLANG, START_S, run_engine

SERVE = [sys.executable, "-m", "sglang.launch_server", "--host", "127.0.0.1", "--dtype", "float32"]


def start(*flags: str, env: dict[str, str] | None = None) -> subprocess.Popen:
    log = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop the server once it is full
    server = subprocess.Popen(
        [*SERVE, *flags],
        env={**os.environ, **(env or {})},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    server.log = log
    return server


def said(server: subprocess.Popen) -> str:
    server.log.seek(0)
    return server.log.read()


def refused(*flags: str, env: dict[str, str] | None = None) -> str:
    """What a server that must not start says; asserts a non-zero exit and an empty process group."""
    server = start(*flags, env=env)
    try:
        server.wait(START_S)
        assert server.returncode != 0
        deadline = time.monotonic() + 30
        while left := processes_of(server.pid):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.5)
        return said(server)
    finally:
        stop(server)


def processes_of(group: int) -> list[str]:
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(" ".join(process.cmdline()))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive


def stop(server: subprocess.Popen) -> None:
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    server.wait(30)


PACKINFER = ("--attention-backend", "packinfer", "--max-total-tokens", "4000")


@pytest.mark.parametrize(
    ("flags", "env", "line"),
    [
        pytest.param(
            ("--packinfer-grouping", "off"),
            {},
            "packinfer: --packinfer-grouping needs --attention-backend packinfer",
            marks=pytest.mark.contract,
        ),
        (
            (*PACKINFER, "--packinfer-grouping", "some"),
            {},
            "packinfer: grouping is 'some'; allowed: off, single, multi",
        ),
        ((*PACKINFER, "--packinfer-wrap"), {}, "packinfer: --packinfer-wrap is for a stock --attention-backend"),
        (PACKINFER, {"PACKINFER_CONFIG": "{"}, "packinfer: PACKINFER_CONFIG is not valid JSON"),
        (PACKINFER, {"PACKINFER_CONFIG": '{"groping": "off"}'}, "packinfer: unknown setting 'groping'"),
        ((*PACKINFER, "--packinfer-base-backend", "fa9"), {}, "packinfer: base backend 'fa9' is not registered"),
        ((*PACKINFER, "--packinfer-arena-tokens", "2001"), {}, "packinfer: --packinfer-arena-tokens must be between"),
    ],
)
def test_wrong_setting_stops_the_start(flags, env, line, model):
    output = refused("--model-path", model, *flags, env=env)
    assert line in output
    if "fa9" not in line and "arena" not in line:  # checked before anything is started: nothing else is said about it
        assert "Traceback" not in output


SEAMS = ["ForwardBatch.init_new", "ModelRunner.forward", "Scheduler.get_internal_state", "ServerArgs.add_cli_args"]


# that each hook takes is seen on both releases (doctor, and every engine that starts); that a broken one stops, by two
@pytest.mark.parametrize("seam", [*(pytest.param(seam, marks=pytest.mark.contract) for seam in SEAMS[:2]), *SEAMS[2:]])
def test_broken_seam_stops_packinfer(seam, model, tmp_path):
    output = refused("--model-path", model, *PACKINFER, env=faults.install(tmp_path, f"break-hook={seam}"))
    assert "packinfer: cannot hook sglang.srt." in output and seam in output
    assert "tested are 0.5.17, 0.5.23" in output


@pytest.mark.contract
def test_broken_seam_is_invisible_for_others(model, tmp_path):
    engine = {"model_path": model, "attention_backend": "torch_native", **POOL}
    env = faults.install(tmp_path, *(f"break-hook={seam}" for seam in SEAMS[:2]))
    result = run_engine({"engine": engine, "rounds": ["cold"]}, env)
    assert len(result["said"]["0-cold"]) == 8
    assert result["packinfer"]["active"] is False and result["packinfer"]["reason"]


@pytest.mark.contract
def test_fp8_kv_runs_on_the_stock_backend(model):
    engine = {"model_path": model, "attention_backend": "packinfer", "kv_cache_dtype": "fp8_e4m3", **POOL}
    result = run_engine({"engine": engine, "rounds": ["cold"]})
    assert len(result["said"]["0-cold"]) == 8
    state = result["packinfer"]
    assert state["active"] is False and state["packed_steps"] == 0 and state["fallback_layers"] == {"kv_dtype": 4}
    assert state["reason"] == "no attention layer of LlamaForCausalLM can be packed (kv_dtype)"


@pytest.mark.contract
@pytest.mark.skipif(SGLANG == "0.5.17", reason="0.5.17 cannot build a pool for such a model on a platform plugin")
def test_model_without_packable_layer_is_refused(model, tmp_path):
    """Multi-head latent attention: no layer can ever be packed."""
    folder = tmp_path / "mla"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model) / name, folder)
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "vocab_size": json.loads((Path(model) / "config.json").read_text())["vocab_size"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    output = refused("--model-path", str(folder), "--load-format", "dummy", *PACKINFER)
    assert "packinfer: DeepseekV2ForCausalLM uses multi-head latent attention, which packinfer never packs" in output


@pytest.mark.contract
def test_encoder_decoder_model_is_refused(model, tmp_path):
    from transformers import WhisperConfig, WhisperFeatureExtractor

    folder = tmp_path / "whisper"
    WhisperConfig(
        vocab_size=json.loads((Path(model) / "config.json").read_text())["vocab_size"],
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
        architectures=["WhisperForConditionalGeneration"],
    ).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    shutil.copy(Path(model) / "tokenizer.json", folder)
    names = {"tokenizer_class": "WhisperTokenizerFast", "processor_class": "WhisperProcessor"}
    settings = json.loads((Path(model) / "tokenizer_config.json").read_text()) | names
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    output = refused("--model-path", str(folder), "--load-format", "dummy", *PACKINFER)
    assert "packinfer: WhisperForConditionalGeneration is an encoder-decoder model, which packinfer never" in output


@pytest.mark.contract
def test_server_says_what_it_does(model):
    """One log line, /server_info and Prometheus agree, and a port in use is refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    flags = ("--model-path", model, *PACKINFER, "--port", port)
    server = start(*flags, "--enable-metrics", "--packinfer-check", "--packinfer-arena-tokens", "1000",
                   "--packinfer-hold-siblings")  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert server.poll() is None and time.monotonic() < deadline, said(server)[-3000:]
            try:
                if requests.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except (requests.ConnectionError, requests.Timeout):
                time.sleep(1)
        prompt = [400 + i % 300 for i in range(300)]
        body = {
            "input_ids": [[*prompt, 310 + i] for i in range(4)],
            "sampling_params": {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True},
        }
        for _ in range(2):
            assert requests.post(f"{url}/generate", json=body, timeout=300).status_code == 200
        state = requests.get(f"{url}/server_info", timeout=30).json()["internal_states"][0]["packinfer"]
        assert state["active"] and state["reason"] is None and state["base_backend"] == "torch_native"
        assert state["config"] == {
            "grouping": "multi", "extend": "auto", "check": True, "arena_tokens": 1000, "hold_siblings": True,
        }  # fmt: skip
        assert state["packs"] == ["decode", "extend"]
        assert state["packed_steps"] > 50 and state["plan_us_p50"] > 0
        # cold prompts are the stock backend's, what is behind a cached prefix is packed
        assert state["fallback_steps"]["extend"] >= 1 and state["packed_extends"] >= 1
        assert state["extend_kv_tokens_unique"] <= state["extend_kv_tokens_read"] < state["extend_kv_tokens_logical"]
        assert state["rows_grouped"] == 4 and state["tree"][0]["rows"] == 4 and state["tree"][0]["end"] >= 300
        assert state["kv_tokens_unique"] <= state["kv_tokens_read"] < state["kv_tokens_logical"] / 2
        metrics = requests.get(f"{url}/metrics", timeout=30).text
        values = {
            line.split("{")[0]: float(line.rsplit(" ", 1)[1])
            for line in metrics.splitlines()
            if line.startswith("packinfer:") and "reason=" not in line
        }
        for name in ("packed_steps", "packed_extends", "kv_tokens_read", "kv_tokens_logical", "kv_tokens_unique"):
            assert values[f"packinfer:{name}_total"] == state[name]
        assert values["packinfer:rows_grouped"] == 4
        arena = state["arena"]
        assert arena["tokens"] == 1000 and arena["contiguous_tokens_read"] == arena["shared_tokens_read"] > 0
        for name in ("copies", "copied_bytes", "hits", "refused", "replaced", "contiguous_tokens_read"):
            assert values[f"packinfer:arena_{name}_total"] == arena[name]
        for name in ("requests", "passes", "prefix_tokens"):
            assert values[f"packinfer:held_{name}_total"] == state["held"][name]
        assert values["packinfer:arena_used_tokens"] == arena["used_tokens"] > 0
        assert "packinfer:fallback_steps_total" in metrics
        assert refused(*flags)
    finally:
        stop(server)
    lines = [line for line in said(server).splitlines() if "packinfer 0." in line]
    assert len(lines) == 1 and "torch_native" in lines[0] and "hooks verified" in lines[0]
