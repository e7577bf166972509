"""The barriers of the Hopper kernels: right in any order of warpgroups and copies, and wrong once anything is changed.

The kernels' own source runs on the CPU (``gluon_cpu``); results are compared with attention row by row, and the bits of
one order with those of others. Each change of an arrival count, a phase, a wait or an arrival must be caught.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cases import EXTENDS, brute_force, make_packed, random_case
from gluon_cpu import Machine
from interleaving import Fault

from packinfer_sgl.kernels import columns, device_plan
from packinfer_sgl.kernels.device_plan import PackedCuda
from packinfer_sgl.kernels.reference import merge_states, with_sinks
from packinfer_sgl.kernels.tiles import Tile
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.plan import Col

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # the log of what a query that sees nothing has seen
# As in ``tiles``, but for small blocks: items have several blocks, so that stages are used again.
EXTEND = (
    Tile(
        kernel="hopper_extend", rows=128, tokens=32, stages=2, warps=0, registers=168, producer_registers=56,
        resident=1, programs=1,
    ),
)  # fmt: skip
DECODE = (
    Tile(
        kernel="hopper_decode", rows=64, tokens=32, stages=3, warps=4, registers=96, producer_registers=64, resident=1,
        programs=1,
    ),
)  # fmt: skip
TILES = {
    "extend": EXTEND, "decode": DECODE, "extend of FP8": (replace(EXTEND[0], raw_stages=1, tokens=64),),
    "decode of FP8": (replace(DECODE[0], stages=2, raw_stages=3),),
}  # fmt: skip
# at head_dim 256
OTHERS = {
    "extend": (replace(EXTEND[0], q_stages=1),),
    "decode": (replace(DECODE[0], out_parts=2),),
    "extend of FP8": (replace(EXTEND[0], raw_stages=1, tokens=64, q_stages=1),),
    "decode of FP8": (replace(DECODE[0], stages=2, raw_stages=3, out_parts=2),),
}
HEAD_DIM = 16
# In which modules the protocol is changed: of FP8 KV what differs.
MODULES = {
    "extend": ("attention_hopper_extend", "hopper_extend_producer", "hopper_extend_consumer", "hopper_common"),
    "decode": ("attention_hopper_decode", "hopper_decode_tile", "hopper_common"),
    "extend of FP8": ("hopper_extend_fp8",),
    "decode of FP8": ("hopper_decode_fp8",),
}
KERNELS = {
    "attention_hopper_extend": "packed_attention_extend_kernel",
    "attention_hopper_decode": "packed_attention_hopper_kernel",
}
BATCHES: dict[str, dict[str, Any]] = {
    # among them are items of many blocks without live rows for consumer 1
    "extend": {"shared": [90, 0], "tails": [40, 3, 190], "new": [40, 3, 9], "max_split_tokens": 130},
    "decode": {"shared": [90] * 5 + [0] * 3, "tails": [40] * 8 + [100], "max_split_tokens": 50, "room_tokens": 0},
}
# The bytes are elements of float16 here: nothing but their conversion is another.
BATCHES |= {f"{kind} of FP8": {**batch, "v_scale": 0.75} for kind, batch in BATCHES.items()}


class Launch:
    """One launch of a Hopper kernel over a random batch, to be run again and again."""

    def __init__(self, kind: str, batch: dict[str, Any], *, heads: int = 2, **more: Any) -> None:
        shape = {"head_dim": HEAD_DIM, "dtype": torch.float16, "kv_heads": heads, "room_tokens": 0}
        shape["tiles"] = TILES[kind]
        self.case = case = random_case(0, **{**shape, **batch, **more})
        self.packed = packed = make_packed(case, Capacity.of(case.plan))
        packed._is_hopper = True
        packed.load(case.plan)
        packed.snapshot(case.req_to_token, case.pool_rows)
        self.module = f"attention_hopper_{kind.partition(' ')[0]}"

    def run(self, machine: Machine, seed: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
        """out, lse2, partial results and their lse2, of which those that were not written are NaN."""
        case, packed = self.case, self.packed
        out, lse2 = torch.full(case.q.shape, torch.nan, dtype=dtype), torch.full(case.q.shape[:2], torch.nan)
        for partial in (packed._part_out, packed._part_lse2, packed._part_sum):
            partial.fill_(torch.nan)
        counts = packed._view["header"]
        counts[int(columns.NEXT_TICKET)] = 0

        def attend(**arguments: Any) -> None:
            options = ("num_warps", "maxnreg", "launch_pdl")
            flat = {
                name: x.as_strided((x.untyped_storage().nbytes() // x.itemsize - x.storage_offset(),), (1,)).numpy()
                if isinstance(x, torch.Tensor)
                else x
                for name, x in arguments.items()
                if name not in options
            }
            machine.launch(self.module, KERNELS[self.module], 3, flat, seed)

        name = KERNELS[self.module]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device_plan, name, {(2,): attend})
            patch.setattr(PackedCuda, "_merge", lambda *args: None)
            page_size = case.k.shape[1] if case.k.dim() == 4 else 1
            packed.run(
                case.q, case.k, case.v, case.kv_lens, sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap,
                v_scale=case.v_scale, page_size=page_size, windowed=case.visible is not None, sinks=case.sinks, out=out,
                lse2=lse2,
            )  # fmt: skip
        if self.module == "attention_hopper_extend":
            check_stagger(machine.events)
        if counts[int(columns.NEXT_TICKET)] != 0:
            raise Fault("tickets do not begin with 0 in the next launch")
        return out, lse2, packed._part_out.clone(), packed._part_lse2.clone()


def check_stagger(events: list[tuple[str, int, int]]) -> None:
    """Consumer 1 begins the products of an item after the first of consumer 0 is done."""
    half = EXTEND[0].rows // 2 * HEAD_DIM * 2  # bytes of each consumer's part of a Q stage
    ahead = set()  # Q stages of which consumer 0 has a product
    for what, warpgroup, place in events:
        if what == "copy":
            ahead.discard(place)
        elif what == "QK is done" and warpgroup == 0:
            ahead.add(place)
        elif what == "QK begins" and warpgroup == 1 and place - half not in ahead:
            raise Fault("consumer 1 is not behind consumer 0")


def check(launch: Launch, seed: int, dtype: torch.dtype = torch.float16) -> None:
    """The launch's results, merged, are those of attention row by row."""
    out, lse2, part_out, part_lse2 = launch.run(Machine(), seed, dtype)
    plan = launch.case.plan
    if len(plan.merged):
        indptr = torch.from_numpy(plan.merge_indptr).long()
        indptr = torch.cat([indptr[:1], indptr[plan.merged + 1]])
        of_merged = merge_states(part_out, part_lse2, torch.arange(int(indptr[-1])), indptr)
        if launch.case.sinks is not None:
            of_merged = with_sinks(*of_merged, launch.case.sinks)
        out[plan.merged], lse2[plan.merged] = of_merged[0].to(dtype), of_merged[1]
    expected, expected_lse2 = brute_force(launch.case)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse2.double(), expected_lse2, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["extend", "extend of FP8"])
