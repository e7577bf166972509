"""What ``PackedCuda`` refuses, and the constants that the kernels share with plans."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import EXTENDS, make_packed, random_case

from packinfer_sgl.kernels import columns, device_plan
from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.tiles import EXTEND_TILES, TILES
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import MAX_CLASSES, Col, Plan


def test_columns_mirror_those_of_plans() -> None:
    mirrored = {name: int(getattr(columns, name)) for name in dir(columns) if name in Col.__members__}
    assert mirrored == {name: int(Col[name]) for name in mirrored} and len(mirrored) == len(Col)
    others = [int(x) for x in (columns.SPLIT, columns.NEXT_ITEM)]
    assert sorted({*mirrored.values(), *others}) == list(range(len(Col))) == list(range(int(columns.N_COLS)))
    case = random_case(0, shared=[40], tails=[3, 5])
    assert case.plan.spans.shape[1] == columns.N_SPAN_COLS
    assert MAX_CLASSES + 1 <= columns.NEXT_TICKET.value < columns.STARTS.value


def changed(plan: Plan, item: int, column: int, value: int) -> Plan:
    items = plan.items.copy()
    items[item, column] = value
    return dataclasses.replace(plan, items=items)


def extend_buffers() -> tuple[Plan, PackedCuda]:
    case = random_case(
        0, **EXTENDS["suffixes"], kv_heads=1, head_dim=64, dtype=torch.float16, tiles=EXTEND_TILES[64]
    )  # fmt: skip
    return case.plan, make_packed(case, Capacity.of(case.plan))


@pytest.mark.parametrize(("column", "message"), [(columns.OPEN_ROW, "grow"), (columns.NEXT_ITEM, "followed")])
def test_items_that_the_extend_kernel_cannot_run_are_refused(column: int, message: str) -> None:
    plan, packed = extend_buffers()
    packed.load(plan)
    with pytest.raises(ValueError, match=f"hopper_extend kernel runs no items that .*{message}"):
        packed.load(changed(plan, len(plan.items) - 1, int(column), 0))


def test_items_that_the_hopper_decode_kernel_cannot_run_are_refused() -> None:
    case = random_case(0, shared=[40] * 40, tails=[5] * 41)
    assert case.plan.class_indptr[1] > 0
    packed, plan = make_packed(case, Capacity.of(case.plan)), changed(case.plan, 0, int(columns.OPEN_ROW), 0)
    packed.load(plan)  # the Triton kernel runs them
    packed._is_hopper = True
    packed.load(case.plan)
    with pytest.raises(ValueError, match="hopper_decode kernel runs no items that grow"):
        packed.load(plan)


@pytest.mark.parametrize("kernel", ["packed_attention_extend_kernel", "packed_attention_kernel"])
def test_run_b_has_one_signature_whatever_the_lengths_are(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up knows no lengths of rows; a request must not wait for the kernel to be compiled for them."""
    types = []
    case = random_case(
        0, **EXTENDS["suffixes"], kv_heads=1, head_dim=64, dtype=torch.float16,
        tiles=EXTEND_TILES[64] if kernel == "packed_attention_extend_kernel" else TILES[64],
    )  # fmt: skip
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    launch = {(grid,): lambda **arguments: types.append(arguments["kv_lens_ptr"].dtype) for grid in range(99)}
    monkeypatch.setattr(device_plan, kernel, launch)
    monkeypatch.setattr(PackedCuda, "_merge", lambda *args: None)
    for lens in (packed.kv_slots, case.kv_lens):
        packed.run(case.q, case.k, case.v, lens, sm_scale=1.0, windowed=True)
    assert len(types) >= 2 and set(types) == {torch.int32} and case.kv_lens.dtype == torch.int64


def test_other_tile_classes_are_refused() -> None:
    plan, packed = extend_buffers()
    with pytest.raises(ValueError, match="a plan of 2 tile classes for 1 tiles"):
        packed.load(dataclasses.replace(plan, class_indptr=np.append(plan.class_indptr, plan.class_indptr[-1])))
    with pytest.raises(ValueError, match="4 tile classes: at most 3"):
        PackedCuda(
            Capacity.of(plan), TILES[64] * 2, qo_heads=4, kv_heads=1, head_dim=64, device=torch.device("cpu")
        )  # fmt: skip


def test_a_plan_with_run_b_does_not_run_as_one_without() -> None:
    plan, packed = extend_buffers()
    packed.load(plan)
    q = torch.zeros(len(plan.merge_indptr) - 1, 4, 64, dtype=torch.float16)
    k = torch.zeros(8, 1, 64, dtype=torch.float16)
    with pytest.raises(AssertionError, match="run B"):
        packed.run(q, k, k, torch.zeros(1), sm_scale=1.0)
    with pytest.raises(ValueError, match="custom mask"):
        packed.run(q, k, k, torch.zeros(1), sm_scale=1.0, windowed=True, mask=(torch.ones(1).bool(), torch.zeros(1)))


@pytest.mark.parametrize("new", [None, [4, 1, 2]], ids=["decode", "extend"])
def test_fp8_heads_that_do_not_begin_at_16_bytes_are_refused(new: list[int] | None) -> None:
    more = {"kv_dtype": torch.float8_e4m3fn, "dtype": torch.float16, "new": new}
    case = random_case(0, shared=[48, 48], tails=[4, 9, 2], **more)
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    apart = torch.zeros(len(case.k), 2, 72).to(case.k.dtype)[..., :64]  # in float16 these would begin at 144 bytes
    for k, v in ((apart, case.v), (case.k, apart)):
        with pytest.raises(ValueError, match="multiples of 16 bytes"):
            packed.run(case.q, k, v, case.kv_lens, sm_scale=1.0, windowed=new is not None)
