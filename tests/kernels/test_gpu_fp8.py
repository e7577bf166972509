"""FP8 KV in the kernels on a GPU, against float64 attention on the KV as it was stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import EXTENDS, Case, check_attention, make_packed, random_case, run_packed

from packinfer_sgl.kernels.tiles import FP8_TILES
from packinfer_sgl.planning.fitting import Capacity

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn
# Group, head dimension, dtype of the queries, page size, soft cap. Keys and values are converted exactly, and bf16
# queries to float16; P is float16, too. So with bf16 queries their output is what is rounded most.
FP8_SHAPES = [
    (1, 128, torch.bfloat16, 1, 0.0),
    (4, 128, torch.bfloat16, 16, 20.0),
    (5, 128, torch.bfloat16, 1, 0.0),
    (8, 128, torch.float16, 1, 0.0),
    (16, 128, torch.bfloat16, 16, 0.0),
    (4, 64, torch.bfloat16, 1, 20.0),
    (8, 64, torch.float16, 16, 0.0),
    (6, 256, torch.bfloat16, 1, 0.0),
    (8, 256, torch.bfloat16, 16, 20.0),
]
FP8_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 2e-3}


def check_fp8(case: Case, out: torch.Tensor, lse2: torch.Tensor) -> None:
    check_attention(case, out, lse2, FP8_TOLERANCE[case.q.dtype])


def fp8_case(seed: int, shape: tuple, **more):
    group, head_dim, dtype, page_size, soft_cap = shape
    return random_case(
        seed, group=group, head_dim=head_dim, dtype=dtype, page_size=page_size, soft_cap=soft_cap, kv_dtype=FP8,
        v_scale=0.75, device="cuda", **more,
    )  # fmt: skip


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_random_trees_of_fp8_kv(shape: tuple) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed * 100 + shape[0])
        n = int(rng.integers(1, 70))
        case = fp8_case(
            seed,
            shape,
            shared=[int(x) for x in rng.choice([0, 16, 64, 160, 320], n - 1)],
            tails=[int(x) for x in rng.integers(1, 300, n)],
            max_split_tokens=int(rng.choice([64, 100, 1 << 30])),
        )
        check_fp8(case, *run_packed(case))


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
@pytest.mark.parametrize("name", EXTENDS)
def test_extends_of_fp8_kv(name: str, shape: tuple) -> None:
    case = fp8_case(1, shape, **{"max_split_tokens": 300, **EXTENDS[name]})
    check_fp8(case, *run_packed(case))


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_equal_shares_of_fp8_kv(shape: tuple) -> None:
    tails = [int(x) for x in np.exp(np.random.default_rng(0).uniform(0, 8, 30))]
    case = fp8_case(0, shape, shared=[0] * 29, tails=tails, shares=41)
    check_fp8(case, *run_packed(case))


@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_masks_of_fp8_kv(shape: tuple) -> None:
    """Flags that hide what a causal mask hides: the Triton kernel with a mask agrees with the extend."""
    tails = [40, 130, 7]
    case = fp8_case(2, shape, shared=[0, 0], tails=tails, new=tails, max_split_tokens=64, tiles=FP8_TILES[shape[1]])
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    flags, starts = [], []
    for length in tails:
        starts += [sum(len(x) for x in flags) + i * length for i in range(length)]
        flags.append(torch.ones(length, length, dtype=torch.bool).tril().reshape(-1))
    mask = torch.cat(flags).cuda(), torch.tensor(starts, device="cuda")
    out, lse2 = packed.run(
        case.q, case.k, case.v, case.kv_lens, sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap,
        v_scale=case.v_scale, page_size=shape[3], windowed=True, mask=mask,
    )  # fmt: skip
    check_fp8(case, out, lse2)


@pytest.mark.parametrize("new", [None, [50] * 41], ids=["decode", "extend"])
@pytest.mark.parametrize("shape", [FP8_SHAPES[0], FP8_SHAPES[3], FP8_SHAPES[5], FP8_SHAPES[7]], ids=str)
def test_graphs_of_fp8_kv_are_repeatable(shape: tuple, new: list[int] | None) -> None:
    case = fp8_case(2, shape, shared=[300] * 40, tails=[50] * 41, max_split_tokens=64, new=new)
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    out, lse2 = torch.empty_like(case.q), torch.empty(case.q.shape[:2], device="cuda")

    def run() -> None:
        packed.run(
            case.q, case.k, case.v, case.kv_lens, sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap,
            v_scale=case.v_scale, windowed=new is not None, out=out, lse2=lse2,
        )  # fmt: skip

    run()
    check_fp8(case, out, lse2)
    first = out.clone(), lse2.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(20):
        out.fill_(float("nan"))
        lse2.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, first[0]) and torch.equal(lse2, first[1])
