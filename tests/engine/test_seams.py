"""What the plugin takes from single classes of SGLang, without a server: draft backends, layers and pools."""

from __future__ import annotations

import importlib
import json
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module", autouse=True)
def plugins() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture
def draft_factory(monkeypatch):
    """SGLang's real factory of EAGLE's draft backends, as of a server with --attention-backend packinfer."""
    from sglang.srt.speculative import draft_utils

    if hasattr(draft_utils, "attention_backends"):  # 0.5.23
        monkeypatch.setattr(draft_utils, "attention_backends", lambda: ("packinfer", "packinfer"))
    factory = object.__new__(draft_utils.DraftBackendFactory)
    factory.draft_model_runner = SimpleNamespace(device="cpu")
    factory.draft_attn_backend = None
    factory.server_args = SimpleNamespace(decode_attention_backend=None, attention_backend="packinfer")
    return factory


def make(factory, table, error="EAGLE is not supported in attention backend {backend_type}"):
    return factory._create_backend("decode_attention_backend", table, error)


def test_eagle_drafts_on_the_base_backend(draft_factory, monkeypatch):
    drafts = {"torch_native": SimpleNamespace(), "fa3": SimpleNamespace()}
    # 0.5.17 takes the backend, 0.5.23 a name with it
    nested = "stamps_children" in draft_factory._create_backend.__wrapped__.__code__.co_varnames
    table = {name: lambda n=name, d=d: (n, d) if nested else d for name, d in drafts.items()}
    assert make(draft_factory, table) is drafts["torch_native"]
    monkeypatch.setenv("PACKINFER_CONFIG", '{"base_backend": "fa3"}')
    assert make(draft_factory, table) is drafts["fa3"]
    assert set(table) == set(drafts)  # SGLang's own table stays as it is
    with pytest.raises(ValueError, match="attention backend fa3, packinfer's base backend"):
        make(draft_factory, {"torch_native": table["torch_native"]})


