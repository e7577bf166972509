"""A plan for every batch that SGLang can schedule, in buffers whose size only the server's settings decide."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packinfer_sgl.kernels.tiles import EXTEND_TILES, TILES, policy_of
from packinfer_sgl.planning.batch import StepBatch, causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import Capacity, DoesNotFit, decode_capacity, fit, least_partials, verify_capacity
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.reasons import UngroupedReason
from packinfer_sgl.runners.cuda import extend_planner

SMS = 132
CONTEXT = 131_072
ROOM = 64
HEADS = [(4, 1), (8, 1), (12, 1), (16, 2), (32, 8), (28, 4), (64, 8)]  # of a tensor-parallel rank


@dataclass(frozen=True)
class Served:
    """A batch as the radix tree shows it: its path of nodes and its length of each row."""

    paths: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]
    own: tuple[int, ...]  # tokens behind the lowest node of each row

    @property
    def tree(self) -> PrefixTree:
        return PrefixTree.from_paths(self.paths, self.ends)

    @property
    def kv_lens(self) -> np.ndarray:
        return np.array([(ends or (0,))[-1] + own for ends, own in zip(self.ends, self.own, strict=True)], np.int32)


def served(above: list[int], tokens: list[int], rows: list[int], own: list[int]) -> Served:
    """Of radix nodes each with the node ``above`` it (-1: none) and its tokens, and the node of each row."""
    paths: list[tuple[int, ...]] = []
    ends: list[tuple[int, ...]] = []
    for node, (up, n) in enumerate(zip(above, tokens, strict=True)):
        paths.append((*(paths[up] if up >= 0 else ()), node))
        ends.append((*(ends[up] if up >= 0 else ()), (ends[up][-1] if up >= 0 else 0) + n))
    return Served(
        tuple(paths[r] if r >= 0 else () for r in rows), tuple(ends[r] if r >= 0 else () for r in rows), tuple(own)
    )


def chain(levels: int, each: int, tokens: int, own: int = 16) -> Served:
    """``each`` requests at every turn of one conversation."""
    rows = [i // each for i in range(levels * each)]
    return served([*range(-1, levels - 1)], [tokens] * levels, rows, [own] * len(rows))


@st.composite
def batches(draw: st.DrawFn) -> Served:
    """Chains, stars, and trees whose nodes mostly extend the newest one; at most 256 levels."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    kind = draw(st.sampled_from(["chain", "star", "random", "balanced"]))
    n_rows = draw(st.integers(1, 1024))
    n_nodes = draw(st.integers(1, 2 * n_rows))
    newest = draw(st.sampled_from([0.0, 0.5, 0.9, 0.99]))
    longest = draw(st.sampled_from([2, 40, 512, 4096]))
    above, level = [-1], [1]
    for node in range(1, n_nodes):
        up = node - 1
        if kind == "star":
            up = 0
        elif kind == "balanced":
            up = (node - 1) // 2
        elif kind == "random" and rng.random() >= newest:
            up = int(rng.integers(-1, node))
        if up >= 0 and level[up] == 256:
            up = -1
        above.append(up)
        level.append(1 if up < 0 else level[up] + 1)
    tokens = rng.integers(1, longest + 1, n_nodes)
    own = rng.integers(1, longest + 1, n_rows)
    end = np.zeros(n_nodes, np.int64)
    for node, up in enumerate(above):  # no row is longer than a context
        room = CONTEXT - 4096 - (end[up] if up >= 0 else 0)
        tokens[node] = max(1, min(tokens[node], room))
        end[node] = tokens[node] + (end[up] if up >= 0 else 0)
    rows = rng.integers(-1, n_nodes, n_rows)
    return served(above, tokens.tolist(), rows.tolist(), own.tolist())


def in_a_pool(batch: Served, spare: float) -> int:
    """Tokens of the smallest pool that holds the batch, and a part more."""
    return int(batch.tree.unique_tokens(batch.kv_lens) * (1 + spare)) + 1


def decode_step(batch: Served) -> StepBatch:
    return StepBatch(np.ones(len(batch.own), np.int32), batch.kv_lens)


def decode_plan(batch: Served, heads: tuple[int, int], pool_tokens: int, grouping: str = "multi") -> Plan:
    shape = AttentionShape(*heads, 128, 2)
    capacity = decode_capacity(
        shape, max_rows=len(batch.own), context_tokens=CONTEXT, pool_tokens=pool_tokens, room_tokens=ROOM, row_spans=2
    )
    fitted = fit(
        batch.tree, shape, H200.decode_cost, policy_of(shape, TILES[128], SMS), capacity, grouping=grouping,
        batch=decode_step(batch), saving_lens=batch.kv_lens, room_tokens=ROOM,
    )  # fmt: skip
    assert grouping != "off" or fitted.kept.n_nodes == 0
    assert capacity.holds(fitted.plan)
    return fitted.plan


