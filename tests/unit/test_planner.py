"""Decode steps of a batch that joins, leaves, grows and is rewritten, over a table of slots like SGLang's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import attention64, shared_spans, tree_of

from packinfer_sgl.planning.batch import SlotTable, StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.cpu_profile import CPU
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.planners import DecodePlanner, ExtendPlanner, Way
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners.cpu import ROOM_TOKENS, CpuRunner
from packinfer_sgl.serving.metrics import Stats
from packinfer_sgl.serving.packed_path import Kind, PackedPath

KV_HEADS, GROUP, HEAD_DIM = 1, 2, 16
SLOTS, CONTEXT, POOL_ROWS = 1000, 128, 16
# every span pays, however short: a tile's products cost all, for one query or for many
EAGER = CostModel(
    bytes_per_us=1e12,
    reread_bytes_per_us=1e12,
    flops_per_us=1e-3,
    item_us=0.0,
    partial_us=0.0,
    partial_bytes_per_us=1e12,
    large_rows=64,
    small_rows=64,
    small_as_rows=64,
    least_saving=0.0,
)


@dataclass
class FakeRows:
    """A batch that compares by ``key``, and shares what its rows hold in equal slots up to ``owned``."""

    key: tuple
    tree: Callable[[], PrefixTree | None] = field(compare=False)

    def prefix_tree(self) -> PrefixTree | None:
        return self.tree()


class Engine:
    """A batch in a server that keeps slots, lengths and the pool as SGLang does; decodes by brute force, too."""

    def __init__(self, grouping: str = "multi", check: bool = False, cost: CostModel = EAGER) -> None:
        self.table = torch.full((POOL_ROWS, CONTEXT), -1, dtype=torch.int32)
        # KV is NaN until somebody writes it, and again once its slot is free
        self.k, self.v = torch.full((2, SLOTS, KV_HEADS, HEAD_DIM), math.nan)
        self.free = list(range(SLOTS - 1, 0, -1))
        self.rows: dict[int, list[int]] = {}  # by row of the table
        self.key = 0
        self.stats = Stats()
        self.random = torch.Generator().manual_seed(0)
        shape = AttentionShape(KV_HEADS * GROUP, KV_HEADS, HEAD_DIM, 4)
        planner = DecodePlanner(
            shape, cost, TilePolicy(tile_queries=(8, 1), max_split_tokens=8), grouping=grouping,
            limits=Capacity.unlimited(), room_tokens=ROOM_TOKENS,
        )  # fmt: skip
        runner = CpuRunner(shape, room_tokens=ROOM_TOKENS)
        self.path = PackedPath(Kind.DECODE, planner, runner, self.stats, check=check)

    def run(self, rows: FakeRows | None, lens: torch.Tensor, new: torch.Tensor, q: torch.Tensor) -> tuple:
        """One step: out and lse2."""
        ones = np.ones(len(lens), np.int32)
        table = SlotTable(self.table, torch.tensor(list(self.rows)))
        batch = StepBatch(
            ones, lens.numpy().astype(np.int32), rows, table, kv_lens_device=lens, out_slots=new, finds_slots=True
        )
        assert self.path.step(batch)
        return self.path.runner.run(q, self.k, self.v, lens, sm_scale=0.25, logits_soft_cap=0.0)

    def alloc(self, n: int) -> list[int]:
        slots = [self.free.pop() for _ in range(n)]
        for cache in (self.k, self.v):
            cache[slots] = torch.randn(n, KV_HEADS, HEAD_DIM, generator=self.random)
        return slots

    def release(self, slots: list[int]) -> None:
        self.free = slots + self.free
        self.k[slots] = self.v[slots] = math.nan

    def join(self, own: int, like: int | None = None, shared: int = 0) -> int:
        """A request whose first ``shared`` slots are those of table row ``like``."""
        row = next(r for r in range(POOL_ROWS - 1, -1, -1) if r not in self.rows)
        slots = [] if like is None else self.rows[like][:shared]
        self.rows[row] = slots + self.alloc(own)
        self.table[row] = -1
        self.table[row, : len(self.rows[row])] = torch.tensor(self.rows[row], dtype=torch.int32)
        self.key += 1
        return row

    def leave(self, row: int) -> None:
        gone = self.rows.pop(row)
        held = {slot for slots in self.rows.values() for slot in slots}
        self.release([slot for slot in gone if slot not in held])
        self.key += 1

    def grow(self, row: int) -> int:
        (slot,) = self.alloc(1)
        self.table[row, len(self.rows[row])] = slot
        self.rows[row].append(slot)
        return slot

    def step(self, *, known: bool = True, kv_lens: torch.Tensor | None = None, tree: PrefixTree | None = None) -> None:
        """One decode step whose output must equal brute force and whose tokens must be counted right."""
        new = torch.tensor([self.grow(row) for row in self.rows])
        held = list(self.rows.values())
        lens = torch.tensor([len(slots) for slots in held])
        kv_lens = lens if kv_lens is None else kv_lens.copy_(lens)
        # the tree owns all but the new token
        rows = FakeRows((self.key,), lambda: tree or tree_of(held, [len(slots) - 1 for slots in held]))
        before = (self.stats.kv_tokens_logical, self.stats.kv_tokens_unique, self.stats.kv_tokens_read)
        q = torch.randn(len(held), KV_HEADS * GROUP, HEAD_DIM, generator=self.random)
        got = self.run(rows if known else None, kv_lens, new, q)
        for a, b in zip(got, attention64(q, self.k, self.v, held, 0.25), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        after = (self.stats.kv_tokens_logical, self.stats.kv_tokens_unique, self.stats.kv_tokens_read)
        self.logical, self.unique, self.read = (b - a for a, b in zip(before, after, strict=True))
        assert self.logical == sum(map(len, held))
        assert self.unique == len({slot for slots in held for slot in slots})
        assert self.unique <= self.read <= self.logical


def three_rows(**kwargs) -> Engine:
    engine = Engine(**kwargs)
    first = engine.join(20)
    engine.join(5, like=first, shared=12)
    engine.join(3)
    return engine


def test_an_unchanged_batch_is_planned_once_per_room() -> None:
    engine = three_rows()
    kv_lens = torch.zeros(3, dtype=torch.int64)  # one tensor for all steps, as SGLang keeps it
    for step in range(2 * ROOM_TOKENS + 5):
        engine.step(kv_lens=kv_lens)
        assert engine.stats.plans == 1 + step // (ROOM_TOKENS + 1)
        assert engine.read == engine.unique < engine.logical
    assert engine.stats.packed_steps == 2 * ROOM_TOKENS + 5


def test_the_table_is_read_only_for_a_new_plan() -> None:
    """SGLang's scheduler may rewrite the table as soon as a step has started."""
    engine = three_rows()
    engine.step()
    engine.table.fill_(SLOTS - 1)
    for _ in range(5):
        engine.step()
    assert engine.stats.plans == 1


