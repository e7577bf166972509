"""What one forward pass is: the record that planners, runners and the router pass on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numba import njit

from packinfer_sgl.planning.prefix_tree import Int32, PrefixTree

if TYPE_CHECKING:
    import torch


class Requests(Protocol):
    """The requests of a batch, in row order; equal to those of the next step while all of them hold the same slots, up
    to the tokens that decode steps appended (``serving.batch_rows.BatchRows``)."""

    def prefix_tree(self) -> PrefixTree | None:
        """Who shares what, or None if they cannot tell."""


class SlotTable(NamedTuple):
    """Where the KV slots of a batch's rows are written down: SGLang's ``req_to_token``, or FlashInfer's page tables.

    Attributes:
        entries: [pool rows, max context] int32 slots; or [pages] int32, FlashInfer's ``indices``.
        rows: [n] row of ``entries`` of each row of the batch; or [n + 1] int32, FlashInfer's ``indptr``.
        page_size: tokens of an entry.
    """

    entries: torch.Tensor
    rows: torch.Tensor
    page_size: int = 1

    @property
    def is_paged(self) -> bool:
        """Whether these are page tables."""
        return self.entries.dim() == 1

    def held(self, kv_lens: Int32) -> list[Int32]:
        """The slots of each row's KV tokens, int32, on the CPU. Row by row: a GPU may have no memory to spare."""
        assert not self.is_paged
        rows = zip(self.rows.tolist(), kv_lens.tolist())
        return [self.entries[row, :n].cpu().numpy() for row, n in rows]


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One forward pass. A row is a request, or a beam of one.

    Attributes:
        q_lens: [n] int32 new tokens of each row, its last ones: its queries.
        kv_lens: [n] int32 KV tokens of each row, the new ones included.
        requests: None if SGLang did not say which they are.
        table: where the slots of the rows stand.
        kv_lens_device: [n] ``kv_lens`` where the kernels run, if rows will grow under the plan.
        out_slots: [n] slots of the new tokens, likewise, unless a captured graph enters them (``Runner.append``).
        visible: [n_queries] int32 first KV position that each query sees, and the one after its last; None: all of its
            row (decode).
        unique_tokens: the least KV tokens that any kernel reads; default: what ``tree`` says.
        row_tokens: new tokens of each row, where all have as many and that is known; else 0.
        finds_slots: whether equal slots are looked at where the requests cannot tell who shares what.
    """

    q_lens: Int32
    kv_lens: Int32
    requests: Requests | None = None
    table: SlotTable | None = None
    kv_lens_device: torch.Tensor | None = None
    out_slots: torch.Tensor | None = None
    visible: tuple[Int32, Int32] | None = None
    unique_tokens: int | None = None
    row_tokens: int = 0
    finds_slots: bool = False

    @property
    def n_rows(self) -> int:
        return len(self.kv_lens)

    @property
    def n_queries(self) -> int:
        return self.row_tokens * self.n_rows if self.row_tokens else sum(self.q_lens.tolist())

    @property
    def is_one_each(self) -> bool:
        """Whether each row has one new token."""
        return self.row_tokens == 1 or self.q_lens.tolist().count(1) == self.n_rows

    @cached_property
    def qo_indptr(self) -> Int32:
        """[n + 1] int32 where the queries of each row begin."""
        indptr = np.zeros(self.n_rows + 1, np.int32)
        np.cumsum(self.q_lens, out=indptr[1:])
        return indptr

    def tree(self) -> PrefixTree:
        """Who shares what, as far as it is known; else nobody shares anything."""
        tree = None if self.requests is None else self.requests.prefix_tree()
        if tree is None:
            tree = self.tree_by_slots() if self.finds_slots else PrefixTree.unshared(self.n_rows)
        return tree

    def tree_by_slots(self) -> PrefixTree:
        """Who shares what by the slots themselves: dear but complete. On a GPU it waits for them."""
        assert self.table is not None
        indptr = np.concatenate([[0], np.cumsum(self.kv_lens)]).astype(np.int32)
        slots = np.concatenate([np.zeros(0, np.int32), *self.table.held(self.kv_lens)])
        return PrefixTree.from_slots(indptr, slots, 1, self.kv_lens)


def causal(q_lens: Int32, kv_lens: Int32) -> tuple[Int32, Int32]:
    """``StepBatch.visible`` of new tokens that see those before them: prefill, and chains of drafts."""
    return _causal(q_lens, kv_lens)  # type: ignore[no-any-return]


@njit(cache=True)
def _causal(q_lens, kv_lens):  # type: ignore[no-untyped-def]
    n = q_lens.sum()
    see_from, see_to = np.zeros(n, np.int32), np.empty(n, np.int32)
    query = 0
    for row in range(len(q_lens)):
        for nth in range(q_lens[row]):
            see_to[query] = kv_lens[row] - q_lens[row] + nth + 1
            query += 1
    return see_from, see_to
