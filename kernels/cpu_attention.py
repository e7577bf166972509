"""Packed attention over a plan on the CPU: what ``reference`` says, fast.

Items of similar length form a class and run as batched products, in slabs that stay in the CPU's cache. Products,
softmax and merging are float32 whatever the inputs are. ``lse2`` is the log-sum-exp in base 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit

from packinfer_sgl.kernels.reference import LOG2_E, MaskRows, check_sinks, with_sinks
from packinfer_sgl.planning.plan import Col, Plan

SLAB_BYTES = 6 << 20  # gathered keys of one batched product; best of 1 to 16 MiB on two cores


@dataclass(eq=False)
class ItemClass:
    """Items that run as one batched product; tensors on the CPU, ``n`` items, ``Q`` queries, ``L`` KV tokens.

    Attributes:
        queries: [n, Q] int64 row of q; padded with the item's first query.
        entry: [n, L] int64 entry of the KV slot list; padded with an entry of the same item, so no other is read.
        hidden: [n, 1 or Q, L] bool, True where the query must not see the token; None if all see all.
        kv_pos: [n, L] int64 KV position of each token, unless run B holds inline tails.
        open_row: [n] int64 row whose current length hides what lies beyond, or -1; None if no item grows.
        out_from: [m] int64 flat index (item * Q + query) of the results that write the output themselves.
        out_to: [m] int64 their row of the output.
        part_from, part_to: the same for those that go to partial rows.
        windowed: whether some query may see none of its item's tokens.
        slots: [n, L] int64 row of the KV pool, ``first_slot`` if a single item's slots follow each other, and
            ``hidden_now`` as ``hidden``: set by ``PackedReference.bind``.
    """

    queries: torch.Tensor
    entry: torch.Tensor
    hidden: torch.Tensor | None
    kv_pos: torch.Tensor
    open_row: torch.Tensor | None
    out_from: torch.Tensor
    out_to: torch.Tensor
    part_from: torch.Tensor
    part_to: torch.Tensor
    windowed: bool
    slots: torch.Tensor | None = None
    first_slot: int | None = None
    hidden_now: torch.Tensor | None = None


def _slabs(items: np.ndarray, length: np.ndarray, token_bytes: int) -> Iterator[np.ndarray]:
    """Index arrays of items that differ little in length and query count, each at most ``SLAB_BYTES`` of keys."""
    if not len(items):
        return
    # padding wastes at most half of a class in each direction
    octave = np.ceil(np.log2(length)).astype(np.int64) * 64 + np.ceil(np.log2(items[:, Col.Q_CNT])).astype(np.int64)
    order = np.lexsort((length, octave))
    for group in np.split(order, np.flatnonzero(np.diff(octave[order])) + 1):
        per_slab = max(1, SLAB_BYTES // int(length[group].max() * token_bytes))
        yield from np.split(group, range(per_slab, len(group), per_slab))


def _item_class(plan: Plan, items: np.ndarray, a_len: np.ndarray) -> ItemClass:
    b_len, q_count = items[:, Col.B_LEN], items[:, Col.Q_CNT]
    total = a_len + b_len
    q_at, kv_at = np.arange(q_count.max()), np.arange(total.max())
    live = q_at < q_count[:, None]
    slot = items[:, Col.Q_OFF, None] + np.where(live, q_at, 0)
    in_a = kv_at < a_len[:, None]
    exists = kv_at < total[:, None]
    entry = np.where(in_a, items[:, Col.A_OFF, None] + kv_at, items[:, Col.B_OFF, None] + kv_at - a_len[:, None])
    entry = np.where(exists, entry, entry[:, :1])
    hidden = None
    if b_len.any():
        j = (kv_at - a_len[:, None])[:, None, :]
        in_window = (plan.win_lo[slot][:, :, None] <= j) & (j < plan.win_hi[slot][:, :, None])
        hidden = torch.from_numpy(~(in_a[:, None, :] | in_window) | ~exists[:, None, :])
    elif not exists.all():
        hidden = torch.from_numpy(~exists[:, None, :])
    open_row = items[:, Col.OPEN_ROW]
    first_partial = plan.partial_rows[slot]
    direct, partial = live & (first_partial < 0), live & (first_partial >= 0)
    partial_row = first_partial + items[:, Col.SPLIT, None]
    as_index = lambda a: torch.from_numpy(np.ascontiguousarray(a, np.int64))  # noqa: E731
    return ItemClass(
        queries=as_index(plan.query_rows[slot]),
        entry=as_index(entry),
        hidden=hidden,
        kv_pos=as_index(items[:, Col.A_POS, None] + kv_at),
        open_row=as_index(open_row) if (open_row >= 0).any() else None,
        out_from=as_index(np.flatnonzero(direct)),
        out_to=as_index(plan.query_rows[slot][direct]),
        part_from=as_index(np.flatnonzero(partial)),
        part_to=as_index(partial_row[partial]),
        windowed=bool(b_len.any() and hidden is not None and hidden.all(2).any()),
    )


def _query_slots(items: np.ndarray) -> np.ndarray:
    """[m] int64: the query slots of ``items``, one after the other."""
    ranges = [np.arange(off, off + count) for off, count in items[:, [Col.Q_OFF, Col.Q_CNT]].tolist()]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


class PackedReference:
    """A plan made ready for torch: ``bind`` it to KV slots once per step, ``run`` it for each layer."""

    def __init__(self, plan: Plan, *, token_bytes: int, room_tokens: int = 0) -> None:
        """Sort the plan's items into classes.

        Args:
            plan: the work items.
            token_bytes: bytes of one token's keys in float32, which sets how many items fit a slab.
            room_tokens: how far the plan's open items may grow (``make_plan``).
        """
        self.plan = plan
        items = plan.items.astype(np.int64)
        is_open = items[:, Col.OPEN_ROW] >= 0
        a_len = items[:, Col.A_LEN] + np.where(is_open, room_tokens, 0)
        length = a_len + items[:, Col.B_LEN]
        (seen,) = (length > 0).nonzero()
        parts = _slabs(items[seen], length[seen], token_bytes)
        self.classes = [_item_class(plan, items[seen[part]], a_len[seen[part]]) for part in parts]
        # items without KV tokens write the empty state
        empty = _query_slots(items[length == 0])
        first_partial = plan.partial_rows[empty]
        self._empty_out = torch.from_numpy(plan.query_rows[empty[first_partial < 0]]).long()
        # where the results of all classes, one after the other behind an empty state, hold each partial row
        self._part_at = torch.zeros(plan.n_partials, dtype=torch.int64)
        offset = 1
        for c in self.classes:
            self._part_at[c.part_to] = c.part_from + offset
            offset += c.queries.numel()
        indptr = torch.from_numpy(plan.merge_indptr).long()
        self._merged = torch.from_numpy(plan.merged)
        self._merge_indptr = torch.cat([indptr[:1], indptr[self._merged + 1]])

    def bind(self, kv_slots: torch.Tensor, kv_lens: torch.Tensor | None = None) -> None:
        """Look up the slots of every item.

        Args:
            kv_slots: [plan.kv_capacity] int64 slot list that the items point into; entries beyond a row's length
                must be slots of finite KV, they are read and masked.
            kv_lens: [n_rows] current length of each row, if the plan has open items.
        """
        for c in self.classes:
            c.slots = kv_slots[c.entry]
            run = len(c.slots) == 1 and bool((c.slots[0, 1:] == c.slots[0, :-1] + 1).all())
            c.first_slot = int(c.slots[0, 0]) if run else None
            c.hidden_now = c.hidden
            if c.open_row is not None:
                assert kv_lens is not None, "a plan with open items needs the current lengths"
                limit = torch.where(c.open_row >= 0, kv_lens[c.open_row].long(), torch.iinfo(torch.int64).max)
                beyond = (c.kv_pos >= limit[:, None])[:, None, :]
                c.hidden_now = beyond if c.hidden is None else c.hidden | beyond

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        v_scale: float = 1.0,
        mask: MaskRows | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every query over its row's KV, each span read once for its group.

        Args:
            q: [n_queries, qo_heads, head_dim] float.
            k, v: [slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim] (any strides), float, of 8 bits
                as well.
            sm_scale: factor of the logits before the softmax.
            logits_soft_cap: cap ``c`` in ``c * tanh(logits / c)``; 0 for none.
            v_scale: factor of the values.
            mask: custom mask, of what the plan lets a query see; no tails may ride in that plan.
            sinks: [qo_heads] float, see ``Runner.run``.
            out: [n_queries, qo_heads, head_dim] where to write; default: a new tensor of q's dtype.

        Returns:
            out, and lse2 [n_queries, qo_heads] float32 (-inf, or the sink, with an all-zero output for a query that
            sees nothing).

        Raises:
            ValueError: sinks of another shape or type.
        """
        n_queries, qo_heads, head_dim = q.shape
        out = torch.empty_like(q) if out is None else out
        lse2 = torch.empty(n_queries, qo_heads, dtype=torch.float32)
        out[self._empty_out] = 0
        lse2[self._empty_out] = -math.inf
        if sinks is not None:
            check_sinks(sinks, qo_heads)
            lse2[self._empty_out] = sinks.float() * LOG2_E
        # results of all classes, after one empty state
        results = [(torch.zeros(1, qo_heads, head_dim), torch.full((1, qo_heads), -math.inf))]
        for c in self.classes:
            assert c.slots is not None, "bind the plan to KV slots first"
            hidden = c.hidden_now
            if mask is not None:
                unseen = ~mask.mask[_mask_index(mask, c)]
                hidden = unseen if hidden is None else hidden | unseen
            keys, values = _rows(k, c.slots, c.first_slot), _rows(v, c.slots, c.first_slot)
            if logits_soft_cap > 0 or mask is not None or c.windowed:
                o, lse = _attend(q[c.queries], keys, values, hidden, sm_scale, logits_soft_cap)
            else:
                o, lse = _attend_fused(q[c.queries], keys, values, hidden, sm_scale)
            o = o if v_scale == 1 else o * v_scale
            if len(c.out_from):
                _write(out, lse2, c.out_to, o[c.out_from], lse[c.out_from], sinks)
            results.append((o, lse))
        if len(self._part_at):
            o, lse = (torch.cat(x) for x in zip(*results))
            o, lse = merge_states(o, lse, self._part_at, self._merge_indptr)
            _write(out, lse2, self._merged, o, lse, sinks)
        return out, lse2


