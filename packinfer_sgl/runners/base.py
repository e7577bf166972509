"""What a runner is: it runs plans on one device."""

from __future__ import annotations

from typing import Protocol

import torch

from packinfer_sgl.kernels.reference import MaskRows
from packinfer_sgl.planning.batch import SlotTable
from packinfer_sgl.planning.plan import Plan


class Runner(Protocol):
    """Load a plan, then run it for each layer. Two exist: ``cpu.CpuRunner`` and ``cuda.CudaRunner``.

    The slot list that the kernels read is a snapshot of SGLang's table, taken when the plan is loaded: SGLang rewrites
    the table while they run. Steps that keep a plan enter their new slots by ``append``.
    """

    @property
    def kv_slots(self) -> torch.Tensor:
        """[at least plan.kv_capacity] int32 or int64: the slot list of the loaded plan, on the device."""

    def load(self, plan: Plan, table: SlotTable) -> None:
        """Make ``plan`` the one that runs, and look up its slots; on a GPU on the current stream.

        Raises:
            ValueError: the plan is larger than buffers of a fixed size.
        """

    def append(self, kv_lens: torch.Tensor, out_slots: torch.Tensor) -> None:
        """Enter each row's newest slot. May be captured.

        Args:
            kv_lens: [n] int KV tokens of each row, the new one included, on the device.
            out_slots: [n] int slot of the new token, on the device.
        """

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_lens: torch.Tensor | None = None,
        *,
        sm_scale: float,
        logits_soft_cap: float,
        v_scale: float = 1.0,
        mask: MaskRows | None = None,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of every query over its row's KV in one layer. May be captured.

        Args:
            q: [n_queries, qo_heads, head_dim], on CUDA bfloat16 or float16; rows past the plan's queries are padding,
                and come out as 0.
            k, v: [slots, kv_heads, head_dim], or [pages, page_size, kv_heads, head_dim] of the table's page size, on
                CUDA of q's dtype or float8_e4m3fn.
            kv_lens: [n] int current KV tokens of each row, on the device, if rows grow under the plan.
            sm_scale: factor of the logits before the softmax; that of FP8 keys is part of it.
            logits_soft_cap: cap ``c`` in ``c * tanh(logits / c)``; 0 for none.
            v_scale: factor of the values.
            mask: what queries see of what the plan lets them see.
            sinks: [qo_heads] float32, bfloat16 or float16, on q's device: the logit (base e, not multiplied by
                ``sm_scale``, not capped) of a virtual token without a value that every query of the head sees.
            out: where to write, as q; default: a new tensor.

        Returns:
            out, and lse2 [n_queries, qo_heads] float32, undefined for padding. It counts the sink, as FlashInfer's and
            FlashAttention's do: a query that sees nothing has an output of 0, and -inf or its sink in base 2.

        Raises:
            ValueError: sinks of another shape or type.
        """
