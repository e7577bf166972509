"""FP8 KV: what SGLang's pools and layers look like, and what is made of their scales."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from test_refusals import runner
from test_seams import layer_and_pools

pytestmark = pytest.mark.contract
FP8 = torch.float8_e4m3fn


def scaled(make, k, v, **more):
    layer = make()
    layer.k_scale, layer.v_scale = k, v
    for name, value in more.items():
        assert hasattr(layer, name)
        setattr(layer, name, value)
    return layer


def test_reasons():
    from packinfer_sgl.reasons import LayerReason
    from packinfer_sgl.serving.layers import _kv_reason, layer_reason

    make, pool, *_ = layer_and_pools()
    assert layer_reason(make(), pool(FP8)) is None
    assert layer_reason(scaled(make, 1.0, torch.tensor(1.0)), pool(FP8)) is None
    per_head, half = torch.ones(2), torch.tensor(0.5)
    assert layer_reason(scaled(make, per_head, per_head), pool(FP8)) is LayerReason.KV_SCALES
    # torch_native, beneath packinfer on a CPU, writes and reads without scales
    assert layer_reason(scaled(make, None, half), pool(FP8)) is LayerReason.KV_SCALES
    assert layer_reason(scaled(make, half, half), pool()) is None, "scales of FP8 KV do not matter to other KV"
    assert not getattr(pool(FP8), "is_quantized_kv_cache", False)
    quantized = SimpleNamespace(dtype=FP8, device="cpu", is_quantized_kv_cache=True)
    assert _kv_reason(make(), quantized) is LayerReason.KV_DTYPE


def test_where_scales_come_from():
    """From a checkpoint: a tensor, and the number that it had. From ``--quantization-param-path``: a number."""
    from packinfer_sgl.serving.layers import LayerGate, heads_of, kv_scales
    from packinfer_sgl.serving.metrics import Stats

    make, *_ = layer_and_pools()
    assert kv_scales(make()) == (1.0, 1.0)
    assert kv_scales(scaled(make, 0.5, 0.25)) == (0.5, 0.25)
    of_checkpoint = scaled(make, torch.tensor(0.5), torch.tensor(0.25), k_scale_float=0.5, v_scale_float=0.25)
    assert kv_scales(of_checkpoint) == (0.5, 0.25)
    assert kv_scales(scaled(make, torch.tensor(0.5), torch.tensor(2.0))) == (0.5, 2.0)
    gate = LayerGate(heads_of(of_checkpoint), Stats(), [of_checkpoint])
    assert gate.scales(of_checkpoint) == (0.5, 0.25)
    assert LayerGate(heads_of(of_checkpoint), Stats()).scales(of_checkpoint) == (1.0, 1.0), "a pool of bf16"
    of_checkpoint.k_scale = torch.tensor(4.0)  # new weights; the number follows later, or never
    assert gate.scales(of_checkpoint) == (0.5, 0.25)
    assert gate.read_scales() and gate.scales(of_checkpoint) == (4.0, 0.25)
    assert not gate.read_scales()


def test_scales_are_read_again_when_the_cache_is_flushed():
    from packinfer_sgl.patches.arena import drop_copies, when_flushed

    calls = []

    class Router:
        def read_scales(self):
            calls.append(self)

    decode, prefill, gone = Router(), Router(), Router()
    for router in (decode, prefill, gone):
        when_flushed(router.read_scales)
    del gone, router
    gc.collect()
    drop_copies(False)
    drop_copies(True)
    assert calls == [decode, prefill]


def test_a_base_that_ignores_scales_is_refused_on_a_gpu():
    """On a CPU, where it is the only one, layers with scales are not packed."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    from packinfer_sgl.serving.layers import UnsupportedModel, check_base

    def over(device, dtype):
        return SimpleNamespace(
            model=torch.nn.Sequential(), device=device, token_to_kv_pool=SimpleNamespace(dtype=dtype)
        )

    native, triton = object.__new__(TorchNativeAttnBackend), object.__new__(TritonAttnBackend)
    for backend, device, dtype in ((triton, "cuda", FP8), (native, "cpu", FP8), (native, "cuda", torch.bfloat16)):
        check_base(backend, "a base", over(device, dtype))
    with pytest.raises(UnsupportedModel, match="packinfer: SGLang's torch_native ignores the scales of FP8 KV; choose"):
        check_base(native, "torch_native", over("cuda", FP8))


@pytest.mark.parametrize(("device", "dtype", "reason"), [
    ("cuda", torch.float32, "kv_dtype"), ("cuda", torch.bfloat16, None), ("cpu", torch.float32, None)
])  # fmt: skip
def test_a_float32_model_is_not_packed_on_a_gpu(device, dtype, reason):
    """The kernels there have no float32 queries; with KV of 16 bits its pool would be float32, too."""
    from packinfer_sgl.serving.layers import layer_reasons

    make, pool, *_ = layer_and_pools()
    attention = torch.nn.Module()
    attention.attn = make()
    model = torch.nn.Sequential(attention)
    found = layer_reasons(runner(device=device, dtype=dtype, model=model, token_to_kv_pool=pool(FP8)))
    assert [why and why.value for why in found.values()] == [reason]


def test_e5m2_over_fa3_is_refused(monkeypatch):
    """SGLang replaces fa3 by another backend there, by its name only."""
    from packinfer_sgl.plugin import PluginError, create_backend

    monkeypatch.setenv("PACKINFER_CONFIG", '{"base_backend": "fa3"}')
    args = SimpleNamespace(kv_cache_dtype="fp8_e5m2")
    with pytest.raises(PluginError, match="packinfer: SGLang's fa3 has no kernels for fp8_e5m2 KV; choose"):
        create_backend(runner(device="cuda", server_args=args))


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)], ids=["a number", "a tensor"])
def test_what_is_written(scale):
    """Divided by the scales, once; the pool hands out a view of its bytes. The caller's tensors are divided, too."""
    from packinfer_sgl.serving.router import _write_kv

    make, pool, *_ = layer_and_pools()
    layer, fp8, slots = scaled(make, scale, scale), pool(FP8), torch.tensor([40, 7])
    k, v = torch.randn(2, 2, 2, 16)
    given = k.clone(), v.clone()
    _write_kv(fp8, layer, slots, k, v)
    assert fp8.k_buffer[1].dtype == torch.uint8
    assert fp8.get_key_buffer(1).data_ptr() == fp8.k_buffer[1].data_ptr()
    for stored, x in zip((fp8.get_key_buffer(1), fp8.get_value_buffer(1)), given, strict=True):
        assert torch.equal(stored[slots].float(), (x / 0.5).to(FP8).float())
    assert torch.equal(k, given[0] / 0.5), "why the check gives the stock backend copies from before"
    floats = pool()
    _write_kv(floats, layer, slots, *given)
    assert torch.equal(floats.get_key_buffer(1)[slots], given[0]), "an FP8 checkpoint, KV of another dtype"
