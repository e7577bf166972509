"""The Triton kernels on small shapes, in Triton's interpreter where there is no GPU.

The interpreter multiplies bf16 wrongly, so these are float32 and float16; on a GPU, where the kernels take no float32,
all are float16.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import EXTENDS, POISON, brute_force, make_packed, random_case, run_packed

from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree

FP8 = torch.float8_e4m3fn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "nothing shared": {"shared": [0, 0], "tails": [5, 33, 1]},
    "equal shares": {"shared": [0] * 4, "tails": [5, 133, 1, 70, 2], "shares": 3},
    "one row in shares": {"shared": [], "tails": [150], "shares": 4},
    "one row": {"shared": [], "tails": [70]},
    "one shared span": {"shared": [40, 40, 40], "tails": [1, 7, 3, 50]},
    "three levels": {"shared": [70, 30, 50, 0, 20], "tails": [3, 1, 9, 2, 64, 1]},
    "more queries than a tile": {"shared": [33] * 40, "tails": [2] * 41},
    "group of 5": {"shared": [40, 20, 0], "tails": [4, 9, 2, 1], "group": 5},
    "group of 7": {"shared": [40, 20, 0], "tails": [4, 9, 2, 1], "group": 7},
    "group of 1": {"shared": [65] * 20, "tails": [2] * 21, "group": 1},
    "group of 16": {"shared": [40, 40], "tails": [4, 9, 2], "group": 16, "kv_heads": 1},
    "group of 17": {"shared": [65] * 3, "tails": [2, 40, 3, 1], "group": 17, "kv_heads": 1},
    "group of 32": {"shared": [65, 0, 70], "tails": [2, 40, 3, 1], "group": 32},
    "group of 32, head_dim 128": {"shared": [65, 0], "tails": [2, 40, 3], "group": 32, "kv_heads": 1, "head_dim": 128},
    "head_dim 128": {"shared": [40, 40], "tails": [4, 9, 2], "head_dim": 128, "dtype": torch.float16},
    "head_dim 256": {"shared": [40, 40], "tails": [4, 9, 2], "head_dim": 256, "dtype": torch.float16},
    "pages of 16": {"shared": [48, 16], "tails": [4, 9, 2], "page_size": 16},
    "soft cap": {"shared": [40, 40], "tails": [4, 9, 2], "soft_cap": 0.7},
    "sinks": {"shared": [40, 20, 0], "tails": [4, 9, 2, 1], "sinks": torch.float32},
    "sinks and a soft cap": {"shared": [40, 40], "tails": [4, 9, 2], "soft_cap": 0.7, "sinks": torch.float16},
    "sinks behind pieces": {"shared": [400, 0], "tails": [4, 290, 2], "sinks": torch.float32},
    "sinks of shares": {"shared": [0] * 4, "tails": [5, 133, 1, 70, 2], "shares": 3, "sinks": torch.float32},
    "float16": {"shared": [40, 20, 0], "tails": [4, 9, 2, 1], "dtype": torch.float16},
    "FP8 KV": {"shared": [40, 20, 0], "tails": [4, 9, 2, 1], "dtype": torch.float16, "kv_dtype": FP8, "v_scale": 0.75},
    "FP8 KV in shares": {"shared": [0] * 2, "tails": [5, 73, 1], "shares": 3, "dtype": torch.float16, "kv_dtype": FP8,
                         "v_scale": 1.5, "page_size": 16, "soft_cap": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force(name: str) -> None:
    dtype = torch.float16 if DEVICE == "cuda" else CASES[name].get("dtype", torch.float32)
    case = random_case(list(CASES).index(name), device=DEVICE, **{**CASES[name], "dtype": dtype})
    if CASES[name].get("shares"):
        assert (case.plan.items[:, Col.NEXT_ITEM] >= 0).any() or len(case.plan.items) > len(case.pool_rows)
    out, lse2 = run_packed(case)
    expected, expected_lse2 = brute_force(case)
    # half precision: P is rounded to 11 bits before its product with V, and so is the output
    tolerance = 2e-3 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse2.double().cpu(), expected_lse2, rtol=tolerance, atol=tolerance)


def test_extends_of_fp8_kv_equal_brute_force() -> None:
    more = {"dtype": torch.float16, "kv_dtype": FP8, "v_scale": 0.75, "kv_heads": 1}
    case = random_case(0, device=DEVICE, **EXTENDS["riding on a prefix in pieces"], **more)
    out, lse2 = run_packed(case)
    expected, expected_lse2 = brute_force(case)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse2.double().cpu(), expected_lse2, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("sinks", [None, torch.float32], ids=["", "sinks"])
@pytest.mark.parametrize("name", EXTENDS)
def test_extends_equal_brute_force(name: str, sinks: torch.dtype | None) -> None:
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    case = random_case(0, device=DEVICE, dtype=dtype, kv_heads=1, sinks=sinks, **EXTENDS[name])
    out, lse2 = run_packed(case)
    expected, expected_lse2 = brute_force(case)
    tolerance = 2e-3 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse2.double().cpu(), expected_lse2, rtol=tolerance, atol=tolerance)


def test_sinks_are_the_only_token_of_who_sees_nothing() -> None:
    case = random_case(0, device=DEVICE, shared=[40], tails=[3, 5], dtype=torch.float16, sinks=torch.float32)
    seen_by_nobody = dataclasses.replace(case, plan=empty_items(case.plan))
    out, lse2 = run_packed(seen_by_nobody)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(lse2, (case.sinks / np.log(2)).expand_as(lse2))


def empty_items(plan: Plan) -> Plan:
    """The same without a KV token in any item."""
    items = plan.items.copy()
    items[:, [Col.A_LEN, Col.B_LEN]], items[:, Col.OPEN_ROW] = 0, -1
    return dataclasses.replace(plan, items=items)


@pytest.mark.parametrize("sinks", [torch.zeros(7), torch.zeros(8, 1), torch.zeros(8, dtype=torch.int32)], ids=str)
def test_sinks_of_another_shape_are_refused(sinks: torch.Tensor) -> None:
    case = random_case(0, device=DEVICE, shared=[40], tails=[3, 5], dtype=torch.float16)
    with pytest.raises(ValueError, match="sinks must be one float32, float16 or bfloat16 for each of 8 query heads"):
        run_packed(dataclasses.replace(case, sinks=sinks.to(DEVICE)))


@pytest.mark.parametrize("poison", [False, True], ids=["a larger plan", "poison"])
@pytest.mark.parametrize("new", [None, [4, 1, 3]], ids=["decode", "extend"])
def test_what_lies_beyond_the_arrays_of_a_plan_is_not_read(new: list[int] | None, poison: bool) -> None:
    """Loading a plan leaves there what was before: a larger plan, or anything."""
    more = {"device": DEVICE, "dtype": torch.float16, "kv_heads": 1}
    large_new = None if new is None else [5, 3, 2, 8, 1, 4, 2]
    large = random_case(1, shared=[70, 300, 50, 0, 200, 90], tails=[30, 90, 150, 20, 64, 10, 9], new=large_new, **more)
    case = random_case(2, shared=[40, 40], tails=[4, 9, 2], new=new, **more)
    limits = [dataclasses.astuple(Capacity.of(one.plan)) for one in (large, case)]
    packed = make_packed(case, Capacity(*map(max, *limits)))
    assert all(a > b for a, b in zip(*limits, strict=True))
    if poison:
        for buffer in (packed._block, packed._arrived, *packed._staging):
            buffer.fill_(POISON)
        packed._block[packed._view["header"].numel() :].neg_()
    else:
        packed.load(large.plan)
        packed.snapshot(large.req_to_token, large.pool_rows)
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    if new is None:
        packed.append(case.kv_lens, torch.stack([held[-1] for held in case.slots]))
    padding = 2  # queries past those of the plan
    q = torch.cat([case.q, case.q[:padding]])
    out, lse2 = packed.run(
        q, case.k, case.v, case.kv_lens, sm_scale=case.sm_scale, windowed=new is not None, out=torch.full_like(q, 9.0)
    )
    n = len(case.q)
    expected, expected_lse2 = brute_force(case)
    torch.testing.assert_close(out[:n].double().cpu(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse2[:n].double().cpu(), expected_lse2, rtol=2e-3, atol=2e-3)
    assert torch.equal(out[n:], torch.zeros_like(out[n:])) and (lse2[n:] == -float("inf")).all()


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``x`` with the last index of ``dim`` past 2**31 elements; the memory between is never touched."""
    strides = [*x.stride()]
    strides[dim] = -(-(2**31 + 4096) // ((x.shape[dim] - 1) * 8)) * 8
    size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    return torch.empty(size, dtype=x.dtype, device=x.device).as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("new", [None, [4, 1, 2]], ids=["decode", "extend"])
@pytest.mark.parametrize(
    ("what", "dim", "page_size"), [("kv", 1, 1), ("kv", 1, 16), ("kv", 2, 16), ("q", 1, 1), ("out", 1, 1)]
)
def test_heads_and_slots_that_lie_far_apart(what: str, dim: int, page_size: int, new: list[int] | None) -> None:
    case = random_case(
        1, device=DEVICE, shared=[48, 48], tails=[4, 9, 2], dtype=torch.float16, page_size=page_size, new=new
    )
    expected, expected_lse2 = run_packed(case)
    out = None
    if what == "kv":
        case = dataclasses.replace(case, k=far_apart(case.k, dim), v=far_apart(case.v, dim))
    elif what == "q":
        case = dataclasses.replace(case, q=far_apart(case.q, dim))
    else:
        out = far_apart(torch.full_like(case.q, float("nan")), dim)
    out, lse2 = run_packed(case, out)
    assert torch.equal(out, expected) and torch.equal(lse2, expected_lse2)


def test_an_empty_plan_leaves_zeros() -> None:
    """A rank of data-parallel attention without requests replays a captured graph: all its rows are padding."""
    case = random_case(0, device=DEVICE, shared=[40], tails=[3, 5], dtype=torch.float16)
    packed = make_packed(case, Capacity.of(case.plan))
    policy = TilePolicy((16, 4), max_split_tokens=64)
    nobody = PrefixTree.from_neighbours([], [])
    nothing = make_plan(nobody, np.zeros(0, np.int32), policy, kv_tokens_unique=0, room_tokens=0)
    for plan, pool_rows in ((case.plan, case.pool_rows), (nothing, case.pool_rows[:0])):
        packed.load(plan)
        packed.snapshot(case.req_to_token, pool_rows)
        packed.append(case.kv_lens, torch.zeros_like(case.kv_lens))
        out = torch.full_like(case.q, float("nan"))
        packed.run(case.q, case.k, case.v, case.kv_lens, sm_scale=case.sm_scale, out=out)
    assert torch.equal(out, torch.zeros_like(out))
