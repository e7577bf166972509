"""Which record a device has, and what extend batches are expected to take by it, packed and not."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packinfer_sgl.kernels.tiles import (
    EXTEND_TILES,
    decode_cost,
    decode_tiles,
    device_profile,
    hopper_decode_tiles,
    policy_of,
    tile_policy,
    tiles_for,
)
from packinfer_sgl.kernels.tiles import TILES as DECODE_TILES
from packinfer_sgl.planning.batch import StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.cpu_profile import CPU
from packinfer_sgl.planning.device_profile import EXTEND_BLOCK, EXTEND_ROWS, DeviceProfile
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Col, Plan
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200, PROFILES, profile_for
from packinfer_sgl.planning.schedule import makespan_us
from packinfer_sgl.runners.cuda import decode_planner, extend_planner

SHAPE = AttentionShape(qo_heads=32, kv_heads=8, head_dim=128, kv_bytes=2)
SMS = H200.multiprocessors
TILES = EXTEND_TILES[128]
TILE_QUERIES = TILES[0].rows // SHAPE.group_size


def model_us(plan: Plan | None, costs: DeviceProfile = H200, shape: AttentionShape = SHAPE) -> float:
    assert plan is not None
    return costs.packed_extend_us(plan, shape, SMS, TILES[0].rows, TILES[0].tokens)


BATCHES = st.lists(st.tuples(st.integers(1, 700), st.integers(0, 9000)), min_size=1, max_size=12)


class Batch:
    """Requests of which the first ``sharers`` have one cached prefix in common."""

    def __init__(self, prefix: int, sharers: int, q_lens: list[int], cached: list[int]) -> None:
        under = [r < sharers for r in range(len(q_lens))]
        self.tree = PrefixTree.from_paths([(0,) * u for u in under], [(prefix,) * u for u in under])
        self.q_lens = np.array(q_lens, np.int32)
        self.kv_lens = np.array([prefix * u + c + q for u, c, q in zip(under, cached, q_lens)], np.int32)

    def prefix_tree(self) -> PrefixTree:
        return self.tree

    def planned(
        self, always: bool = True, shape: AttentionShape = SHAPE, grouping: str = "multi", splits: bool = True
    ) -> Plan | None:
        planner = extend_planner(shape, TILES, SMS, grouping=grouping, always=always)
        if not splits:
            planner.ways = tuple(way._replace(policy=replace(way.policy, timings=None)) for way in planner.ways)
        planned = planner.plan(self.step())
        return planned and planned.plan

    def step(self) -> StepBatch:
        return StepBatch(self.q_lens, self.kv_lens, self, visible=causal(self.q_lens, self.kv_lens))

    def packed_us(self, **more: Any) -> float:
        return model_us(self.planned(**more))  # type: ignore[arg-type]

    def stock_us(self, shape: AttentionShape = SHAPE) -> float:
        return H200.stock_extend_us(self.q_lens, self.kv_lens, shape, SMS)


@given(BATCHES)
def test_stock_time_is_that_of_its_tiles(batch: list[tuple[int, int]]) -> None:
    """Tile by tile, where none is split."""
    q_lens, cached = map(list, zip(*batch))
    most = max(q_lens) * SHAPE.group_size
    rows, block_us = (
        (EXTEND_ROWS // 2, H200.stock_half_block_us) if most <= EXTEND_ROWS // 2 else (EXTEND_ROWS, H200.stock_block_us)
    )
    tiles = []
    for q, c in zip(q_lens, cached):
        for nth in range(math.ceil(q * SHAPE.group_size / rows)):
            seen = c + min(q, (nth + 1) * rows // SHAPE.group_size)
            tiles.append(math.ceil(seen / EXTEND_BLOCK) * block_us + H200.stock_tile_us)
    each = [0.0] * 3  # multiprocessors: the next free one takes the next tile
    for us in (us for us in sorted(tiles, reverse=True) for _ in range(SHAPE.kv_heads)):
        each[each.index(min(each))] += us
    q, kv = np.array(q_lens, np.int32), np.add(q_lens, cached, dtype=np.int32)
    assert H200.stock_extend_us(q, kv, SHAPE, 3) == pytest.approx(max(each) + H200.stock_call_us)


def test_one_long_request_is_split_by_stock() -> None:
    short, long = Batch(0, 0, [256], [4096]), Batch(0, 0, [256], [8 * 4096])
    unsplit = 8 * 4096 / EXTEND_BLOCK * H200.stock_block_us
    assert short.stock_us() < long.stock_us() < 0.7 * unsplit


@given(BATCHES, st.integers(0, 11), st.integers(1, 3000))
def test_more_cached_tokens_take_longer(batch: list[tuple[int, int]], which: int, more: int) -> None:
    q_lens, cached = map(list, zip(*batch))
    longer = cached.copy()
    longer[which % len(batch)] += more
    before, after = Batch(0, 0, q_lens, cached), Batch(0, 0, q_lens, longer)
    if max(q_lens) * SHAPE.qo_heads > EXTEND_ROWS * SMS:  # else a split may come that makes it faster
        assert before.stock_us() <= after.stock_us()
    # of plans that are not split: splits are chosen by another model, which knows no blocks
    assert before.packed_us(splits=False) <= after.packed_us(splits=False)


def test_few_queries_take_less_time_per_block() -> None:
    # each row reads the prefix, which lies in the cache: memory does not bound them
    few, many = (Batch(8192, 16, [n] * 16, [0] * 16).planned(grouping="off") for n in (16, TILE_QUERIES))
    slower = replace(H200, extend_half_block_us=2 * H200.extend_half_block_us)
    less = H200.extend_half_block_us / H200.extend_block_us
    assert model_us(few) == pytest.approx(less * model_us(many), rel=0.03) and less < 0.95
    assert model_us(many, slower) == model_us(many)
    assert model_us(few, slower) > 1.8 * model_us(few)


def test_tiles_of_64_rows_have_no_cheaper_ones_below_them() -> None:
    wide, narrow = H200.extend_cost(128), H200.extend_cost(64)
    assert narrow.tiles(SHAPE, 16) == (1, 64) == narrow.tiles(SHAPE, 1)
    assert wide.tiles(SHAPE, 32) == (1, 128) and 64 < wide.tiles(SHAPE, 16)[1] < 128


def test_products_grow_with_the_head_dimension() -> None:
    """And with the factor that was measured for it."""
    narrow = replace(SHAPE, head_dim=64)
    batch = Batch(0, 0, [512] * 16, [8192] * 16)
    plan = batch.planned(shape=narrow)
    for factor in (1.0, 1.5):
        known = replace(H200, extend_factor_64=factor, stock_factor_64=factor)
        packed_us, stock_us = (
            model_us(plan, known, narrow),
            known.stock_extend_us(batch.q_lens, batch.kv_lens, narrow, SMS),
        )
        assert 0.5 < packed_us / batch.packed_us() / factor < 0.6
        assert 0.5 < stock_us / batch.stock_us() / factor < 0.6


def test_items_are_taken_from_a_queue() -> None:
    """As in kernels/attention_hopper_extend.py: one CTA takes 9, the other 4, 4 and 4."""
    assert makespan_us(np.array([9.0, 4.0, 4.0, 4.0]), 1, 2) == 12.0


def test_a_plan_takes_no_less_than_reading_its_tokens() -> None:
    """Rows of few queries are bound by memory, not by products."""
    batch = Batch(0, 0, [4] * 64, [8192] * 64)
    kv_bytes = 64 * 8196 * 4 * SHAPE.kv_heads * SHAPE.head_dim
    fast = replace(H200, extend_block_us=1e-3, extend_half_block_us=1e-3)
    assert model_us(batch.planned(), fast) >= kv_bytes / H200.bytes_per_us


MIXED = Batch(4096, 97, [200, *[1] * 96], [0, *[300] * 96])
PROMPTS = Batch(4096, 64, [99] * 64, [0] * 64)  # 12 rounds of tiles: none is cut


def test_decodes_beside_a_chunk_are_packed_and_a_long_chunk_alone_is_not() -> None:
    assert MIXED.planned(always=False) is not None
    chunk = Batch(0, 0, [4096], [8192])
    assert chunk.planned(always=False) is None and chunk.planned() is not None


def test_short_suffixes_are_inlined_with_their_prefix() -> None:
    plan, apart = PROMPTS.planned(), PROMPTS.planned(grouping="off")
    assert plan is not None and apart is not None
    assert plan.n_partials == 0 and len(plan.items) == -(-64 * 99 // TILE_QUERIES) < len(apart.items)
    assert set(plan.items[:, Col.A_LEN].tolist()) == {4096}
    assert PROMPTS.packed_us() < 0.95 * PROMPTS.packed_us(grouping="off")


def test_long_tails_are_not_inlined() -> None:
    plan = MIXED.planned()
    assert plan is not None and plan.n_partials > 0 and plan.kv_tokens_read < plan.kv_tokens_logical / 5


@pytest.mark.parametrize(
    ("name", "sms", "profile"),
    [("NVIDIA H200", 132, "H200"), ("NVIDIA H200", None, "H200"), ("NVIDIA H200 MIG 1g.18gb", 16, None),
     ("NVIDIA GH200 480GB", 132, None), ("NVIDIA A100-SXM4-80GB", 108, None)],
)  # fmt: skip
def test_a_gpu_has_its_record_or_a_guess(name: str, sms: int | None, profile: str | None) -> None:
    found = profile_for(name, sms)
    assert found.is_measured is (profile is not None) and found.name == (profile or name)


def test_every_record_bears_its_name() -> None:
    assert {key: profile.name for key, profile in PROFILES.items()} == {key: key for key in PROFILES}
    assert all(profile_for(f"NVIDIA {key} 80GB") is profile for key, profile in PROFILES.items())


def test_a_guess_groups_less_and_leaves_extends_to_stock() -> None:
    guess = profile_for("NVIDIA X1")
    tree = PrefixTree.from_neighbours(range(32), [2048] * 31)
    kept = {
        tail: [prune(tree, SHAPE, p.decode_cost, kv_lens=np.full(32, 2048 + tail, np.int32)) for p in (H200, guess)]
        for tail in (500, 3000, 6000)
    }
    assert [[k.n_nodes for k in each] for each in kept.values()] == [[1, 1], [1, 0], [0, 0]]
    planner = extend_planner(SHAPE, TILES, SMS, grouping="multi", always=False, profile=guess)
    assert MIXED.planned(always=False) is not None
    assert planner.plan(MIXED.step()) is None


def test_the_device_says_which_record(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_profile(torch.device("cpu")) is H200
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for sms in (SMS, SMS - 1):
        properties = SimpleNamespace(multi_processor_count=sms)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert device_profile(torch.device("cuda")).is_measured is (sms == SMS)
        for capability, tiles in (((9, 0), TILES), ((8, 0), DECODE_TILES[128])):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
            assert tile_policy(SHAPE, torch.device("cuda:0")) == policy_of(SHAPE, DECODE_TILES[128], sms)
            few = AttentionShape(16, 2, 128, 2)
            assert tile_policy(few, torch.device("cuda:0")) == policy_of(few, tiles, sms)
            assert tile_policy(few, torch.device("cuda:0"), masked=True) == policy_of(few, DECODE_TILES[128], sms)


@pytest.mark.parametrize("heads", [(16, 2), (32, 2), (64, 2), (8, 2), (4, 1), (8, 1), (12, 1)], ids=str)
def test_decode_in_one_launch(heads: tuple[int, int]) -> None:
    """Plans of these are cut for the extend kernel, by its times, and may grow."""
    shape = AttentionShape(*heads, 128, 2)
    tiles = hopper_decode_tiles(shape)
    cost, policy = decode_cost(shape, tiles, H200), policy_of(shape, tiles, SMS)
    assert tiles == TILES and replace(cost, bytes_per_us=math.inf, reread_bytes_per_us=math.inf) == H200.extend_cost(
        EXTEND_ROWS
    )
    assert cost.bytes_per_us == H200.bytes_per_us
    planner = DecodePlanner(shape, cost, policy, grouping="multi", limits=Capacity.unlimited(), room_tokens=64)
    batch = Batch(4000, 40, [1] * 40, [*range(100, 500, 10)])
    plan = planner.plan(StepBatch(batch.q_lens, batch.kv_lens, batch)).plan
    assert plan.kv_tokens_read < 10 * plan.kv_tokens_unique < plan.kv_tokens_logical
    assert sorted(plan.items[:, Col.OPEN_ROW])[-40:] == [*range(40)] and not plan.windowed


def test_splits_of_a_tail_that_grows_begin_no_block_for_it() -> None:
    """Where items are taken from a queue; 32 splits of 8,192 tokens and 64 more would have 258 each."""
    shape = AttentionShape(16, 2, 128, 2)
    policy = policy_of(shape, hopper_decode_tiles(shape), SMS)
    for tokens in (8192, 8300, 20_000):
        lens, tree = np.array([tokens], np.int32), PrefixTree.unshared(1)
        fixed, grows = (
            make_plan(tree, lens, policy, kv_tokens_unique=tokens, room_tokens=room).items for room in (0, 64)
        )
        blocks = [-(-items[:, Col.A_LEN] // EXTEND_BLOCK) for items in (fixed, grows)]
        assert len(grows) > 8 and grows[:, Col.A_LEN].sum() == tokens
        assert blocks[1].max() == blocks[0].max() and blocks[1].sum() <= blocks[0].sum()


@pytest.mark.parametrize(
    ("heads", "head_dim", "kv_bytes"),
    [((32, 8), 128, 2), ((64, 4), 128, 2), ((6, 2), 128, 2), ((16, 2), 256, 2), ((32, 2), 64, 2), ((32, 2), 128, 1)],
)
def test_decode_in_two_launches(heads: tuple[int, int], head_dim: int, kv_bytes: int) -> None:
    shape = AttentionShape(*heads, head_dim, kv_bytes)
    assert hopper_decode_tiles(shape) == decode_tiles(head_dim, shape.group_size, kv_bytes)


def test_the_policy_follows_the_record() -> None:
    slow = replace(H200, bytes_per_us=H200.bytes_per_us / 10, large_item_us=1.0, extend_item_us=5.0)
    before, after = (policy_of(SHAPE, DECODE_TILES[128], SMS, profile).timings for profile in (H200, slow))
    assert before and after and (before[0].fixed_us, before[1].fixed_us) == (H200.large_item_us, H200.small_item_us)
    assert (after[0].fixed_us, after[1].fixed_us) == (1.0, H200.small_item_us)
    assert after[1].token_us == pytest.approx(10 * before[1].token_us)  # small tiles are bound by memory
    extend = policy_of(SHAPE, TILES, SMS, slow).timings
    assert extend and extend[0].fixed_us == 5.0 and extend[0].dynamic == SHAPE.kv_heads


@pytest.mark.parametrize(("head_dim", "most"), [(64, 32), (128, 32), (256, 16)])
def test_a_small_tile_holds_a_token(head_dim: int, most: int) -> None:
    for group in range(1, most + 1):
        shape = AttentionShape(2 * group, 2, head_dim, 2)
        small, policy = decode_tiles(head_dim, group)[-1], tile_policy(shape, torch.device("cpu"))
        assert small.rows >= group and policy.tile_queries == (64 // group, small.rows // group)
        assert policy.timings and policy.timings[1].fixed_us == H200.small_item_us
        # spans are chosen by the tiles that will run them
        cost = H200.decode_cost.for_group_size(group)
        assert cost.small_rows == cost.small_as_rows == small.rows
        assert cost.tiles(shape, 1) == (1, small.rows) and cost.tiles(shape, 64 // group)[0] == 1
    message = f"head dimension {head_dim} knows up to {most} query heads of a KV head, not {most + 1}"
    with pytest.raises(ValueError, match=message):
        tiles_for(head_dim, torch.device("cpu"), group_size=most + 1)


def test_rows_of_32_heads_grow_in_small_tiles() -> None:
    """Items that grow, or that others follow, run on the Triton kernel only, which is that of small tiles."""
    planner = decode_planner(
        AttentionShape(64, 2, 128, 2), torch.device("cpu"), grouping="multi", limits=Capacity.unlimited()
    )  # fmt: skip
    tree = PrefixTree.from_neighbours(range(8), [4000] * 7)
    lens = np.arange(4001, 4801, 100).astype(np.int32)
    plan = planner.plan(StepBatch(np.ones(8, np.int32), lens, SimpleNamespace(prefix_tree=lambda: tree)))  # type: ignore[arg-type]
    large, small = np.split(plan.plan.items, [plan.plan.class_indptr[1]])
    assert len(large) and (large[:, Col.OPEN_ROW] < 0).all() and (large[:, Col.NEXT_ITEM] < 0).all()
    assert large[:, Col.Q_CNT].max() == 2 and (small[:, Col.OPEN_ROW] >= 0).sum() == 8


def test_on_a_cpu_only_copies_count() -> None:
    few, many = CPU.extend_cost(64).read_us(SHAPE, 1), CPU.extend_cost(64).read_us(SHAPE, 16)
    assert few == many and CPU.extend_cost(1 << 20).read_us(SHAPE, 1000) == few
    plan = MIXED.planned()
    assert plan is not None
    us = CPU.packed_extend_us(plan, SHAPE)
    assert us > CPU.extend_layer_us + len(plan.items) * CPU.extend_item_us
    doubled = replace(CPU, packed_flops_per_us=CPU.packed_flops_per_us / 2, stock_flops_per_us=1e30)
    assert doubled.packed_extend_us(plan, SHAPE) > us
    assert doubled.stock_extend_us(MIXED.q_lens, MIXED.kv_lens, SHAPE) == pytest.approx(97 * CPU.stock_request_us)


@pytest.mark.parametrize(
    ("head_dim", "factors", "known"),
    [(128, {}, True), (64, {}, False), (256, {}, False), (256, {"extend_factor_256": 1.2}, False),
     (256, {"extend_factor_256": 1.2, "stock_factor_256": 1.1}, True),
     (64, {"extend_factor_256": 1.2, "stock_factor_256": 1.1}, False), (96, {}, False)],
)  # fmt: skip
def test_what_was_not_measured_goes_to_the_stock_backend(head_dim: int, factors: dict, known: bool) -> None:
    nothing = dict.fromkeys(f"{whose}_factor_{of}" for whose in ("extend", "stock") for of in (64, 256, "fp8"))
    profile = replace(H200, **{**nothing, **factors})
    shape = replace(SHAPE, head_dim=head_dim)
    assert profile.knows(shape) is known and not replace(profile, is_measured=False).knows(shape)
    fp8 = replace(shape, kv_bytes=1)
    assert not profile.knows(fp8)
    assert replace(profile, extend_factor_fp8=1.2, stock_factor_fp8=0.9).knows(fp8) is (head_dim == 128)
    us = profile.stock_extend_us(MIXED.q_lens, MIXED.kv_lens, shape, SMS)
    assert (us > 0) is known
    if factors.get("stock_factor_256") and known:
        doubled = replace(profile, stock_factor_256=2.2, extend_factor_256=2.4)
        assert doubled.stock_extend_us(MIXED.q_lens, MIXED.kv_lens, shape, SMS) > 1.3 * us
        plan = MIXED.planned()
        before, after = (model_us(plan, p, shape) for p in (profile, doubled))
        assert after > 1.3 * before
