"""Decode batches for scripts/bench_kernels.py, and their inputs in device memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from packinfer_sgl.groups import AttentionShape

HEAD_DIM = 128
BYTES_PER_US = 4.3e6  # what a large copy reaches on an H200
L2_BYTES = 60 << 20


@dataclass
class Workload:
    """Requests at decode: ``paths[r]`` are the shared nodes of request ``r``, ``tails[r]`` its private KV tokens."""

    name: str
    qo_heads: int
    kv_heads: int
    node_tokens: list[int]
    paths: list[list[int]]
    tails: list[int]
    shape: AttentionShape = field(init=False)

    def __post_init__(self) -> None:
        self.shape = AttentionShape(self.qo_heads, self.kv_heads, HEAD_DIM, 2)

    @property
    def kv_lens(self) -> np.ndarray:
        return np.array([sum(self.node_tokens[n] for n in p) + t for p, t in zip(self.paths, self.tails)], np.int32)

    @property
    def unique_tokens(self) -> int:
        return sum(self.node_tokens) + sum(self.tails)

    @property
    def floor_us(self) -> float:
        kv = self.unique_tokens * self.kv_heads * HEAD_DIM * 4
        return (kv + 4 * len(self.paths) * self.qo_heads * HEAD_DIM) / BYTES_PER_US


def tree_workload(name: str, heads: tuple[int, int], nodes: list[int], tokens: list[int], jitter: int = 0) -> Workload:
    """``nodes[i]`` nodes of ``tokens[i]`` tokens at level ``i``; the last level are the requests' tails."""
    rng = np.random.default_rng(7)
    first = np.cumsum([0, *nodes[:-1]]).tolist()
    n = nodes[-1]
    paths = [[first[level] + r * nodes[level] // n for level in range(len(nodes) - 1)] for r in range(n)]
    tails = [tokens[-1] + (int(rng.integers(-jitter, jitter + 1)) if jitter else 0) for _ in range(n)]
    return Workload(name, *heads, [t for c, t in zip(nodes[:-1], tokens) for _ in range(c)], paths, tails)


def workloads() -> list[Workload]:
    rng = np.random.default_rng(7)
    flat = lambda name, lens: Workload(name, 32, 8, [], [[]] * len(lens), [int(x) for x in lens])  # noqa: E731
    return [
        tree_workload("D1 16k prefix, 64 x 512", (32, 8), [1, 64], [16384, 512], 128),
        tree_workload("D2 8 groups of 2k, 64 x 256", (32, 8), [8, 64], [2048, 256], 64),
        tree_workload("D3 three levels", (32, 8), [1, 8, 64], [2048, 1024, 256], 64),
        flat("D4 unequal 100 to 32k", np.exp(rng.uniform(np.log(100), np.log(32768), 64))),
        flat("D5 64 x 2k", [2048] * 64),
        flat("D6 short 32 to 1k, batch 128", rng.integers(32, 1025, 128)),
        tree_workload("D7 4k prefix, 256 x 128", (32, 8), [1, 256], [4096, 128], 64),
        tree_workload("D8 8/1 heads, 16k, 64 x 512", (8, 1), [1, 64], [16384, 512], 128),
        tree_workload("D9 MHA 2k, 64 x 256", (16, 16), [1, 64], [2048, 256], 64),
        tree_workload("D10 8k prefix, 8 x 256", (32, 8), [1, 8], [8192, 256], 64),
        tree_workload("D11 PAT 1,4,16,512", (32, 8), [1, 4, 16, 512], [1024, 256, 128, 32]),
        tree_workload("E2 2k prefix, 64 x 192", (32, 8), [1, 64], [2048, 192]),  # scripts/bench_engine.py, half-way
    ]


class Inputs:
    """A workload in device memory: copies of q, K and V that together exceed the L2 cache, and its slots."""

    def __init__(self, work: Workload, contiguous: bool, align: int = 64) -> None:
        self.work, rng = work, np.random.default_rng(1)
        spans = [*work.node_tokens, *work.tails]
        room = [-(-t // align) * align for t in spans]  # every span begins a page, whatever the page size
        offsets = np.cumsum([0, *room])
        self.n_slots = int(offsets[-1]) + align
        slot_of = np.arange(self.n_slots) if contiguous else rng.permutation(self.n_slots)
        self.spans = [slot_of[o : o + t].astype(np.int32) for o, t in zip(offsets, spans)]
        self.contiguous, self.offsets = contiguous, offsets
        kv_bytes = self.n_slots * work.kv_heads * HEAD_DIM * 4
        self.copies = min(24, max(2, -(-7 * L2_BYTES // kv_bytes)))
        make = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        n = len(work.paths)
        self.q = [make(n, work.qo_heads, HEAD_DIM) for _ in range(self.copies)]
        self.k = [make(self.n_slots, work.kv_heads, HEAD_DIM) for _ in range(self.copies)]
        self.v = [make(self.n_slots, work.kv_heads, HEAD_DIM) for _ in range(self.copies)]
        self.out = [torch.empty_like(q) for q in self.q]
        n_nodes = len(work.node_tokens)
        self.rows = [
            np.concatenate([*(self.spans[i] for i in path), self.spans[n_nodes + r]])
            for r, path in enumerate(work.paths)
        ]
        self.sm_scale = HEAD_DIM**-0.5

    def reference(self) -> torch.Tensor:
        """Attention of copy 0 in float32, request by request."""
        outs = []
        group = self.work.qo_heads // self.work.kv_heads
        for r, slots in enumerate(self.rows):
            at = torch.from_numpy(slots).long().cuda()
            k, v = (x[0][at].float().repeat_interleave(group, 1).transpose(0, 1) for x in (self.k, self.v))
            p = ((k @ self.q[0][r].float()[:, :, None])[..., 0] * self.sm_scale).softmax(-1)
            outs.append((p[:, None] @ v)[:, 0])
        return torch.stack(outs)

    def page_lists(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> list[np.ndarray]:
        """Page numbers of each request (or of each list of spans); spans lie contiguous if pages have many tokens."""
        assert page_size == 1 or (self.contiguous and all(t % page_size == 0 for t in self.work.node_tokens))
        rows = rows or [[row] for row in self.rows]
        return [np.concatenate([span[::page_size] // page_size for span in row]) for row in rows]

    def paged(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> tuple[torch.Tensor, ...]:
        """FlashInfer's indptr, indices and last page lengths, on the GPU."""
        lists = self.page_lists(page_size, rows)
        tokens = [sum(map(len, row)) for row in rows] if rows else [len(row) for row in self.rows]
        indptr = np.cumsum([0, *map(len, lists)])
        last = [(t - 1) % page_size + 1 for t in tokens]
        return tuple(
            torch.tensor(np.asarray(x), dtype=torch.int32).cuda() for x in (indptr, np.concatenate(lists), last)
        )

    def table(self, page_size: int, rows: list[list[np.ndarray]] | None = None) -> torch.Tensor:
        """FA3's page table [n, pages], on the GPU."""
        lists = self.page_lists(page_size, rows)
        table = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.int32)
        for i, row in enumerate(lists):
            table[i, : len(row)] = torch.from_numpy(row)
        return table.cuda()

    def caches(self, i: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        n = self.n_slots // page_size
        k, v = (x[i][: n * page_size].view(n, page_size, self.work.kv_heads, HEAD_DIM) for x in (self.k, self.v))
        return k, v