@pytest.mark.parametrize(("topk", "drafts"), [(1, 4), (2, 0)])
def test_chains_of_drafts(topk, drafts):
    """With one branch each draft sees those before it; more branches are a tree."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from packinfer_sgl.serving.batch_reasons import chain_drafts

    class Other(EagleVerifyInput):
        pass

    made = [kind.create_idle_input(topk, 3, 4, "cpu") for kind in (EagleVerifyInput, Other)]
    assert [chain_drafts(spec_info) for spec_info in made] == [drafts, 0]
    assert chain_drafts(None) == 0


def test_two_batch_overlap_is_refused():
    """Its halves would replay the plans with which graphs were captured."""
    from sglang.srt.server_args import ServerArgs

    from packinfer_sgl.serving.layers import UnsupportedModel, layer_reasons

    assert "enable_two_batch_overlap" in ServerArgs.__annotations__
    config = SimpleNamespace(is_encoder_decoder=False)
    runner = SimpleNamespace(device="cpu", use_mla_backend=False, model=torch.nn.Module(), model_config=config)
    runner.server_args = SimpleNamespace(dcp_size=1, enable_two_batch_overlap=True)
    with pytest.raises(UnsupportedModel, match="packinfer: --enable-two-batch-overlap gives"):
        layer_reasons(runner)


def test_a_graph_around_the_plans_is_refused(monkeypatch):
    """SGLang can capture the preparation of a step in a graph, too: the plan of the capture would run for ever."""
    from sglang.srt.environ import envs

    from packinfer_sgl.serving.layers import UnsupportedModel, layer_reasons

    if not hasattr(envs, "SGLANG_ENABLE_METADATA_GLUE_GRAPH"):
        pytest.skip("this SGLang has no such graph")
    monkeypatch.setenv("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1")
    config = SimpleNamespace(is_encoder_decoder=False)
    runner = SimpleNamespace(device="cpu", use_mla_backend=False, model=torch.nn.Module(), model_config=config)
    runner.server_args = SimpleNamespace(dcp_size=1, enable_two_batch_overlap=False)
    with pytest.raises(UnsupportedModel, match="packinfer: SGLANG_ENABLE_METADATA_GLUE_GRAPH captures"):
        layer_reasons(runner)


@pytest.mark.contract
def test_the_deterministic_mode_takes_the_name_and_keeps_the_radix_cache(model):
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    for flag in ({"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}):
        args = ServerArgs(model_path=model, attention_backend="packinfer", **flag)
        if hasattr(args, "resolve_once"):  # 0.5.23
            args.resolve_once()
        runtime_context.publish(args, role="scheduler")
        try:
            assert runtime_context.get_exec().deterministic.enable_deterministic_inference
            assert not runtime_context.get_memory().disable_radix_cache
        finally:
            runtime_context.reset_context()


REFUSED = {
    "not Hopper": ({}, "fa3", "{}", False, "packed decode keeps bits on Hopper GPUs only"),
    "over triton": ({}, "triton", "{}", True, "it runs over fa3, .* not over triton; choose fa3"),
    "extend on": (
        {},
        "fa3",
        '{"extend": "on"}',
        True,
        "prefill stays on fa3, and --packinfer-extend is on; leave it at auto",
    ),
    "mixed": ({"enable_mixed_chunk": True}, "fa3", "{}", True, "--enable-mixed-chunk runs some decode tokens"),
    "arena": ({}, "fa3", '{"arena_tokens": 4096}', True, "--packinfer-arena-tokens copies spans .*; leave it out"),
    "DP attention": ({}, "fa3", "{}", True, "DP attention runs .*, on fa3, .*; add --disable-prefill-cuda-graph"),
    "taken": ({}, "fa3", '{"extend": "off"}', True, None),
    "drafts": ({}, "triton", "{}", False, None),
}


class Taken(Exception):
    """The mode is taken: what follows looks at the model."""


@pytest.mark.contract
@pytest.mark.parametrize("flag", [{"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_where_the_deterministic_mode_is_refused(name, flag, model, monkeypatch, caplog):
    """By the setting, whoever gave it, and under a stock backend's name, too."""
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    from packinfer_sgl import plugin
    from packinfer_sgl.config import Config

    more, base, config, on_hopper, problem = REFUSED[name]
    monkeypatch.setattr("packinfer_sgl.kernels.tiles.is_hopper", lambda device: on_hopper)
    monkeypatch.setenv("PACKINFER_CONFIG", json.dumps({**json.loads(config), "wrap": True}))
    args = ServerArgs(model_path=model, attention_backend="triton", **flag)
    runtime_context.publish(args, role="scheduler")
    schedule = SimpleNamespace(**{"enable_mixed_chunk": False, **more})  # on a CPU SGLang turns it off
    monkeypatch.setattr(runtime_context, "get_schedule", lambda: schedule)
    monkeypatch.setattr(plugin, "_decodes_as_prefill", lambda: name == "DP attention")
    built = []
    runner = SimpleNamespace(is_draft_worker=name == "drafts", device="cpu")

    def wrapped() -> object:
        return plugin.WrappedFactory(base, lambda runner: built.append(runner))(runner)

    def look(runner: object) -> None:
        raise Taken

    monkeypatch.setattr("packinfer_sgl.serving.layers.layer_reasons", look)
    try:
        assert Config.load().wrap
        if problem is not None:
            said = next(iter(flag)).replace("_", "-")
            with pytest.raises(plugin.PluginError, match=f"^packinfer: --{said}: {problem}"):
                wrapped()
        elif name == "drafts":
            wrapped()
        else:
            with pytest.raises(Taken):
                wrapped()
    finally:
        runtime_context.reset_context()
    assert len(built) == (problem is None)
    warned = "not those of a trainer that computes them with FA3" in caplog.text
    assert warned == ("rl_on_policy_target" in flag and name == "taken")