def _write(
    out: torch.Tensor,
    lse2: torch.Tensor,
    rows: torch.Tensor,
    o: torch.Tensor,
    o_lse2: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    """Finished results of ``rows`` [n] of the output, to it; here the sink comes in, once for each query and head."""
    if sinks is not None:
        o, o_lse2 = with_sinks(o, o_lse2, sinks)
    out[rows] = o.to(out.dtype)
    lse2[rows] = o_lse2


def _mask_index(mask: MaskRows, c: ItemClass) -> torch.Tensor:
    """[n, Q, L] index into the flat mask; padding points at a valid entry and is hidden anyway."""
    index: torch.Tensor = mask.row_start[c.queries][:, :, None] + c.kv_pos[:, None, :]
    return index.clamp_(max=len(mask.mask) - 1)


def _rows(cache: torch.Tensor, slots: torch.Tensor, first_slot: int | None) -> torch.Tensor:
    """[n, L, kv_heads, head_dim] float32 from a pool of slots or of pages; a run of slots is not copied."""
    # torch 2.11's fused product takes the last dimension for contiguous, whatever its stride
    if cache.dim() == 3 and first_slot is not None and cache.stride(2) == 1:
        rows = cache[None, first_slot : first_slot + slots.shape[1]]
    elif cache.dim() == 3:
        rows = cache.index_select(0, slots.view(-1)).view(*slots.shape, *cache.shape[1:])
    else:
        rows = cache[slots // cache.shape[1], slots % cache.shape[1]]
    return rows.float()


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    sm_scale: float,
    logits_soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, Q, qo_heads, D], k and v [n, L, kv_heads, D] -> o [n * Q, qo_heads, D], lse2 [n * Q, qo_heads], float32."""
    n, n_q, qo_heads, d = q.shape
    kv_heads, length = k.shape[2], k.shape[1]
    group = qo_heads // kv_heads
    # one product per KV head: keys stay where the gather put them, [L, D] with a stride of all heads
    qh = q.float().mul(sm_scale * LOG2_E).view(n, n_q, kv_heads, group, d).permute(2, 0, 1, 3, 4)
    qh = qh.reshape(kv_heads, n, n_q * group, d)
    s = torch.stack([torch.bmm(qh[h], k[:, :, h].transpose(1, 2)) for h in range(kv_heads)])
    if logits_soft_cap > 0:
        cap2 = logits_soft_cap * LOG2_E
        s = s.div_(cap2).tanh_().mul_(cap2)
    if hidden is not None:
        s.view(kv_heads, n, n_q, group, length).masked_fill_(hidden[None, :, :, None, :], -math.inf)
    top = s.amax(-1, keepdim=True)
    p = s.sub_(torch.where(top.isinf(), 0.0, top)).exp2_()
    total = p.sum(-1, keepdim=True)
    o = torch.stack([torch.bmm(p[h], v[:, :, h]) for h in range(kv_heads)])
    # a row that sees nothing has total 0: output 0 and lse2 -inf
    o = o.div_(torch.where(total == 0, 1.0, total))
    lse2 = top + total.log2()
    by_query = lambda x: x.view(kv_heads, n, n_q, group, -1).permute(1, 2, 0, 3, 4).reshape(n * n_q, qo_heads, -1)  # noqa: E731
    return by_query(o), by_query(lse2)[..., 0]


def _attend_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_attend`` where every query sees a token, by torch's fused kernel: one parallel region instead of ten.

    On a few cores the barriers between small products take longer than the products.
    """
    n, n_q, qo_heads, d = q.shape
    kv_heads, length = k.shape[2], k.shape[1]
    group = qo_heads // kv_heads
    qh = q.float().view(n, n_q, kv_heads, group, d).transpose(1, 2).reshape(n, kv_heads, n_q * group, d)
    bias = None
    if hidden is not None:
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        bias = bias[:, None, :, None].expand(n, 1, n_q, group, length).reshape(n, 1, n_q * group, length)
    o, lse_e = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        qh, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias, scale=sm_scale
    )
    o = o.view(n, kv_heads, n_q, group, d).transpose(1, 2).reshape(n * n_q, qo_heads, d)
    lse_e = lse_e.view(n, kv_heads, n_q, group).transpose(1, 2).reshape(n * n_q, qo_heads)
    return o, lse_e * LOG2_E


