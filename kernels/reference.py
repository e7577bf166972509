"""The meaning of the kernels in plain torch, written to be read: one work item after the other, in float32.

``lse2`` is the log-sum-exp in base 2. The empty state is an output of 0 with an lse2 of -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from packinfer_sgl.planning.plan import Chain, Col, Plan

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class MaskRows:
    """FlashInfer's flattened custom mask: query ``i`` sees KV position ``p`` iff ``mask[row_start[i] + p]``.

    Attributes:
        mask: [sum of qo_len * kv_len] bool.
        row_start: [n_queries] int64.
    """

    mask: torch.Tensor
    row_start: torch.Tensor


def packed_attention(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_slots: torch.Tensor,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    v_scale: float = 1.0,
    kv_lens: torch.Tensor | None = None,
    mask: MaskRows | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query of a plan over its row's KV. All tensors on the CPU.

    Args:
        q: [n_queries, qo_heads, head_dim] float.
        k, v: [slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim], float, of 8 bits as
            well.
        kv_slots: [plan.kv_capacity] int64 slot list that the items point into.
        sm_scale: factor of the logits before the softmax.
        logits_soft_cap: cap ``c`` in ``c * tanh(logits / c)``; 0 for none.
        v_scale: factor of the values.
        kv_lens: [n_rows] current length of each row, if the plan has items that grow.
        mask: custom mask, of what the plan lets a query see; no tails may ride in that plan.
        sinks: [qo_heads] float, see ``Runner.run``.

    Returns:
        out [n_queries, qo_heads, head_dim] and lse2 [n_queries, qo_heads], float32.
    """
    k, v = (x.float().reshape(-1, *x.shape[-2:]) for x in (k, v))
    v = v * v_scale
    out, lse2 = torch.zeros(q.shape), torch.full(q.shape[:2], -math.inf)
    part_out = torch.zeros(plan.n_partials, *q.shape[1:])
    part_lse2 = torch.full(part_out.shape[:2], -math.inf)
    for item in plan.items.astype(np.int64):
        query_slots = slice(item[Col.Q_OFF], item[Col.Q_OFF] + item[Col.Q_CNT])
        queries = torch.from_numpy(plan.query_rows[query_slots]).long()
        entries, seen = _what_is_seen(plan, item, query_slots, kv_lens)
        if mask is not None:
            positions = item[Col.A_POS] + torch.arange(len(entries))
            index = mask.row_start[queries][:, None] + positions
            seen = seen & mask.mask[index.clamp(max=len(mask.mask) - 1)]
        slots = kv_slots[entries]
        o, lse = attention(q[queries], k[slots], v[slots], seen, sm_scale, logits_soft_cap)
        part = torch.from_numpy(plan.partial_rows[query_slots]).long()
        rows = torch.where(part < 0, -2 - part, part + int(item[Col.SPLIT]))
        if item[Col.CHAIN] & Chain.GOES_ON:  # items that hand a state on come before those that go on with it
            both = (
                torch.stack([part_out[rows], o], 1).flatten(0, 1),
                torch.stack([part_lse2[rows], lse], 1).flatten(0, 1),
            )
            o, lse = merge_states(*both, torch.arange(2 * len(rows)), torch.arange(0, 2 * len(rows) + 1, 2))
        direct = (part < 0) & ~torch.tensor(bool(item[Col.CHAIN] & Chain.HANDS_ON))
        out[queries[direct]], lse2[queries[direct]] = o[direct], lse[direct]
        part_out[rows[~direct]], part_lse2[rows[~direct]] = o[~direct], lse[~direct]
    merged = torch.from_numpy(plan.merged)
    if len(merged):
        indptr = torch.from_numpy(plan.merge_indptr).long()
        indptr = torch.cat([indptr[:1], indptr[merged + 1]])
        out[merged], lse2[merged] = merge_states(part_out, part_lse2, torch.arange(int(indptr[-1])), indptr)
    # once for each query and head, whether its result came from one item or from several
    return (out, lse2) if sinks is None else with_sinks(out, lse2, sinks)


