"""The kernel benchmark's batches: their counts, their float32 reference, and packinfer's plans of them on the CPU."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bench.kernel_inputs import Inputs
from bench.kernel_workloads import HEAD_DIM, Workload, ragged, workloads

from packinfer_sgl.kernels.cpu_attention import PackedReference
from packinfer_sgl.kernels.tiles import tile_policy
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200

WORKLOADS = {work.name.split()[0]: work for work in workloads()}


def small(work: Workload) -> Workload:
    """The same tree and kind with few tokens and heads."""
    new = [n if n == 1 else n // 8 + 2 for n in work.new]
    tails = [(tail - old) // 64 + n for tail, old, n in zip(work.tails, work.new, new)]
    return Workload(work.name, 4, 2, [t // 64 for t in work.node_tokens], work.paths, tails, new)


def test_names_are_different() -> None:
    assert len(WORKLOADS) == len(workloads())


# the study of the kernels counted these: query rows, unique and summed KV tokens, us of the bytes and of the products
@pytest.mark.parametrize(
    ("name", "kind", "queries", "unique", "summed", "bytes_us", "flops_us"),
    [
        ("D5", "decode", 64, 131072, 131072, 125.1, 2.7),
        ("D11", "decode", 512, 20480, 737280, 21.5, 15.3),
        ("P1", "extend", 7172, 11268, 269316, 38.1, 619.6),
        ("P2", "extend", 17299, 17299, 17299, 82.4, 59.8),
        ("P3", "extend", 256, 8448, 131328, 9.0, 43.5),
        ("M1", "mixed", 2108, 45281, 286945, 51.2, 397.2),
        ("M2", "mixed", 1670, 30776, 485432, 35.7, 144.2),
    ],
)
def test_counts(name: str, kind: str, queries: int, unique: int, summed: int, bytes_us: float, flops_us: float) -> None:
    work = WORKLOADS[name]
    assert (work.kind, sum(work.new), work.unique_tokens, work.kv_lens.sum()) == (kind, queries, unique, summed)
    assert (round(work.bytes_us, 1), round(work.flops_us, 1)) == (bytes_us, flops_us)
    assert work.floor_us == max(work.bytes_us, work.flops_us)
    assert work.tree().unique_tokens(work.kv_lens) == unique


def test_chunks() -> None:
    sweep = [work for name, work in WORKLOADS.items() if name.startswith("C")]
    assert {(work.new[0], int(work.kv_lens[0]) - work.new[0]) for work in sweep} == {
        (chunk, cached) for chunk in (256, 512, 1024, 2048, 4096) for cached in (0, 8192, 32768)
    }
    assert {work.kind for work in sweep} == {"extend"} and WORKLOADS["C512@32k"].kv_lens.tolist() == [33280]


def test_random_batches() -> None:
    sweep = [work for name, work in WORKLOADS.items() if name.startswith("R")]
    assert len(sweep) == 40 and [work.name for work in sweep] == [work.name for work in ragged()]
    for work in sweep:
        assert work.kind != "decode" and 1 <= len(work.new) <= 64 + 96
        prompts = [n for n in work.new if n > 1]
        assert sum(prompts) <= 20_000 and max(prompts) <= 4096
        assert all(tail >= new for tail, new in zip(work.tails, work.new))
        assert max(work.tails) <= 32768 + 4096 and max(work.node_tokens, default=0) <= 16384
        # shared by two or more; the float32 reference takes 30 times as long as products at the GPU's best
        assert all(sum(path == [i] for path in work.paths) > 1 for i in range(len(work.node_tokens)))
        assert work.flops_us <= 2000 and work.unique_tokens <= 400_000
    assert {len(work.node_tokens) > 1 for work in sweep} == {"mixed" == work.kind for work in sweep} == {True, False}
    assert any(not work.node_tokens for work in sweep)


def test_a_new_token_sees_itself_and_what_came_before() -> None:
    work = Workload("", 1, 1, [2], [[0], [], [0]], [3, 2, 1], [2, 2, 1])
    assert work.qo_indptr.tolist() == [0, 2, 4, 5]
    see_from, see_to = work.visible
    assert see_from.tolist() == [0] * 5 and see_to.tolist() == [4, 5, 1, 2, 3]


def test_the_reference_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.kernel_inputs.SCORES", 12)  # several steps for a request
    work = Workload("", 4, 2, [3], [[], [0], [0], [0]], [5, 4, 1, 2], [5, 3, 1, 1])
    x = Inputs(work, contiguous=False, device="cpu")
    shared = set(x.rows[1][:3].tolist())
    assert shared == set(x.rows[2][:3].tolist()) and not shared & set(x.rows[0].tolist())
    expected = []
    for r, slots in enumerate(x.rows):
        for nth in range(work.new[r]):
            seen = slots[: len(slots) - work.new[r] + nth + 1]
            for head in range(4):
                q = x.q[0][len(expected) // 4, head].double()
                k, v = (pool[0][seen.tolist(), head // 2].double() for pool in (x.k, x.v))
                weights = torch.exp(k @ q / math.sqrt(HEAD_DIM))
                expected.append(weights @ v / weights.sum())
    torch.testing.assert_close(x.reference(), torch.stack(expected).view(-1, 4, HEAD_DIM).float())


def run(x: Inputs, tree: PrefixTree, policy: TilePolicy) -> tuple[torch.Tensor, Plan]:
    plan = x.work.plan(tree, policy)
    slots = np.zeros(plan.kv_capacity, np.int64)
    for row, start, tokens, to, _ in plan.spans.tolist():
        slots[to : to + tokens] = x.rows[row][start : start + tokens]
    packed = PackedReference(plan, token_bytes=x.work.kv_heads * HEAD_DIM * 4)
    packed.bind(torch.from_numpy(slots), torch.from_numpy(x.work.kv_lens))
    out = torch.full(x.q[0].shape, math.nan)
    packed.run(x.q[0].float(), x.k[0], x.v[0], sm_scale=x.sm_scale, out=out)
    return out, plan


@pytest.mark.parametrize(
    "name", ["D3", "D6", "P1", "P2", "P3", "M1", "M2", "C256@0", "C1024@8k", "C4096@32k", "R4", "R17"]
)
def test_plans_are_right(name: str) -> None:
    x = Inputs(small(WORKLOADS[name]), contiguous=False, device="cpu")
    reference, tree = x.reference(), x.work.tree()
    device = tile_policy(x.work.shape, torch.device("cpu"))
    cut = TilePolicy((16, 4), max_split_tokens=8)
    riding = TilePolicy((16, 4), max_split_tokens=1 << 30, max_inline_tail_tokens=4096)
    for kept, policy in ((x.work.pruned(H200.decode_cost), device), (tree, device), (tree, riding), (tree, cut)):
        out, plan = run(x, kept, policy)
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
    assert plan.n_partials > 0 and plan.items[:, Col.B_LEN].any() == (x.work.kind != "decode")


@pytest.mark.parametrize(("name", "groups"), [("P1", 0), ("P3", 0), ("M1", 1), ("M2", 1)])
def test_whole_workloads_are_planned(name: str, groups: int) -> None:
    """Requests of a full tile of new tokens each gain nothing by the cost model: products take longer than reading."""
    work = WORKLOADS[name]
    kept = work.pruned(H200.decode_cost)
    plan = work.plan(kept, tile_policy(work.shape, torch.device("cpu")))
    assert work.tree().n_nodes == 1 and kept.n_nodes == groups
    assert work.unique_tokens <= plan.kv_tokens_read and len(plan.merge_indptr) == sum(work.new) + 1