def test_a_gap_in_the_lengths_is_a_new_plan() -> None:
    engine = three_rows()
    engine.step()
    engine.grow(next(iter(engine.rows)))  # a token whose step ran elsewhere
    engine.step()
    assert engine.stats.plans == 2
    engine.step()
    assert engine.stats.plans == 2


def test_a_length_that_stays_is_a_new_plan() -> None:
    engine = three_rows()
    engine.step()
    last = next(iter(engine.rows))
    engine.table[last, len(engine.rows[last]) - 1] = -1
    engine.release([engine.rows[last].pop()])  # retracted by one token, then stepped again
    engine.step()
    assert engine.stats.plans == 2


def test_changed_rows_are_a_new_plan() -> None:
    engine = three_rows()
    engine.step()
    joined = engine.join(4, like=next(iter(engine.rows)), shared=15)
    engine.step()
    assert engine.stats.plans == 2
    engine.leave(joined)
    engine.step()
    assert engine.stats.plans == 3


def test_a_request_in_another_ones_place_is_a_new_plan() -> None:
    """The same rows of the table and lengths that fit, but another request: only the key tells."""
    engine = three_rows()
    engine.step()
    last = list(engine.rows)[-1]
    length = len(engine.rows[last])
    engine.leave(last)
    assert engine.join(length) == last
    engine.step()
    assert engine.stats.plans == 2