@pytest.mark.parametrize("name", EXTENDS)
def test_extends_equal_brute_force(name: str, kind: str) -> None:
    launch = Launch(kind, EXTENDS[name], heads=1, v_scale=0.75 if kind == "extend of FP8" else 1.0)
    check(launch, 0)
    check(launch, 1, torch.float32)  # stored from registers, not through shared memory


@pytest.mark.parametrize("kind", ["decode", "decode of FP8"])
@pytest.mark.parametrize("seed", range(3))
def test_decode_equals_brute_force(seed: int, kind: str) -> None:
    check(Launch(kind, BATCHES[kind]), seed)


@pytest.mark.parametrize("kind", ["extend", "extend of FP8"])
@pytest.mark.parametrize(
    "more", [{}, {"page_size": 16}, {"soft_cap": 2.0}, {"group": 32}, {"sinks": torch.float32}], ids=str
)
def test_decodes_of_the_extend_kernel(kind: str, more: dict[str, Any]) -> None:
    """However long an item that grows was when it was planned."""
    launch = Launch(kind, {**BATCHES["decode"], "room_tokens": 8}, **more)
    items = launch.case.plan.items.copy()
    grows = items[:, Col.OPEN_ROW] >= 0
    items[grows, Col.A_LEN] = 1 + np.arange(grows.sum())
    for plan in (launch.case.plan, replace(launch.case.plan, items=items)):
        launch.packed.load(plan)
        launch.packed.snapshot(launch.case.req_to_token, launch.case.pool_rows)
        for seed in range(3):
            check(launch, seed)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(
    "more", [{"page_size": 16}, {"soft_cap": 2.0}, {"group": 5}, {"group": 32}, {"sinks": torch.float32}], ids=str
)
def test_pages_caps_and_groups(kind: str, more: dict[str, Any]) -> None:
    check(Launch(kind, BATCHES[kind], **more), 0)