@pytest.mark.parametrize(("enabled", "backend"), [(True, "breakable"), (True, "disabled"), (False, "breakable")])
def test_where_decodes_may_run_as_prefills(enabled, backend, monkeypatch):
    """With DP attention: 0.5.23 has them replay the graphs of prefill that other ranks replay; 0.5.17 never."""
    from sglang.srt.layers import dp_attention
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor import cuda_graph_config

    from packinfer_sgl import plugin

    monkeypatch.setattr(cuda_graph_config, "check_cuda_graph_backend", lambda *at: at == ("prefill", backend))
    monkeypatch.setattr(dp_attention, "is_dp_attention_enabled", lambda: enabled)
    assert hasattr(ScheduleBatch, "convert_decode_to_extend") == (version("sglang") != "0.5.17")
    may = enabled and backend == "breakable" and version("sglang") != "0.5.17"
    assert plugin._decodes_as_prefill() == may


def test_a_release_without_the_lists_is_refused(model, monkeypatch):
    from sglang.srt import runtime_context, server_args

    from packinfer_sgl import plugin
    from packinfer_sgl.config import Config

    monkeypatch.delattr(server_args, "add_radix_supported_deterministic_attention_backend_choices")
    plugin._add_to_deterministic()  # and nothing happens
    args = server_args.ServerArgs(model_path=model, attention_backend="triton", enable_deterministic_inference=True)
    runtime_context.publish(args, role="scheduler")
    try:
        with pytest.raises(plugin.PluginError, match="has no registry of deterministic backends"):
            plugin.check_deterministic("--x", Config(), "fa3", SimpleNamespace(device="cuda"))
    finally:
        runtime_context.reset_context()


def test_flags_reach_a_parser_whose_method_was_replaced():
    """Frameworks that start SGLang themselves prefix its flags like that."""
    import argparse
    import dataclasses

    from sglang.srt.server_args import ServerArgs

    from packinfer_sgl.config import Config, flag

    parser = argparse.ArgumentParser()
    add, names = parser.add_argument, []
    parser.add_argument = lambda *flags, **more: (names.append(flags[0]), add(f"--rl-{flags[0][2:]}", **more))
    ServerArgs.add_cli_args(parser)
    assert {flag(field.name) for field in dataclasses.fields(Config)} <= set(names)
    given = parser.parse_args(["--rl-model-path", "m", "--rl-packinfer-grouping", "single"])
    assert given.packinfer_grouping == "single"


def test_a_request_counts_how_often_its_kv_was_taken():
    """By this a batch is told from one before a retraction or a preemption."""
    from sglang.srt.managers.schedule_batch import Req

    methods = {name: method.__code__ for name, method in vars(Req).items() if hasattr(method, "__code__")}
    naming = [name for name, code in methods.items() if "retraction_count" in code.co_names]
    assert sorted(naming) == ["__init__", "reset_for_retract"]  # nowhere is it set back