def merge_states(
    o: torch.Tensor, lse2: torch.Tensor, at: torch.Tensor, indptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.merge_states``."""
    merged = _merge(o.contiguous().numpy(), lse2.contiguous().numpy(), at.numpy(), indptr.numpy())
    return torch.from_numpy(merged[0]), torch.from_numpy(merged[1])


# Compiled, and that when it is defined: as ten small tensor operations it took a tenth of a decode step.
@njit("(f4[:, :, ::1], f4[:, ::1], i8[::1], i8[::1])", cache=True)
def _merge(o, lse2, at, indptr):  # type: ignore[no-untyped-def]
    n, (_, heads, head_dim) = len(indptr) - 1, o.shape
    merged = np.zeros((n, heads, head_dim), np.float32)
    merged_lse2 = np.full((n, heads), -np.inf, np.float32)
    for i in range(n):
        rows = at[indptr[i] : indptr[i + 1]]
        for head in range(heads):
            top = np.float32(-np.inf)
            for row in rows:
                top = max(top, lse2[row, head])
            if top == -np.inf:
                continue
            total = np.float32(0)
            for row in rows:
                total += np.exp2(lse2[row, head] - top)
            for row in rows:
                weight = np.exp2(lse2[row, head] - top) / total
                for d in range(head_dim):
                    merged[i, head, d] += weight * o[row, head, d]
            merged_lse2[i, head] = top + np.log2(total)
    return merged, merged_lse2
