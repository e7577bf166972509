"""Checks of slots for the setting ``check``: that groups share them, and that kernels read those of SGLang's table."""

from __future__ import annotations

import numpy as np
import torch

from packinfer_sgl.planning.audit import check_reads
from packinfer_sgl.planning.batch import SlotTable, StepBatch
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.prefix_tree import PrefixTree


def check_shared_slots(tree: PrefixTree, table: SlotTable) -> None:
    """Raise RuntimeError unless the rows of each node hold equal slots."""
    order = torch.from_numpy(tree.row_order).long().to(table.rows.device)
    held_by = table.entries[table.rows.long()[order]]
    for i in range(tree.n_nodes):
        held = held_by[tree.row_lo[i] : tree.row_hi[i], tree.start[i] : tree.end[i]]
        if not bool((held == held[0]).all()):
            raise RuntimeError(
                f"packinfer: requests grouped on tokens {tree.start[i]} to {tree.end[i]} hold different KV slots; "
                "please report this with the SGLang version"
            )


def audit_reads(plan: Plan, kv_slots: torch.Tensor, batch: StepBatch, *, newest_is_there: bool) -> None:
    """Raise RuntimeError unless the kernels will read the slots of SGLang's table. Waits for a GPU.

    Args:
        kv_slots: the slot list of ``plan`` that the kernels read.
        newest_is_there: see ``check_reads``.
    """
    assert batch.table is not None
    held = batch.table.held(batch.kv_lens)
    row = np.repeat(np.arange(batch.n_rows, dtype=np.int32), batch.q_lens)
    nth = np.arange(len(row)) - batch.qo_indptr[row]
    seen = batch.kv_lens[row] - (batch.q_lens[row] - 1 - nth)
    check_reads(plan, kv_slots.cpu().numpy(), held, row, seen.astype(np.int32), newest_is_there=newest_is_there)