def layer_and_pools():
    """Layer 1, a pool of all layers, and two where layer 0 has no KV in it: a window, or a state."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    sizes = {"size": 64, "page_size": 1, "head_num": 2, "head_dim": 16, "device": "cpu"}
    parts = {**sizes, "dtype": torch.float32, "full_attention_layer_ids": [1]}

    def layer(**more):
        return RadixAttention(4, 16, 0.25, num_kv_heads=2, layer_id=1, **more)

    def pool(dtype=torch.float32):
        return MHATokenToKVPool(**sizes, dtype=dtype, layer_num=2, enable_memory_saver=False)

    def windowed():
        return SWAKVPool(**parts, size_swa=16, swa_attention_layer_ids=[0])

    def linear():
        return HybridLinearKVPool(**parts, mamba_pool=None)

    return layer, pool, windowed, linear


def test_reasons_of_layers():
    from packinfer_sgl.reasons import LayerReason
    from packinfer_sgl.serving.layers import layer_reason

    layer, pool, windowed, linear = layer_and_pools()
    assert layer_reason(layer(logit_cap=30.0), pool()) is None
    assert layer_reason(layer(sliding_window_size=128), pool()) is LayerReason.SLIDING_WINDOW
    assert layer_reason(layer(use_irope=True), pool()) is LayerReason.SLIDING_WINDOW  # chunks of Llama 4
    assert layer_reason(layer(v_head_dim=8), pool()) is LayerReason.UNEQUAL_HEAD_DIMS
    assert layer_reason(layer(), pool(torch.float8_e5m2)) is LayerReason.KV_DTYPE
    assert layer_reason(layer(), windowed()) is None
    assert layer_reason(layer(), linear()) is None
    assert layer_reason(layer(sliding_window_size=128), windowed()) is LayerReason.SLIDING_WINDOW


@pytest.mark.parametrize(
    ("room", "name", "takes"),
    [("triton_backend", "TritonAttnBackend", True), ("flashinfer_backend", "FlashInferAttnBackend", False),
     ("torch_native_backend", "TorchNativeAttnBackend", False)],
)  # fmt: skip
def test_stock_backends_that_take_sinks(room, name, takes):
    from packinfer_sgl.serving.layers import UnsupportedModel, check_base

    backend = getattr(importlib.import_module(f"sglang.srt.layers.attention.{room}"), name)
    model, attention = torch.nn.Sequential(), torch.nn.Module()
    attention.attn = layer_and_pools()[0]()
    model.append(attention)
    runner = SimpleNamespace(model=model, device="cuda", token_to_kv_pool=SimpleNamespace(dtype=torch.bfloat16))
    check_base(backend, name, runner)  # nobody asks for sinks
    attention.sinks = torch.nn.Parameter(torch.zeros(4))
    if takes:
        check_base(backend, name, runner)
        return
    with pytest.raises(
        UnsupportedModel, match=f"packinfer: Sequential has attention sinks, which SGLang's {name} does"
    ):
        check_base(backend, name, runner)


@pytest.mark.parametrize(
    ("qo_heads", "kv_heads", "head_dim", "reason"),
    [(64, 2, 128, None), (64, 2, 64, None), (16, 1, 256, None), (33, 1, 128, "group_size"), (17, 1, 256, "group_size"),
     (8, 8, 80, "head_dim")],
)  # fmt: skip
def test_shapes_on_a_gpu(qo_heads, kv_heads, head_dim, reason):
    from sglang.srt.layers.radix_attention import RadixAttention

    from packinfer_sgl.serving.layers import layer_reason

    pool = layer_and_pools()[1](torch.bfloat16)
    pool.device = "cuda"
    assert layer_reason(RadixAttention(qo_heads, head_dim, 0.25, num_kv_heads=kv_heads, layer_id=1), pool) == reason


@pytest.mark.parametrize("kind", ["windowed", "linear"])
def test_a_full_layer_among_others_writes_to_its_own_pool(kind):
    """Where other layers have a window, their KV lies in another pool with slots of its own; where they have a state,
    the pool has fewer layers than the model."""
    from packinfer_sgl.serving.layers import full_pool
    from packinfer_sgl.serving.router import _write_kv

    layer, _, windowed, linear = layer_and_pools()
    pool, slots, kv = (windowed if kind == "windowed" else linear)(), torch.tensor([40, 7]), torch.randn(2, 2, 2, 16)
    _write_kv(pool, layer(), slots, *kv)
    assert torch.equal(pool.get_key_buffer(1)[slots], kv[0])
    assert torch.equal(pool.get_value_buffer(1)[slots], kv[1])
    (keys,) = full_pool(pool).k_buffer  # all that an arena copies
    assert torch.equal(keys[slots], kv[0])


def test_linear_layers():
    """Layers that keep a state are told apart from those whose KV is not packed."""
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool, ReqToTokenPool

    from packinfer_sgl.serving.layers import linear_layers

    pools = object.__new__(HybridReqToTokenPool), ReqToTokenPool(2, 8, "cpu", False)
    pools[0].mamba_map = {0: 0, 2: 1}
    assert [linear_layers(SimpleNamespace(req_to_token_pool=pool)) for pool in pools] == [[0, 2], []]