def test_rows_rewritten_to_shared_slots_are_picked_up() -> None:
    """Two equal cold prompts: the second row is rewritten to the first one's slots, and its own are freed."""
    engine = Engine()
    first, second = engine.join(20), engine.join(20)
    engine.step()
    assert engine.read == engine.logical
    own = engine.rows[second][:20]
    engine.rows[second][:20] = engine.rows[first][:20]
    engine.table[second, :20] = engine.table[first, :20]
    engine.release(own)
    engine.key += 1
    engine.step()
    assert engine.stats.plans == 2 and engine.read == engine.logical - 20


def test_without_rows_equal_slots_are_found() -> None:
    engine = three_rows()
    for step in range(3):
        engine.step(known=False)
        assert engine.stats.plans == step + 1, "nothing tells whether the batch is the same"
        assert engine.read == engine.logical - 12
    engine.step()
    engine.step(known=False)
    engine.step()
    assert engine.stats.plans == 6


def test_rows_that_know_no_tree_are_grouped_by_equal_slots() -> None:
    engine = three_rows()
    rows = FakeRows((1,), lambda: None)
    for step in range(3):
        new = torch.tensor([engine.grow(row) for row in engine.rows])
        held = list(engine.rows.values())
        lens = torch.tensor([len(slots) for slots in held])
        q = torch.ones(3, KV_HEADS * GROUP, HEAD_DIM)
        got = engine.run(rows, lens, new, q)
        for a, b in zip(got, attention64(q, engine.k, engine.v, held, 0.25), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        assert engine.stats.plans == 1, step
    assert engine.stats.kv_tokens_read == engine.stats.kv_tokens_logical - 3 * 12


@pytest.mark.contract
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_run_of_slots_is_read_as_it_lies(head_dim: int, stride: int) -> None:
    """Slots that follow each other are not copied; what lies around and between belongs to nobody, and is NaN."""
    shape = AttentionShape(2, 1, head_dim, 4)
    k, v = (torch.full((40, 1, stride * head_dim), math.nan)[..., ::stride] for _ in "kv")
    slots = list(range(11, 26))
    k[slots], v[slots] = torch.randn(2, len(slots), 1, head_dim)
    planner = DecodePlanner(
        shape, EAGER, TilePolicy((8, 1), 1 << 20), grouping="multi", limits=Capacity.unlimited(), room_tokens=0
    )
    batch = StepBatch(np.ones(1, np.int32), np.array([len(slots)], np.int32))
    runner, q = CpuRunner(shape), torch.randn(1, 2, head_dim)
    runner.load(planner.plan(batch).plan, SlotTable(torch.tensor([slots], dtype=torch.int32), torch.zeros(1)))
    got = runner.run(q, k, v, sm_scale=0.25, logits_soft_cap=0.0)
    for a, b in zip(got, attention64(q, k, v, [slots], 0.25), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grouping", "saved"), [("off", 0), ("single", 2 * 12), ("multi", 3 * 4 + 2 * 8)])
def test_modes(grouping: str, saved: int) -> None:
    """Four rows share 4 tokens, three of them 8 more."""
    engine = Engine(grouping)
    first = engine.join(8)
    second = engine.join(8, like=first, shared=4)
    engine.join(2, like=second, shared=12)
    engine.join(2, like=second, shared=12)
    for _ in range(3):
        engine.step()
        assert engine.logical - engine.read == saved


@pytest.mark.parametrize(
    ("grouping", "cost", "shared", "why"),
    [
        ("multi", {}, 12, None),
        ("off", {}, 12, "off"),
        ("multi", {}, 0, "nothing_shared"),
        ("multi", {"least_saving": 1.3}, 0, "nothing_shared"),
        ("multi", {"item_us": 1e9}, 12, "short_spans"),
        ("multi", {"least_saving": 1.3}, 12, "small_saving"),
        ("multi", {"least_saving": 1.2}, 12, None),
    ],
)
def test_steps_without_groups_are_counted_by_reason(grouping: str, cost: dict, shared: int, why: str | None) -> None:
    """Of rows of 21, 18 and 21 tokens two share 12: reading them once, 48 tokens are read instead of 60 (1.25x)."""
    engine = Engine(grouping, cost=replace(EAGER, **cost))
    first = engine.join(20)
    engine.join(17 - shared, like=first, shared=shared)
    engine.join(20)
    for _ in range(3):
        engine.step()
    assert engine.stats.as_dict()["ungrouped_steps"] == ({} if why is None else {why: 3})


def test_check_finds_rows_that_do_not_share() -> None:
    wrong = PrefixTree.from_neighbours([0, 1, 2], [13, 0])  # 12 tokens are shared
    engine = three_rows(check=True)
    with pytest.raises(
        RuntimeError, match=r"^packinfer: requests grouped on tokens 0 to 13 hold different KV slots.*$"
    ):
        engine.step(tree=wrong)


def test_check_passes_rows_that_share() -> None:
    engine = three_rows(check=True)
    for _ in range(ROOM_TOKENS + 3):
        engine.step()
    assert engine.stats.plans == 2


@settings(max_examples=100)
@given(
    st.lists(
        st.sampled_from(["step", "step", "step", "join", "join", "leave", "gap", "unknown", "rekey"]),
        min_size=5,
        max_size=40,
    ),
    st.sampled_from(["off", "single", "multi"]),
    st.sampled_from([EAGER, CPU.extend_cost(1 << 20)]),
    st.randoms(use_true_random=False),
)
def test_any_history(events: list[str], grouping: str, cost: CostModel, random) -> None:
    engine = Engine(grouping, check=True, cost=cost)
    engine.join(3)
    planned_for, room = None, 0
    for event in events:
        if event == "join" and len(engine.rows) < 8:
            like = random.choice(list(engine.rows))
            engine.join(random.randint(0, 4), like=like, shared=random.randint(1, len(engine.rows[like])))
        elif event == "leave" and len(engine.rows) > 1:
            engine.leave(random.choice(list(engine.rows)))
        elif event == "gap":
            engine.grow(random.choice(list(engine.rows)))
            planned_for = None
        elif event == "rekey":
            engine.key += 1
        plans = engine.stats.plans
        engine.step(known=event != "unknown")
        holds = planned_for == engine.key and event != "unknown" and room > 0
        assert engine.stats.plans == plans + (not holds)
        room = room - 1 if holds else ROOM_TOKENS
        planned_for = None if event == "unknown" else engine.key
        tree = engine.stats.last_tree
        held = list(engine.rows.values())
        assert tree is not None
        if not holds and grouping == "multi" and cost is EAGER:
            nodes = {
                (frozenset(tree.row_order[lo:hi].tolist()), int(end))
                for lo, hi, end in zip(tree.row_lo, tree.row_hi, tree.end, strict=True)
            }
            assert nodes == {(holders, end) for holders, _, end in shared_spans([slots[:-1] for slots in held])}
        if grouping == "off":
            assert engine.read == engine.logical


@pytest.mark.parametrize("kind", ["decode", "verify"])
def test_paths_are_read_again_only_for_other_requests(kind: str) -> None:
    """A new plan of requests that stay, for their lengths or because the last one has no room, has the same tree."""
    shape = AttentionShape(1, 1, 8, 4)
    policy, limits, read = TilePolicy(tile_queries=(8, 1), max_split_tokens=8), Capacity.unlimited(), []
    if kind == "decode":
        planner = DecodePlanner(shape, EAGER, policy, grouping="multi", limits=limits, room_tokens=0)
    else:
        planner = ExtendPlanner(
            shape, (Way(EAGER, policy),), grouping="multi", limits=limits, packed_us=lambda _: 1.0, stock_us=None,
            must_fit=True,
        )  # fmt: skip

    def plan(key: int, lens: list[int], shared: list[int]) -> list[int]:
        def tree() -> PrefixTree:
            read.append(key)
            return PrefixTree.from_neighbours(range(len(lens)), shared)

        q_lens, kv_lens = np.ones(len(lens), np.int32), np.array(lens, np.int32)
        planned = planner.plan(StepBatch(q_lens, kv_lens, FakeRows((key,), tree), visible=causal(q_lens, kv_lens)))
        assert planned is not None and planned.plan.kv_tokens_logical == sum(lens)
        return planned.tree.end.tolist()

    assert plan(1, [30, 40], [20]) == [20] and read == [1]
    assert plan(1, [31, 41], [20]) == [20] and plan(1, [39, 42], [20]) == [20] and read == [1]
    assert plan(2, [39, 42], [10]) == [10] and read == [1, 2]
    assert plan(1, [39, 42, 50], [20, 0]) == [20] and read == [1, 2, 1]