def verify_plan(batch: Served, heads: tuple[int, int], pool_tokens: int, drafts: int) -> Plan:
    """The last ``drafts`` tokens of each row are its queries."""
    batch = replace(batch, own=tuple(own + drafts for own in batch.own))
    shape, tiles = AttentionShape(*heads, 128, 2), EXTEND_TILES[128]
    capacity = verify_capacity(
        shape, drafts, tiles[0].rows // shape.group_size, max_rows=len(batch.own), context_tokens=CONTEXT,
        pool_tokens=pool_tokens + len(batch.own) * drafts,
    )  # fmt: skip
    planner = extend_planner(shape, tiles, SMS, grouping="multi", always=True, limits=capacity, must_fit=True)
    q_lens = np.full(len(batch.own), drafts, np.int32)
    visible = causal(q_lens, batch.kv_lens)
    _, fitted, _ = planner.fastest(batch.tree, StepBatch(q_lens, batch.kv_lens, visible=visible))
    assert capacity.holds(fitted.plan)
    return fitted.plan


@settings(max_examples=120)
@given(batches(), st.sampled_from(HEADS), st.sampled_from([0.0, 0.5, 8.0]), st.sampled_from(["multi", "single", "off"]))
def test_every_decode_batch_has_a_plan(batch: Served, heads: tuple[int, int], spare: float, grouping: str) -> None:
    plan = decode_plan(batch, heads, in_a_pool(batch, spare), grouping)
    assert plan.kv_tokens_unique <= plan.kv_tokens_read


@settings(max_examples=60)
@given(batches(), st.sampled_from(HEADS), st.sampled_from([0.0, 8.0]), st.sampled_from([2, 4, 16]))
def test_every_verify_step_has_a_plan(batch: Served, heads: tuple[int, int], spare: float, drafts: int) -> None:
    verify_plan(batch, heads, in_a_pool(batch, spare), drafts)


@pytest.mark.parametrize(
    ("batch", "pool"),
    [
        (chain(48, 2, 2048), 400_000),
        (chain(24, 8, 2048), 400_000),
        (chain(24, 8, 512), 20_000),
        (chain(256, 1, 500), 200_000),
        (chain(256, 4, 500), 200_000),
    ],
    ids=["48 turns", "24 turns", "a small pool", "256 levels", "1024 rows"],
)
@pytest.mark.parametrize("heads", [(4, 1), (32, 8), (64, 8)], ids=str)
def test_deep_conversations(batch: Served, pool: int, heads: tuple[int, int]) -> None:
    """They ended the server, or were read 16 to 48 times. Here each span is read by as few tiles as its rows fill, and
    not more than three times as often where the buffers cannot take all partial results."""
    plan = decode_plan(batch, heads, pool)
    tree = batch.tree
    tiles = -(-(tree.row_hi - tree.row_lo) * (heads[0] // heads[1]) // 64)
    least = int(
        ((tree.end - tree.start) * tiles).sum() + (batch.kv_lens - tree.tail_start[tree.row_order.argsort()]).sum()
    )
    assert plan.kv_tokens_read < 3 * least
    verify_plan(batch, heads, pool, 4)


def test_the_bound_on_partial_results_is_that_of_a_balanced_tree() -> None:
    """Nothing kept, nothing cut, each token listed once: of ``n`` rows each adds half of ``log2(n)`` results."""
    n, shape = 512, AttentionShape(32, 8, 128, 2)
    above = [-1, *((node - 1) // 2 for node in range(1, n - 1))]
    batch = served(above, [9] * (n - 1), [*range(n // 2 - 1, n - 1)] * 2, [5] * n)
    unlimited = Capacity(*[1 << 40] * 5, in_a_pool(batch, 0) + n * ROOM)
    policy = replace(policy_of(shape, TILES[128], SMS), timings=None)
    fitted = fit(
        batch.tree, shape, H200.decode_cost, policy, unlimited, grouping="off", batch=decode_step(batch),
        room_tokens=ROOM,
    )  # fmt: skip
    assert fitted.overflowed == ("kv_slots",)
    assert 0.9 * least_partials(n) < len(fitted.plan.query_rows) <= least_partials(n)


def test_what_cannot_fit_says_by_how_much() -> None:
    batch = chain(3, 2, 100)
    with pytest.raises(
        DoesNotFit, match=r"^packinfer: a batch of 6 rows does not fit the buffers \(kv_slots \d+ > \d+\)$"
    ):
        decode_plan(batch, (32, 8), 50)


def test_groups_that_do_not_fit_are_said_to() -> None:
    """Four rows share 4,000 tokens: with a group each has a query slot for it and one for its tail."""
    batch, shape = served([-1], [4000], [0] * 4, [16] * 4), AttentionShape(32, 8, 128, 2)
    for slots, why in ((8, None), (4, UngroupedReason.FULL_BUFFERS)):
        fitted = fit(
            batch.tree, shape, H200.decode_cost, replace(policy_of(shape, TILES[128], SMS), timings=None),
            replace(Capacity.unlimited(), slots=slots), grouping="multi", batch=decode_step(batch),
            saving_lens=batch.kv_lens,
        )  # fmt: skip
        assert (fitted.ungrouped, fitted.kept.n_nodes) == (why, 0 if why else 1)