@pytest.mark.parametrize("tiles", ["as at 128", "as at 256"])
@pytest.mark.parametrize("kind", BATCHES)
def test_the_order_does_not_matter(kind: str, tiles: str) -> None:
    more = {"tiles": OTHERS[kind]} if tiles == "as at 256" else {}
    launch, machine = Launch(kind, {**BATCHES[kind], **more}), Machine()
    check(launch, 0)
    right = launch.run(machine, 0)
    for seed in range(1, 12):
        assert all(same_bits(a, b) for a, b in zip(launch.run(machine, seed), right, strict=True))


@pytest.mark.parametrize("kind", BATCHES)
def test_fewer_items_than_ctas(kind: str) -> None:
    for rows in (1, 2):
        batch = {"shared": [0] * (rows - 1), "tails": [70] * rows, "room_tokens": 0}
        batch |= {"new": [5] * rows} if kind.startswith("extend") else {}
        for seed in range(3):
            check(Launch(kind, batch, heads=1), seed)


@pytest.mark.parametrize("kind", ["decode", "decode of FP8"])
def test_an_empty_item_leaves_the_empty_state(kind: str) -> None:
    """As of a request without KV: (0, -inf), and nobody waits for a block."""
    launch = Launch(kind, BATCHES[kind])
    right = launch.run(Machine(), 0)
    plan, items = launch.case.plan, launch.case.plan.items.copy()
    nth = int(np.flatnonzero(plan.partial_rows[items[:, Col.Q_OFF]] >= 0)[0])
    items[nth, Col.A_LEN] = 0
    launch.packed.load(replace(plan, items=items))
    launch.packed.snapshot(launch.case.req_to_token, launch.case.pool_rows)
    first, count = items[nth, Col.Q_OFF], items[nth, Col.Q_CNT]
    empty = plan.partial_rows[first : first + count] + items[nth, Col.SPLIT]
    others = np.setdiff1d(np.arange(plan.n_partials), empty)
    for seed in range(4):
        out, lse2, part_out, part_lse2 = launch.run(Machine(), seed)
        assert not part_out[empty].any() and bool((part_lse2[empty] == -torch.inf).all())
        assert same_bits(part_out[others], right[2][others]) and same_bits(part_lse2[others], right[3][others])
        assert same_bits(out, right[0]) and same_bits(lse2, right[1])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return np.array_equal(a.numpy(), b.numpy(), equal_nan=True)


# A consumer without live rows has nothing to multiply, and cannot be an item ahead: the work tile holds it back.
NOT_NEEDED = {
    "hopper_extend_consumer:10 missing: mbarrier.wait(pipe.q_full.index(q_stage), full_phase(nth_item, Q_STAGES))",
    "hopper_extend_consumer:11 missing: mbarrier.wait(pipe.stagger.index(q_stage), full_phase(nth_item, Q_STAGES))",
}
OUTPUTS = torch.float16, torch.float32

# Changes of the protocol.
Edit = Callable[[str, ast.Module], ast.Module]


def calls(tree: ast.Module) -> Iterator[ast.Expr]:
    """Statements that are a call to a barrier, as they stand in the source."""
    for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if called in CHANGES:
                yield node


