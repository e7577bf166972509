"""The deterministic mode without a GPU: the Hopper kernel's source in an emulator, over items that grow.

Its products are numpy's, which for one shape of operands have the same bits in each row wherever that stands; what the
emulator cannot show is that the GPU's do (``test_gpu_units``), and the order within Triton's merge.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gluon_cpu import Machine
from test_barriers import DECODE, TILES, Launch, check, same_bits
from unit_cases import in_company

from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import Chain, Col

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")
UNIT = 64
KINDS = {
    kind: tuple(replace(TILES[kind][0], units=True, goes_on=goes_on) for goes_on in (False, True))
    for kind in ("decode", "decode of FP8")
}
# spans of 160 and 96 tokens end within units; that of 32 is shared by two rows, one of which has
# no other unit
BATCH = {
    "shared": [180, 180, 100, 0, 40], "tails": [20, 64, 3, 130, 40, 128], "room_tokens": 8, "unit_tokens": UNIT,
}  # fmt: skip


def launch(kind: str, **more) -> Launch:
    return Launch(kind, {**BATCH, "tiles": KINDS[kind], **more})


def results(some: Launch, query: int, found: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """A query's partial results, in the order in which they are merged; or its output and lse2."""
    begin, end = some.case.plan.merge_indptr[query : query + 2].tolist()
    out, lse2, part_out, part_lse2 = found
    return [part_out[begin:end], part_lse2[begin:end]] if end > begin else [out[query], lse2[query]]


@pytest.mark.parametrize("more", [{}, {"page_size": 16}, {"soft_cap": 2.0}, {"sinks": torch.float32}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(kind: str, more: dict) -> None:
    some = launch(kind, **more)
    assert (some.case.plan.items[:, Col.OPEN_ROW] >= 0).sum() == 6
    chain = some.case.plan.items[:, Col.CHAIN]
    assert (chain == Chain.HANDS_ON).sum() == 3 and (chain == Chain.GOES_ON).sum() == 7
    assert some.case.plan.n_states == 1
    for seed in range(3):
        check(some, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_same_bits_in_any_company(kind: str) -> None:
    some = launch(kind)
    right = some.run(Machine(), 0)
    for rows, how in (([0], {}), ([3], {}), ([4, 2], {}), ([1, 0, 3, 4, 2], {"grouping": "off"}), ([2, 3, 0], {})):
        for once in (False, True):
            case = in_company(some.case, rows, UNIT, once=once, **how)
            other = launch(kind)
            other.case, other.packed = case, packed_of(case)
            found = other.run(Machine(), 1)
            for query, row in enumerate(rows):
                for a, b in zip(results(other, query, found), results(some, row, right), strict=True):
                    assert same_bits(a, b)


def packed_of(case) -> PackedCuda:
    from cases import make_packed

    packed = make_packed(case, Capacity.of(case.plan))
    packed._is_hopper = True
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    return packed


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_that_grows_is_read_up_to_now(kind: str) -> None:
    """As planned some steps ago: each warpgroup takes the length from the row's."""
    some = launch(kind)
    right = some.run(Machine(), 0)
    items = some.case.plan.items.copy()
    grows = items[:, Col.OPEN_ROW] >= 0
    items[grows, Col.A_LEN] = 1 + np.arange(grows.sum())  # whatever it was then
    some.packed.load(replace(some.case.plan, items=items))
    some.packed.snapshot(some.case.req_to_token, some.case.pool_rows)
    for seed in range(3):
        assert all(same_bits(a, b) for a, b in zip(some.run(Machine(), seed), right, strict=True))


def test_only_the_classes_of_the_mode_run_its_items() -> None:
    some = launch("decode")
    some.packed._is_hopper = False
    with pytest.raises(ValueError, match="the triton kernel runs no items that go on with a unit"):
        some.packed.load(some.case.plan)
    some.packed._is_hopper, some.packed.tiles = True, DECODE * 2
    with pytest.raises(ValueError, match="the hopper_decode kernel runs no items that go on with a unit"):
        some.packed.load(some.case.plan)
    whole = in_company(some.case, [*range(6)], UNIT, room=8, parts=False)
    assert not whole.plan.items[:, Col.CHAIN].any()
    some.packed.capacity = Capacity.unlimited()
    with pytest.raises(ValueError, match="the hopper_decode kernel runs no items that grow"):
        some.packed.load(whole.plan)
