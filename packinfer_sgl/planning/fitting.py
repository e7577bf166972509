"""Plans that fit buffers of a fixed size: captured graphs hold their addresses, so every batch must have such a plan.

What overflows decides what gives way. Slot list: each KV token is listed once (``query_tiles``). Query slots,
partial results, items: fewer spans are read together, those that save the least first, by raising the price of a
partial result; then spans are not cut. With nothing kept, nothing cut and each token listed once, ``n`` rows need
``least_partials(n)`` partial results for each of their queries and one list entry for each KV token, and that always
fits (``decode_capacity``, ``verify_capacity``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.grouped_plan import grouped_plan
from packinfer_sgl.planning.groups import prune, without_nodes
from packinfer_sgl.planning.plan import Col, Header, Plan, length_at
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree
from packinfer_sgl.planning.units import units_of
from packinfer_sgl.reasons import UngroupedReason

BUFFER_BYTES = 1 << 27  # most memory for the partial results of verify steps, if they fit in it, and of extends
DEAREST = 1 << 24  # times the price of a partial result: nothing is kept
UNCUT_TOKENS = 1 << 30
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Capacity:
    """Sizes of the buffers of a plan, fixed as long as captured graphs use them.

    Attributes:
        queries: rows of q and out.
        slots: query slots (a query counts once for each tile that it is in).
        items, spans: work items, and spans of the slot list.
        partials: partial results.
        kv_slots: entries of the KV slot list.
    """

    queries: int
    slots: int
    items: int
    spans: int
    partials: int
    kv_slots: int

    @classmethod
    def unlimited(cls, *, partials: int = UNLIMITED, kv_slots: int = UNLIMITED) -> Capacity:
        """Room for all but what is given: buffers that grow, and what may not grow in them."""
        return cls(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED, partials, kv_slots)

    @classmethod
    def of(cls, plan: Plan) -> Capacity:
        """Just what ``plan`` needs."""
        return cls(*_needs(plan))

    def overflow(self, plan: Plan) -> dict[str, str]:
        """What ``plan`` needs more of, by name: ``needs > holds``. Empty if it fits."""
        if self.holds(plan):
            return {}
        need = Capacity.of(plan)
        both = {f.name: (getattr(need, f.name), getattr(self, f.name)) for f in fields(self)}
        return {name: f"{needs} > {holds}" for name, (needs, holds) in both.items() if needs > holds}

    def holds(self, plan: Plan) -> bool:
        queries, slots, items, spans, partials, kv_slots = _needs(plan)
        return (
            queries <= self.queries and slots <= self.slots and items <= self.items and spans <= self.spans
            and partials <= self.partials and kv_slots <= self.kv_slots
        )  # fmt: skip

    def grown(self, plan: Plan) -> Capacity:
        """What ``plan`` needs and a quarter more, so that slightly larger plans fit, too; nowhere less than before."""
        need = Capacity.of(plan)
        sizes = {f.name: getattr(need, f.name) * 5 // 4 for f in fields(self)}
        return Capacity(**{name: max(size, getattr(self, name)) for name, size in sizes.items()})


_N_ITEMS, _N_SLOTS = length_at("items"), length_at("query_rows")
_N_QUERIES, _N_SPANS, _N_PARTIALS = int(Header.N_QUERIES), int(Header.N_SPANS), int(Header.N_PARTIALS)
_N_COLS = len(Col)


def _needs(plan: Plan) -> tuple[int, ...]:
    """In the order of ``Capacity``'s fields."""
    h = plan.header
    return h[_N_QUERIES], h[_N_SLOTS], h[_N_ITEMS] // _N_COLS, h[_N_SPANS], h[_N_PARTIALS], plan.kv_capacity


def least_partials(rows: int) -> int:
    """Most results that ``rows`` queries of one row each leave where nothing is read together, nothing cut and each
    KV token listed once: one for the row's own piece of the list, and on average at most ``log2(rows) / 2`` for pieces
    of others (``query_tiles``)."""
    return rows + math.ceil(rows * math.log2(rows) / 2) if rows > 1 else rows


