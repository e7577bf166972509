"""What packinfer refuses, and with which line: SGLang's own parser and model configurations, and packinfer's factory.

That a server ends with such a line and leaves nothing behind is seen in test_start.py.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_seams import layer_and_pools

from packinfer_sgl.config import ENV, Config
from packinfer_sgl.patches import server_args

pytestmark = pytest.mark.contract

PACKINFER = ("--attention-backend", "packinfer")


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(autouse=True)
def no_settings(monkeypatch) -> None:
    monkeypatch.setenv(ENV, "")  # the parser's hook sets it
    monkeypatch.delenv(ENV)


def parser() -> argparse.ArgumentParser:
    """SGLang's, with the plugin's flags."""
    from sglang.srt.server_args import ServerArgs

    its = argparse.ArgumentParser()
    ServerArgs.add_cli_args(its)
    return its


def parsed(*flags: str) -> argparse.Namespace:
    return parser().parse_args(["--model-path", "none-is-read", *flags])


@pytest.mark.parametrize(
    ("flags", "env", "line"),
    [
        (("--packinfer-grouping", "off"), None, "packinfer: --packinfer-grouping needs --attention-backend packinfer"),
        (
            (*PACKINFER, "--packinfer-grouping", "some"), None,
            "packinfer: grouping is 'some'; allowed: off, single, multi",
        ),
        ((*PACKINFER, "--packinfer-wrap"), None, "packinfer: --packinfer-wrap is for a stock --attention-backend"),
        ((*PACKINFER, "--use-ray"), None, "packinfer: the schedulers of --use-ray load no plugins"),
        (("--use-ray",), '{"wrap": true}', "packinfer: the schedulers of --use-ray load no plugins"),
        (PACKINFER, "{", "packinfer: PACKINFER_CONFIG is not valid JSON"),
        (PACKINFER, '{"groping": "off"}', "packinfer: unknown setting 'groping'"),
    ],
)  # fmt: skip
def test_a_wrong_setting_on_the_command_line(flags, env, line, monkeypatch):
    from sglang.srt.server_args import ServerArgs

    if env is not None:
        monkeypatch.setenv(ENV, env)
    args = parsed(*flags)
    with pytest.raises(SystemExit) as stop:
        ServerArgs.from_cli_args(args)
    assert str(stop.value.code).startswith(line) and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("flags", "env", "given"),
    [
        (PACKINFER, None, {}),
        ((*PACKINFER, "--packinfer-hold-siblings"), None, {"hold_siblings": True}),
        ((*PACKINFER, "--packinfer-hold-siblings", "true"), None, {"hold_siblings": True}),
        ((*PACKINFER, "--packinfer-hold-siblings", "false", "--packinfer-check"), None,
         {"hold_siblings": False, "check": True}),
        (("--packinfer-hold-siblings=false", *PACKINFER), '{"hold_siblings": true}', {"hold_siblings": False}),
        ((*PACKINFER, "--packinfer-check", "false"), '{"hold_siblings": false}',
         {"hold_siblings": False, "check": False}),
    ],
)  # fmt: skip
def test_what_the_model_processes_are_told(flags, env, given, monkeypatch):
    """What was given and nothing else: defaults do without where a setting that was given may not."""
    from sglang.srt.server_args import ServerArgs

    if env is not None:
        monkeypatch.setenv(ENV, env)
    args = parsed(*flags)
    server_args.check_flags(ServerArgs, args)
    assert Config.given() == given and Config.load() == Config(**given)


def test_a_setting_may_stand_in_sglangs_file_of_settings(tmp_path):
    """``--config``: SGLang writes flags with the values true and false out of it."""
    from sglang.srt.server_args import ServerArgs

    try:
        from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
    except ImportError:  # 0.5.17
        from sglang.srt.server_args_config_parser import ConfigArgumentMerger

    (tmp_path / "settings.yaml").write_text("packinfer-hold-siblings: false\npackinfer-check: true\n")
    words = ConfigArgumentMerger(parser()).merge_config_with_args(["--config", str(tmp_path / "settings.yaml")])
    args = parsed(*words, *PACKINFER)
    server_args.check_flags(ServerArgs, args)
    assert Config.given() == {"hold_siblings": False, "check": True}


def test_a_switch_takes_true_and_false_only(capsys):
    with pytest.raises(SystemExit):
        parsed(*PACKINFER, "--packinfer-hold-siblings", "off")
    assert "--packinfer-hold-siblings: must be true or false, not 'off'" in capsys.readouterr().err


def hooked() -> list[str]:
    from packinfer_sgl.plugin import hooks

    return [hook.target for hook in hooks()]


@pytest.mark.parametrize("target", hooked())
def test_a_hook_that_did_not_take(target, monkeypatch):
    from packinfer_sgl.plugin import PluginError, create_backend

    owner, _, name = target.rpartition(".")
    monkeypatch.setattr(pkgutil.resolve_name(owner), name, lambda *args, **more: None)
    with pytest.raises(PluginError) as error:
        create_backend(SimpleNamespace(device="cpu"))
    assert str(error.value).startswith(f"packinfer: cannot hook {target} (found, but the hook did not take)")
    assert "tested are 0.5.17, 0.5.23" in str(error.value)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ('{"base_backend": "fa9"}', "packinfer: base backend 'fa9' is not registered with SGLang; known: "),
        ('{"wrap": true}', "packinfer: wrap is for a stock --attention-backend"),
    ],
)
def test_a_wrong_setting_in_the_model_process(config, line, monkeypatch):
    from packinfer_sgl.plugin import PluginError, create_backend

    monkeypatch.setenv(ENV, config)
    with pytest.raises(PluginError) as error:
        create_backend(SimpleNamespace(device="cpu"))
    assert str(error.value).startswith(line)


def runner(**more: object) -> SimpleNamespace:
    """What the factory reads of a ModelRunner."""
    config = SimpleNamespace(is_encoder_decoder=False)
    args = SimpleNamespace(dcp_size=1, enable_two_batch_overlap=False)
    common = {"device": "cpu", "use_mla_backend": False, "is_draft_worker": False, "model_config": config}
    return SimpleNamespace(**{**common, "server_args": args, "model": torch.nn.Module(), **more})


def test_a_model_whose_kv_is_not_read_runs_on_the_stock_backend(model, monkeypatch):
    from sglang.srt import runtime_context
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ServerArgs

    from packinfer_sgl.plugin import create_backend
    from packinfer_sgl.serving.metrics import STATS

    for name in ("base_backend", "details", "reason"):
        monkeypatch.setattr(STATS, name, getattr(STATS, name))
    monkeypatch.setattr(STATS, "fallback_layers", {})
    layer, pool, *_ = layer_and_pools()
    with_layer = torch.nn.Module()
    with_layer.attn = layer()
    stock = object()
    monkeypatch.setitem(ATTENTION_BACKENDS, "torch_native", lambda runner: stock)
    runtime_context.publish(ServerArgs(model_path=model, attention_backend="packinfer"), role="scheduler")
    try:
        fp8 = pool(torch.float8_e5m2)
        found = create_backend(
            runner(model=torch.nn.Sequential(with_layer), token_to_kv_pool=fp8, req_to_token_pool=None)
        )
    finally:
        runtime_context.reset_context()
    state = STATS.as_dict()
    assert found is stock and state["active"] is False and state["fallback_layers"] == {"kv_dtype": 1}
    assert state["reason"] == "no attention layer of Sequential can be packed (kv_dtype)"


def refusal(folder: Path) -> str:
    """Why a model with the configuration in ``folder`` is refused, as far as SGLang's own reading of it decides."""
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner

    from packinfer_sgl.serving.layers import UnsupportedModel, layer_reasons

    assert "use_mla_backend" in ModelRunner.__init__.__code__.co_names
    config = ModelConfig(str(folder))
    fake = runner(model_config=config, use_mla_backend=config.attention_arch == AttentionArch.MLA)
    with pytest.raises(UnsupportedModel) as error:
        layer_reasons(fake)
    return str(error.value)


def vocabulary(model: str) -> int:
    return json.loads((Path(model) / "config.json").read_text())["vocab_size"]


def test_multi_head_latent_attention_is_refused(model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model) / name, tmp_path)
    config = {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 64,
        "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
        "vocab_size": vocabulary(model), "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(tmp_path).startswith("packinfer: Module uses multi-head latent attention, which packinfer never")


def test_an_encoder_decoder_model_is_refused(model, tmp_path):
    from transformers import WhisperConfig

    WhisperConfig(
        vocab_size=vocabulary(model), d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, bos_token_id=0, eos_token_id=1,
        pad_token_id=0, decoder_start_token_id=0, architectures=["WhisperForConditionalGeneration"],
    ).save_pretrained(tmp_path)  # fmt: skip
    assert refusal(tmp_path).startswith("packinfer: Module is an encoder-decoder model, which packinfer never")


def test_a_plain_model_is_looked_at_further(model):
    assert "has no attention layers" in refusal(Path(model))
