"""The router over an FP8 pool of SGLang with scales: each is applied once, and the check sees what SGLang was given."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_table import on_cuda
from strategies import attention64
from test_router import DEVICE, SHAPE, Requests, Server, Stock, behind, running, small

from packinfer_sgl.serving.backend import wrap
from packinfer_sgl.serving.layers import LayerGate, heads_of
from packinfer_sgl.serving.router import FP8_LIMIT, Router

__all__ = ["small"]
FP8 = torch.float8_e4m3fn
K_SCALE, V_SCALE = 0.5, 0.25
SLOTS = 400


class Answers(Stock):
    """Remembers the keys and values that it was given."""

    def forward_decode(self, q: torch.Tensor, k: Any, v: Any, *args: Any, **more: Any) -> torch.Tensor:
        self.given = k.clone(), v.clone()
        return self.answer

    forward_extend = forward_decode


class Fp8Server(Server):
    def __init__(self, *, check: bool) -> None:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

        super().__init__()
        self.layer = layer = RadixAttention(SHAPE.qo_heads, SHAPE.head_dim, 0.2, SHAPE.kv_heads, layer_id=0)
        layer.k_scale, layer.v_scale = torch.tensor(K_SCALE, device=DEVICE), torch.tensor(V_SCALE, device=DEVICE)
        self.pool = MHATokenToKVPool(
            size=SLOTS, page_size=1, dtype=FP8, head_num=SHAPE.kv_heads, head_dim=SHAPE.head_dim, layer_num=1,
            device=DEVICE, enable_memory_saver=False,
        )  # fmt: skip
        kv = torch.randn(2, SLOTS, SHAPE.kv_heads, SHAPE.head_dim, generator=torch.Generator().manual_seed(0)).half()
        slots = KVWriteLoc(torch.arange(SLOTS, device=DEVICE), None)
        self.pool.set_kv_buffer(layer, slots, *kv.to(DEVICE), layer.k_scale, layer.v_scale)
        paths = on_cuda(replace(SHAPE, kv_bytes=1), self.table, self.stats, SLOTS)
        gate = LayerGate(heads_of(layer), self.stats, [layer])
        gate.reason = lambda layer, pool: None  # on a CPU, where this may run, torch_native knows no scales
        self.router = Router(
            gate, self.stats, req_to_token=self.table, on_gpu=True, make_decode=paths.decode,
            extend=paths.extend(always=True), make_verify=None, check=check,
        )  # fmt: skip
        stock = Answers(self.pool.get_key_buffer(0), self.pool.get_value_buffer(0))
        stock.token_to_kv_pool = self.pool
        self.backend = wrap(stock, self.router)
        self.k = self.pool.get_key_buffer(0).float() * K_SCALE
        self.v = self.pool.get_value_buffer(0).float() * V_SCALE


def test_scales_are_applied_once() -> None:
    server, held = Fp8Server(check=False), behind(60, 5, 9)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    assert server.attend(batch, held) < 4e-3  # values below 2: two roundings to 11 bits
    assert server.stats.packed_steps == 1


def test_the_check_compares_with_what_sglang_was_given() -> None:
    server, held = Fp8Server(check=True), behind(60, 5, 9)
    batch = server.batch(held)
    with running(Requests(held)):
        server.backend.init_forward_metadata(batch)
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 5, SHAPE.kv_heads, SHAPE.head_dim, generator=generator).half().to(DEVICE)
    q = torch.randn(5, SHAPE.qo_heads * SHAPE.head_dim, generator=generator).half()
    before = k.clone(), v.clone()
    new = batch.out_cache_loc
    for buffer, x, scale in ((server.k, k, K_SCALE), (server.v, v, V_SCALE)):
        buffer[new] = (x / scale).to(FP8).float() * scale
    expected = attention64(q.view(5, SHAPE.qo_heads, -1), server.k.cpu(), server.v.cpu(), held, 0.2)[0]
    server.backend.answer = expected.flatten(1).half().to(DEVICE)
    server.backend.forward_decode(q.to(DEVICE), k, v, server.layer, batch, save_kv_cache=True)
    assert all(torch.equal(a, b) for a, b in zip(server.backend.given, before, strict=True))
    assert torch.equal(k, before[0] / K_SCALE)
    assert server.stats.check_error < 4e-3
    # a stock backend that rounds more is within the limit, one that forgets a scale is not
    server.backend.answer = server.backend.answer * (1 + FP8_LIMIT / 2)
    server.backend.forward_decode(q.to(DEVICE), *before, server.layer, batch, save_kv_cache=False)
    server.backend.answer = server.backend.answer * V_SCALE
    with pytest.raises(RuntimeError, match="off the stock backend's by"):
        server.backend.forward_decode(q.to(DEVICE), *before, server.layer, batch, save_kv_cache=False)