def decode_capacity(
    shape: AttentionShape, *, max_rows: int, context_tokens: int, pool_tokens: int, room_tokens: int, row_spans: int
) -> Capacity:
    """Buffers for decode steps of up to ``max_rows`` rows.

    Args:
        context_tokens: most KV tokens of a row.
        pool_tokens: KV tokens in the pool.
        room_tokens: see ``make_plan``.
        row_spans: spans of the slot list for each row; at least 2.
    """
    least = max(8 * max_rows, least_partials(max_rows))
    return Capacity(
        queries=max_rows,
        slots=least + 4096,
        items=least + 4096,
        spans=row_spans * max_rows,
        partials=least + 65536 // shape.qo_heads,
        kv_slots=_kv_slots(max_rows, context_tokens, pool_tokens) + max_rows * room_tokens,
    )


def units_capacity(
    unit_tokens: int, *, max_rows: int, context_tokens: int, pool_tokens: int, room_tokens: int, row_spans: int
) -> Capacity:
    """Buffers for decode steps of up to ``max_rows`` rows in units of ``unit_tokens``; the rest as for
    ``decode_capacity``.

    Every batch has a plan that fits, without another cut of its KV: a row has a partial result for each of its units,
    whoever computes them, and in whole units as many items and query slots. There is room for eight more of each, for
    spans that end within a row's units. What may overflow besides is the slot list and its spans; with each token
    listed once a row has one span, and the list as many entries as the pool and what rows share beyond whole units.
    """
    units = max_rows * units_of(context_tokens, unit_tokens)
    once = min(max_rows * context_tokens, pool_tokens + max_rows * unit_tokens)
    return Capacity(
        queries=max_rows,
        slots=units + 8 * max_rows,
        items=units + 8 * max_rows,
        spans=row_spans * max_rows,
        partials=units,
        kv_slots=max(_kv_slots(max_rows, context_tokens, pool_tokens), once) + max_rows * room_tokens,
    )