def _what_is_seen(
    plan: Plan, item: np.ndarray, query_slots: slice, kv_lens: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """An item's [tokens] entries of the slot list, run A and then run B, and [queries, tokens] who sees what."""
    a_len, b_len = int(item[Col.A_LEN]), int(item[Col.B_LEN])
    if item[Col.OPEN_ROW] >= 0:  # run A ends at the row's current length
        assert kv_lens is not None, "a plan with open items needs the current lengths"
        a_len = int(kv_lens[item[Col.OPEN_ROW]] - item[Col.A_POS])
    entries = np.concatenate([item[Col.A_OFF] + np.arange(a_len), item[Col.B_OFF] + np.arange(b_len)])
    j = np.arange(b_len)
    in_window = (plan.win_lo[query_slots, None] <= j) & (j < plan.win_hi[query_slots, None])
    in_a = np.ones((len(in_window), a_len), bool)
    return torch.from_numpy(entries), torch.from_numpy(np.concatenate([in_a, in_window], 1))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    sm_scale: float,
    logits_soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [n, qo_heads, D], k and v [L, kv_heads, D], seen [n, L] -> out [n, qo_heads, D], lse2 [n, qo_heads]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("qhd,lhd->qhl", q.float(), k) * sm_scale
    if logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    logits = logits.masked_fill(~seen[:, None, :], -math.inf)
    lse_e = logits.logsumexp(-1)
    weights = torch.exp(logits - torch.where(lse_e.isinf(), 0.0, lse_e)[..., None])  # 0 for who sees nothing
    return torch.einsum("qhl,lhd->qhd", weights, v), lse_e * LOG2_E


def merge_states(
    o: torch.Tensor, lse2: torch.Tensor, at: torch.Tensor, indptr: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine partial attention results: the softmax over the union of what they saw.

    Args:
        o: [n_partials, heads, head_dim] float32.
        lse2: [n_partials, heads] float32, base-2 log-sum-exp; the empty state is ``(0, -inf)``.
        at: [indptr[-1]] int64 rows of both.
        indptr: [n + 1] int64; result ``i`` combines the rows ``at[indptr[i]:indptr[i + 1]]``, at least one.

    Returns:
        [n, heads, head_dim] and [n, heads] float32; empty states combine to the empty state.
    """
    outs, lses = [], []
    for begin, end in zip(indptr[:-1].tolist(), indptr[1:].tolist()):
        rows = at[begin:end]
        top = lse2[rows].amax(0)
        weights = torch.exp2(lse2[rows] - torch.where(top.isinf(), 0.0, top))
        total = weights.sum(0)
        outs.append((weights[..., None] * o[rows]).sum(0) / torch.where(total == 0, 1.0, total)[..., None])
        lses.append(top + total.log2())
    return torch.stack(outs), torch.stack(lses)


def fits_sinks(sinks: torch.Tensor, qo_heads: int) -> bool:
    """Whether there is one float32, float16 or bfloat16 for each query head."""
    return tuple(sinks.shape) == (qo_heads,) and sinks.dtype in (torch.float32, torch.float16, torch.bfloat16)


def check_sinks(sinks: torch.Tensor, qo_heads: int) -> None:
    """Raise ValueError unless ``fits_sinks``."""
    if not fits_sinks(sinks, qo_heads):
        raise ValueError(
            f"sinks must be one float32, float16 or bfloat16 for each of {qo_heads} query heads, are {sinks.dtype} "
            f"{tuple(sinks.shape)}"
        )


def with_sinks(o: torch.Tensor, lse2: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finished results with one more token in each softmax, of the head's sink as logit and without a value.

    Args:
        o: [n, heads, head_dim] float32.
        lse2: [n, heads] float32.
        sinks: [heads] float, in natural-log units.

    Returns:
        The same of both; what saw nothing has an output of 0 and its sink as lse2.
    """
    with_sink = torch.logaddexp2(lse2, sinks.float() * LOG2_E)
    seen = torch.exp2(lse2 - torch.where(with_sink.isinf(), 0.0, with_sink))  # weight of all that has a value
    return o * seen[..., None], with_sink


def copy_slots(buffers: Sequence[torch.Tensor], slots: torch.Tensor, to: int) -> None:
    """Copy ``slots`` ([n] int) to slots ``to`` to ``to + n - 1`` of each buffer ([slots, kv_heads, head_dim])."""
    for buffer in buffers:
        buffer[to : to + len(slots)] = buffer[slots.long()]