def changed(call: ast.Call, how: str) -> ast.expr:
    call = copy.deepcopy(call)
    count = next((k for k in call.keywords if k.arg == "count"), None)
    if how == "missing":
        return ast.Constant(None)
    if how == "one more pending":
        call.args[0] = ast.BinOp(call.args[0], ast.Add(), ast.Constant(1))
    elif how == "other phase":
        call.args[1] = ast.BinOp(call.args[1], ast.BitXor(), ast.Constant(1))
    else:
        assert count is not None
        count.value = ast.BinOp(count.value, ast.Add(), ast.Constant({"count + 1": 1, "count - 1": -1}[how]))
    return call


CHANGES = {
    "mbarrier.init": ("count + 1", "count - 1"),
    "mbarrier.wait": ("missing", "other phase"),
    "mbarrier.arrive": ("missing", "count + 1"),
    "async_copy.mbarrier_arrive": ("missing",),
    "async_copy.commit_group": ("missing",),
    "async_copy.wait_group": ("missing", "one more pending"),
}
TEXTS = {
    ("hopper_common", "n // STAGES & 1 ^ 1", "n // STAGES & 1"),
    ("hopper_common", "return n // STAGES & 1\n", "return n % STAGES & 1\n"),
    ("hopper_extend_producer", "ticket == args.work - 1", "ticket == args.work"),
    ("hopper_extend_producer", "+ ticket", "+ ticket + 1"),
    ("hopper_extend_producer", "nth_block += 1", "nth_block += 2"),
    ("hopper_extend_consumer", "nth_block += blocks", "nth_block += 1"),
    ("hopper_extend_consumer", "next_stage = nth_item % Q_STAGES", "next_stage = 0"),
    ("attention_hopper_decode", "% STAGES", "% (STAGES - 1)"),
    ("hopper_decode_fp8", "n % RAW_STAGES", "n % (RAW_STAGES - 1)"),
    ("hopper_decode_fp8", "n >= RAW_STAGES", "n > RAW_STAGES"),
    ("hopper_decode_fp8", "n - RAW_STAGES + 1", "n - RAW_STAGES + 2"),
    ("hopper_extend_fp8", "before = (n - 1) % STAGES", "before = n % STAGES"),
}


def _changed_call(module: str, i: int, how: str) -> Edit:
    def edit(name: str, tree: ast.Module) -> ast.Module:
        if name == module:
            statement = list(calls(tree))[i]
            statement.value = changed(statement.value, how)
            ast.fix_missing_locations(tree)
        return tree

    return edit


def _replaced(module: str, old: str, new: str) -> Edit:
    def edit(name: str, tree: ast.Module) -> ast.Module:
        if name != module:
            return tree
        source = ast.unparse(tree)
        assert old in source
        return ast.parse(source.replace(old, new))

    return edit


@cache
def mutants(kind: str) -> dict[str, Edit]:
    """By name, how to edit the kernel's modules."""
    found = {}
    for module in MODULES[kind]:
        tree = Machine().parse(module)
        for i, statement in enumerate(calls(tree)):
            called = ast.unparse(statement.value.func)
            for how in CHANGES[called]:
                name = f"{module}:{i} {how}: {ast.unparse(statement)}"
                found[name] = _changed_call(module, i, how)
        for where, old, new in TEXTS:
            if where == module:
                found[f"{where}: {old!r} to {new!r}"] = _replaced(where, old, new)
    return found


@cache
def launch_and_results(kind: str) -> tuple[Launch, tuple[tuple[torch.Tensor, ...], ...]]:
    """A launch, and what it gives for each dtype of the output."""
    launch = Launch(kind, BATCHES[kind])
    return launch, tuple(launch.run(Machine(), 0, dtype) for dtype in OUTPUTS)


def is_caught(kind: str, edit: Edit) -> bool:
    (launch, right), machine = launch_and_results(kind), Machine(edit)
    for seed in range(20):
        try:
            got = launch.run(machine, seed, OUTPUTS[seed % 2])
        except Fault:
            return True
        if not all(same_bits(a, b) for a, b in zip(got, right[seed % 2], strict=True)):
            return True
    return False


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BATCHES for name in mutants(kind)])
def test_a_changed_protocol_is_caught(kind: str, name: str) -> None:
    assert is_caught(kind, mutants(kind)[name]) != (name in NOT_NEEDED)


def test_what_is_not_needed_is_there() -> None:
    assert NOT_NEEDED < mutants("extend").keys()