def verify_capacity(
    shape: AttentionShape, drafts: int, tile_queries: int, *, max_rows: int, context_tokens: int, pool_tokens: int
) -> Capacity:
    """Buffers for verify steps of up to ``max_rows`` rows with ``drafts`` queries each.

    Args:
        tile_queries: most queries of a tile.
        context_tokens, pool_tokens: as for ``decode_capacity``.
    """
    queries, row_bytes = max_rows * drafts, shape.qo_heads * (shape.head_dim + 1) * 4
    least = max(8 * max_rows, least_partials(max_rows))
    kv_slots, most_kv_slots = _kv_slots(max_rows, context_tokens, pool_tokens), max_rows * context_tokens
    partials = max(2 * queries, min(8 * queries + 65536 // shape.qo_heads, BUFFER_BYTES // row_bytes))
    # either room for the results of a list that has each token once, or a list that no batch overflows
    more_partials = max(least_partials(max_rows) * drafts - partials, 0)
    if more_partials * row_bytes <= (most_kv_slots - kv_slots) * 4:
        partials += more_partials if kv_slots < most_kv_slots else 0
    else:
        kv_slots = most_kv_slots
    return Capacity(
        queries=queries,
        slots=max(least * drafts, partials),
        items=least * -(-drafts // tile_queries) + queries + 4096,
        spans=2 * max_rows,
        partials=partials,
        kv_slots=kv_slots + queries,
    )


def _kv_slots(max_rows: int, context_tokens: int, pool_tokens: int) -> int:
    """The pool would do. Four times that is room for short spans that several rows list, each with its own tail."""
    return min(max_rows * context_tokens, 4 * pool_tokens)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A plan that fits.

    Attributes:
        plan: the plan.
        kept: the spans that it reads once.
        listed: the spans with which its slot list begins: ``kept``, or none where it has each token once
            (``query_tiles``), for then its spans are not those that it reads.
        overflowed: what overflowed on the way to it.
        ungrouped: why ``kept`` has no span, if it has none.
    """

    plan: Plan
    kept: PrefixTree
    listed: PrefixTree
    overflowed: tuple[str, ...]
    ungrouped: UngroupedReason | None


def _members(kept: PrefixTree, q_lens: Int32 | None) -> int:
    """Query slots of the spans that are read together."""
    each = np.ones(kept.n_rows, np.int64) if q_lens is None else q_lens[kept.row_order]
    before = np.concatenate([[0], np.cumsum(each)])
    return int((before[kept.row_hi] - before[kept.row_lo]).sum())


class DoesNotFit(RuntimeError):
    """No plan of a batch fits the buffers; ``overflowed`` is as in ``Fitted``."""

    def __init__(self, message: str, overflowed: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.overflowed = overflowed


class NothingGrouped(DoesNotFit):
    """Only a plan with groups was asked for, and the batch has none."""


def fit(
    tree: PrefixTree,
    shape: AttentionShape,
    cost: CostModel,
    policy: TilePolicy,
    limits: Capacity,
    *,
    grouping: str,
    batch: StepBatch,
    q_lens: Int32 | None = None,
    saving_lens: Int32 | None = None,
    unique_tokens: int | None = None,
    room_tokens: int = 0,
    needs_groups: bool = False,
) -> Fitted:
    """The plan that ``cost`` and ``policy`` ask for, or the nearest to it that fits.

    Args:
        tree: who shares what in ``batch``; where the policy has units, cut down to them (``units.within_units``).
        limits: what of a plan fits.
        grouping, q_lens: see ``prune``; ``saving_lens``: its ``kv_lens``.
        unique_tokens: the least KV tokens that any kernel reads; default: what the batch says, else ``tree``.
        room_tokens: see ``make_plan``.
        needs_groups: whether ``cost`` must find spans that are worth reading together.

    Raises:
        NothingGrouped: it finds none, though it must.
        DoesNotFit: with the sizes; not for buffers of this module's sizes, if the tree shows what the rows share.
    """
    unique = batch.unique_tokens if unique_tokens is None else unique_tokens
    mode, partials_us, once = grouping, None, False
    n_queries = batch.n_rows if q_lens is None else batch.n_queries
    ungrouped: UngroupedReason | None = None
    is_first = True
    overflowed: dict[str, str] = {}
    times_dearer = 1  # than at first, a partial result
    while True:
        kept, plan, saves_little = grouped_plan(
            tree, batch.kv_lens, shape, cost, policy, mode=mode, q_lens=q_lens, n_queries=n_queries,
            saving_lens=saving_lens, partials_us=partials_us, visible=batch.visible, room_tokens=room_tokens, once=once,
            unique_tokens=unique, needs_groups=needs_groups and is_first,
        )  # fmt: skip
        if plan is None:
            raise NothingGrouped("packinfer: no span is worth reading together")
        if is_first and not kept.n_nodes:
            ungrouped = UngroupedReason.SHORT_SPANS if tree.n_nodes else UngroupedReason.NOTHING_SHARED
            ungrouped = UngroupedReason.SMALL_SAVING if saves_little else ungrouped
            ungrouped = UngroupedReason.OFF if grouping == "off" else ungrouped
        is_first = False
        over = limits.overflow(plan)
        if not over:
            listed = without_nodes(tree) if once else kept
            if ungrouped is None and not kept.n_nodes:
                ungrouped = UngroupedReason.FULL_BUFFERS
            return Fitted(plan, kept, listed, tuple(overflowed), ungrouped)
        overflowed |= over
        is_cut = policy.timings is not None or policy.max_split_tokens < UNCUT_TOKENS
        if not once and over.keys() & {"kv_slots", "spans"}:
            once = True
        elif is_cut and (kept.n_nodes == 0 or "slots" not in over):  # slots do not depend on how spans are cut
            policy = replace(policy, max_split_tokens=UNCUT_TOKENS, timings=None)
        elif kept.n_nodes and not over.keys() & {"kv_slots", "spans", "queries"}:
            before = kept.n_nodes
            # at first at least as dear as a KV token that a row reads alone: some costs have it for nothing
            first_us = max(cost.partials_us(shape), float(cost.read_us(shape, 1)[0]))
            # a choice of spans with more query slots than fit is not cut, only to see that
            while kept.n_nodes == before or (kept.n_nodes and _members(kept, q_lens) > limits.slots):
                times_dearer *= 2
                mode, partials_us = grouping if times_dearer < DEAREST else "off", times_dearer * first_us
                kept = prune(tree, shape, cost, mode, q_lens, saving_lens, partials_us)
        else:
            sizes = ", ".join(f"{name} {needs}" for name, needs in over.items())
            message = f"packinfer: a batch of {batch.n_rows} rows does not fit the buffers ({sizes})"
            raise DoesNotFit(message, tuple(overflowed))
