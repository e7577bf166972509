"""What the kernel benchmark asks of FA3 and FlashInfer is its workloads' attention, by their conventions."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import fake_attention
import pytest
import torch
from bench.kernel_baselines import baselines, in_fixed_splits
from bench.kernel_inputs import Inputs
from bench.kernel_report import family
from test_kernel_workloads import WORKLOADS, small

from packinfer_sgl.planning.plan import Col
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.profiles import H200

FAMILIES = {"fa3", "fi", "cascade", "batch", "pod"}


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pytest.importorskip("flashinfer", reason="FlashInfer is not installed")
    monkeypatch.setattr("bench.kernel_baselines.workspace", lambda x: None)
    monkeypatch.setattr(fake_attention.Wrapper, "flashinfer", real, raising=False)
    wrappers = {wrapper.name: wrapper for wrapper in fake_attention.WRAPPERS}
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**wrappers))
    names = ("flash_attn_with_kvcache", "get_scheduler_metadata")
    fa3 = SimpleNamespace(**{name: getattr(fake_attention, name) for name in names})
    monkeypatch.setitem(sys.modules, "sgl_kernel", SimpleNamespace(merge_state_v2=fake_attention.merge))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", fa3)


PREFILL = {"FA3", "FlashInfer prefill", "FlashInfer BatchAttention"}
CASCADES = {"FA3 twice + merge", "FlashInfer cascade"}


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize(
    ("name", "families"),
    [
        ("D2", {"FA3", "FlashInfer decode"} | CASCADES),
        ("D3", {"FA3", "FlashInfer decode"} | CASCADES),
        ("P1", PREFILL | CASCADES),
        ("P2", PREFILL),
        ("M1", PREFILL | {"FlashInfer BatchPOD", "FA3 twice + merge"}),
        ("M2", PREFILL | CASCADES | {"FlashInfer BatchPOD"}),
        ("C1024@8k", PREFILL),
    ],
)
def test_baselines_are_right(name: str, families: set[str], contiguous: bool) -> None:
    work = small(WORKLOADS[name])
    x = Inputs(work, contiguous, device="cpu")
    reference = x.reference()
    methods = baselines(x, FAMILIES)
    assert {family(method) for method in methods} == families
    paged = contiguous and all(t % 64 == 0 for t in work.node_tokens)
    assert any(method.endswith("page 16") for method in methods) == paged
    for method, make in methods.items():
        call, outs = make()
        call(1)
        call(0)
        out = torch.cat(outs[0]) if isinstance(outs[0], tuple) else outs[0]
        wrong = (out.float() - reference).norm() / reference.norm()
        assert wrong < 0.005, (method, wrong)


@pytest.mark.parametrize("contiguous", [False, True])
def test_baselines_in_fixed_splits_are_right(contiguous: bool) -> None:
    work = small(WORKLOADS["D2"])
    x = Inputs(work, contiguous, device="cpu")
    methods = in_fixed_splits(x, FAMILIES, 128)
    assert {family(method) for method in methods} == {"FA3", "FlashInfer decode"}
    for method, make in methods.items():
        call, outs = make()
        call(0)
        assert (outs[0].float() - x.reference()).norm() / x.reference().norm() < 0.005, method


def test_packinfer_in_units() -> None:
    work = small(WORKLOADS["D2"])
    policy = TilePolicy((16,), 1 << 30, unit_tokens=8)
    plan = work.unit_plan(H200.decode_cost, policy)
    assert not (plan.items[:, Col.A_POS] % 8).any() and plan.items[:, Col.A_LEN].max() == 8
    assert plan.kv_tokens_read < plan.kv_tokens_logical
