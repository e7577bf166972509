"""The inputs of a workload in device memory, and attention over them in float32."""

from __future__ import annotations

import numpy as np
import torch
from bench.kernel_workloads import Workload

FP8 = torch.float8_e4m3fn
L2_BYTES = 60 << 20
SCORES = 1 << 24  # of one head, that the reference holds at once


class Inputs:
    """A workload in device memory: copies of q, K and V that together exceed the L2 cache, and its slots."""

    def __init__(self, work: Workload, contiguous: bool, align: int = 64, device: str = "cuda") -> None:
        self.work, self.device, rng = work, device, np.random.default_rng(1)
        spans = [*work.node_tokens, *work.tails]
        room = [-(-t // align) * align for t in spans]  # every span begins a page, whatever the page size
        offsets = np.cumsum([0, *room])
        self.n_slots = int(offsets[-1]) + align
        slot_of = np.arange(self.n_slots) if contiguous else rng.permutation(self.n_slots)
        self.spans = [slot_of[o : o + t].astype(np.int32) for o, t in zip(offsets, spans)]
        self.contiguous, self.offsets = contiguous, offsets
        kv_bytes = self.n_slots * work.shape.token_bytes
        self.copies = min(24, max(2, -(-7 * L2_BYTES // kv_bytes)))
        make = lambda *size: torch.randn(*size, device=device, dtype=torch.bfloat16)  # noqa: E731
        self.q = [make(sum(work.new), work.qo_heads, work.head_dim) for _ in range(self.copies)]
        kv = lambda: make(self.n_slots, work.kv_heads, work.head_dim).to(FP8 if work.fp8 else torch.bfloat16)  # noqa: E731
        self.k = [kv() for _ in range(self.copies)]
        self.v = [kv() for _ in range(self.copies)]
        self.sinks = make(work.qo_heads) if work.sinks else None
        self.out = [torch.empty_like(q) for q in self.q]
        n_nodes = len(work.node_tokens)
        self.rows = [
            np.concatenate([*(self.spans[i] for i in path), self.spans[n_nodes + r]])
            for r, path in enumerate(work.paths)
        ]
        self.sm_scale = work.head_dim**-0.5

    def i32(self, values: object) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=self.device)

    def reference(self) -> torch.Tensor:
        """Attention of copy 0 in float32, request by request."""
        outs = []
        group = self.work.qo_heads // self.work.kv_heads
        indptr, see_to = self.work.qo_indptr.tolist(), self.i32(self.work.visible[1])
        for r, slots in enumerate(self.rows):
            at = self.i32(slots).long()
            k, v = (x[0][at].float().repeat_interleave(group, 1).transpose(0, 1) for x in (self.k, self.v))
            position = torch.arange(len(slots), device=self.device)
            step = max(1, SCORES // len(slots))
            for begin in range(indptr[r], indptr[r + 1], step):
                end = min(begin + step, indptr[r + 1])
                scores = self.q[0][begin:end].float().transpose(0, 1) @ k.transpose(1, 2) * self.sm_scale
                if cap := self.work.soft_cap:
                    scores = cap * (scores / cap).tanh()
                scores.masked_fill_(position >= see_to[begin:end, None], -torch.inf)
                if self.sinks is not None:  # a token without a value
                    scores = torch.cat([scores, self.sinks.float()[:, None, None].expand(-1, end - begin, 1)], -1)
                outs.append((scores.softmax(-1)[..., : len(slots)] @ v).transpose(0, 1))
        return torch.cat(outs)

    def page_lists(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> list[np.ndarray]:
        """Page numbers of each request (or of each list of spans); spans lie contiguous if pages have many tokens."""
        assert page_size == 1 or (self.contiguous and all(t % page_size == 0 for t in self.work.node_tokens))
        rows = rows or [[row] for row in self.rows]
        return [np.concatenate([span[::page_size] // page_size for span in row]) for row in rows]

    def paged(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> tuple[torch.Tensor, ...]:
        """FlashInfer's indptr, indices and last page lengths, on the device."""
        lists = self.page_lists(page_size, rows)
        tokens = [sum(map(len, row)) for row in rows] if rows else [len(row) for row in self.rows]
        indptr = np.cumsum([0, *map(len, lists)])
        last = [(t - 1) % page_size + 1 for t in tokens]
        return self.i32(indptr), self.i32(np.concatenate(lists)), self.i32(last)

    def table(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> torch.Tensor:
        """FA3's page table [n, pages], on the device."""
        lists = self.page_lists(page_size, rows)
        table = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
        for i, row in enumerate(lists):
            table[i, : len(row)] = torch.from_numpy(row)
        return table.to(self.device)

    def caches(self, i: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.n_slots // page_size
        k, v = (
            x[i][: n * page_size].view(n, page_size, self.work.kv_heads, self.work.head_dim) for x in (self.k, self.v)
        )
        return k, v
