"""Copying slots: the kernel (in Triton's interpreter where there is no GPU) does what its reference says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import make_packed, random_case

from packinfer_sgl.kernels.copy_slots import SlotCopier
from packinfer_sgl.kernels.reference import copy_slots
from packinfer_sgl.planning.fitting import Capacity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "head_dim", "tokens"), [(8, 128, 40), (3, 20, 17), (1, 4, 1), (2, 64, 16)])
def test_equals_its_reference(dtype: torch.dtype, heads: int, head_dim: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (4, 100, heads, head_dim * dtype.itemsize), dtype=torch.uint8, generator=generator)
    buffers = [x.clone().to(DEVICE).view(dtype) for x in bits]  # any bits, NaN too
    expected = [x.clone() for x in bits]
    # a row of SGLang's table, from some place in it
    table = torch.randperm(60, generator=generator).to(torch.int32)
    copy_slots(expected, table[3 : 3 + tokens], 60)
    SlotCopier(buffers).copy(table.to(DEVICE)[3 : 3 + tokens], 60)
    for buffer, right in zip(buffers, expected, strict=True):
        assert torch.equal(buffer.view(torch.uint8).cpu(), right)


def test_buffers_that_differ_are_refused() -> None:
    layers = [torch.zeros(8, 2, 16), torch.zeros(8, 2, 16)]
    for wrong in ([layers[0], layers[1][:, :1]], [x.transpose(1, 2) for x in layers], [torch.zeros(8, 1, 3).half()]):
        with pytest.raises(ValueError, match="layout"):
            SlotCopier(wrong)


def test_a_span_with_a_slot_is_not_read_from_the_table() -> None:
    """Half of a shared span lies at slots 500 and on: the plan's slot list says so, and the rest as before."""
    case = random_case(0, shared=[40, 40], tails=[5, 6, 7], device=DEVICE)
    plan = case.plan
    row, first, tokens, offset, _ = plan.spans[0].tolist()
    parts = [[row, first, 25, offset, -1], [row, first + 25, tokens - 25, offset + 25, 500]]
    spans = torch.cat([torch.tensor(parts, dtype=torch.int32), torch.from_numpy(plan.spans[1:])])
    plan = dataclasses.replace(plan, spans=spans.numpy())
    packed = make_packed(case, Capacity.of(plan))
    packed.load(plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    held = case.slots[row].tolist()
    got = packed.kv_slots[offset : offset + tokens].tolist()
    assert got == held[:25] + list(range(500, 500 + tokens - 25))
    row, first, tokens, offset, _ = plan.spans[-1].tolist()
    assert packed.kv_slots[offset : offset + tokens].tolist() == case.slots[row][first : first + tokens].tolist()
