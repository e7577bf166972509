"""A server in small: a pool, a radix tree that splits and evicts as SGLang's, a batch, and an arena."""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from strategies import attention64
from test_planner import EAGER

from packinfer_sgl.config import Config
from packinfer_sgl.kernels.copy_slots import SlotCopier
from packinfer_sgl.kernels.reference import copy_slots
from packinfer_sgl.planning.batch import SlotTable, StepBatch
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.planners import DecodePlanner
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.runners.arena import Arena
from packinfer_sgl.runners.cpu import ROOM_TOKENS, CpuRunner
from packinfer_sgl.serving.build import CudaPaths
from packinfer_sgl.serving.metrics import Stats
from packinfer_sgl.serving.packed_path import Kind, PackedPath

HEADS, LAYERS = 1, 2
CONTEXT, POOL_ROWS = 64, 12


@dataclass(eq=False)
class Node:
    """As in SGLang: a split gives the upper part a new id, and ids are given out once."""

    id: int
    parent: Node | None
    tokens: list[int]
    slots: list[int]
    children: list[Node] = field(default_factory=list)
    locks: int = 0

    def path(self) -> list[Node]:
        return [*self.parent.path(), self] if self.parent else []


@dataclass(eq=False)
class Request:
    row: int
    tokens: list[int]
    node: Node
    protected: int
    slots: list[int]


class Rows(NamedTuple):
    reqs: list[Request]
    rows: list[tuple[int, int, int]]

    def path(self, row: int) -> tuple[int, list[int], list[int]]:
        request = self.reqs[row]
        nodes = request.node.path()
        ends = torch.tensor([len(node.tokens) for node in nodes]).cumsum(0).tolist() if nodes else []
        return request.row, [node.id for node in nodes], ends

    def paths(self, rows: list[int]) -> list[tuple[int, list[int], list[int]]]:
        return [self.path(row) for row in rows]

    def prefix_tree(self) -> PrefixTree:
        paths = self.paths(list(range(len(self.reqs))))
        return PrefixTree.from_paths([tuple(ids) for _, ids, _ in paths], [tuple(ends) for *_, ends in paths])


class Server:
    """A pool, a tree and a batch; every slot is NaN until written, and holds other numbers each time."""

    def __init__(
        self, slots: int, arena: int, *, force: bool = False, gain: float = 1e9, dim: int = 8, kernels: bool = False,
        grouping: str = "multi",
    ) -> None:  # fmt: skip
        """``kernels``: decode by the Triton kernels, not by their reference."""
        self.dim = dim
        self.table = torch.zeros(POOL_ROWS, CONTEXT, dtype=torch.int32)
        self.buffers = [torch.full((slots + arena, HEADS, dim), math.nan) for _ in range(2 * LAYERS)]
        self.random = torch.Generator().manual_seed(0)
        self.free = torch.randperm(slots, generator=self.random).tolist()
        self.ids = iter(range(1 << 30))
        self.root = Node(next(self.ids), None, [], [])
        self.running: list[Request] = []
        copy = SlotCopier(self.buffers).copy if kernels else functools.partial(copy_slots, self.buffers)
        self.arena = Arena(
            range(slots, slots + arena), self.buffers, self.table, copy, gain=gain, tile_queries=8, force=force
        )
        self.stats = Stats()
        shape = AttentionShape(HEADS, HEADS, dim, 4)
        self.path: PackedPath
        if kernels:
            config = Config(grouping=grouping, check=True)
            self.path = CudaPaths(shape, config, self.stats, self.table, slots, self.arena).decode(POOL_ROWS)
        else:
            planner = DecodePlanner(
                shape, EAGER, TilePolicy((8, 1), 16), grouping=grouping, limits=Capacity.unlimited(),
                room_tokens=ROOM_TOKENS,
            )  # fmt: skip
            runner = CpuRunner(shape, room_tokens=ROOM_TOKENS)
            self.path = PackedPath(Kind.DECODE, planner, runner, self.stats, check=True, arena=self.arena)

    def nodes(self) -> list[Node]:
        found = [self.root]
        for node in found:
            found += node.children
        return found[1:]

    def alloc(self, n: int) -> list[int] | None:
        while len(self.free) < n:
            leaves = [node for node in self.nodes() if not node.children and not node.locks]
            if not leaves:
                return None
            self.evict(leaves[0])
        slots, self.free = self.free[:n], self.free[n:]
        for buffer in self.buffers:
            buffer[slots] = torch.randn(n, HEADS, self.dim, generator=self.random)
        return slots

    def release(self, slots: list[int]) -> None:
        for buffer in self.buffers:
            buffer[slots] = math.nan
        self.free += slots

    def evict(self, leaf: Node) -> None:
        leaf.parent.children.remove(leaf)
        self.release(leaf.slots)

    def match(self, tokens: list[int]) -> tuple[Node, int]:
        """The node that ends where ``tokens`` leave the tree, split off if need be, and how many tokens that are."""
        node, at = self.root, 0
        while True:
            below = next((c for c in node.children if at < len(tokens) and c.tokens[0] == tokens[at]), None)
            if below is None:
                return node, at
            n = 0
            while n < len(below.tokens) and at + n < len(tokens) and below.tokens[n] == tokens[at + n]:
                n += 1
            if n < len(below.tokens):
                upper = Node(next(self.ids), node, below.tokens[:n], below.slots[:n], [below], below.locks)
                node.children[node.children.index(below)] = upper
                below.parent, below.tokens, below.slots = upper, below.tokens[n:], below.slots[n:]
                return upper, at + n
            node, at = below, at + n

    def insert(self, tokens: list[int], slots: list[int]) -> Node:
        """Slots that the tree holds already are freed."""
        node, at = self.match(tokens)
        held = [slot for above in node.path() for slot in above.slots]
        self.release([slot for slot, kept in zip(slots[:at], held) if slot != kept])
        if at == len(tokens):
            return node
        leaf = Node(next(self.ids), node, tokens[at:], slots[at:])
        node.children.append(leaf)
        return leaf

    def lock(self, node: Node, by: int) -> None:
        for above in node.path():
            above.locks += by

    def start(self, tokens: list[int]) -> None:
        if len(self.running) == POOL_ROWS - 1:
            return
        node, at = self.match(tokens)
        self.lock(node, 1)
        own = self.alloc(len(tokens) - at)
        self.lock(node, -1)
        if own is None:
            return
        slots = [slot for above in node.path() for slot in above.slots] + own
        node = self.insert(tokens, slots)
        self.lock(node, 1)
        row = next(r for r in range(1, POOL_ROWS) if r not in {r.row for r in self.running})
        self.table[row, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
        self.running.append(Request(row, list(tokens), node, len(tokens), slots))

    def finish(self, request: Request, keep: bool) -> None:
        self.running.remove(request)
        self.lock(request.node, -1)
        if keep:
            self.insert(request.tokens, request.slots)
        else:
            self.release(request.slots[request.protected :])

    def flush(self) -> None:
        for request in list(self.running):
            self.finish(request, keep=False)
        for node in self.nodes():
            self.release(node.slots)
        self.root = Node(next(self.ids), None, [], [])
        self.arena.drop()

    def step(self) -> None:
        for request in list(self.running):
            slot = self.alloc(1)
            if slot is None:
                return self.finish(self.running[-1], keep=False)  # retracted
            self.table[request.row, len(request.slots)] = slot[0]
            request.slots += slot
            request.tokens.append(100 + request.row)
        if not self.running:
            return None
        rows = Rows(list(self.running), [(r.row, r.node.id, r.protected) for r in self.running])
        lens = torch.tensor([len(r.slots) for r in self.running])
        pool_rows = torch.tensor([r.row for r in self.running])
        new = torch.tensor([r.slots[-1] for r in self.running])
        self.path.step(self.batch(rows, pool_rows, lens, new))
        for k, v in zip(self.buffers[:LAYERS], self.buffers[LAYERS:]):
            q = torch.randn(len(lens), HEADS, self.dim, generator=self.random)
            expected = attention64(q, k, v, [r.slots for r in self.running], 0.3)[0]
            with self.arena.sources_hidden(k, v) if self.arena.force else nullcontext():
                got = self.path.run(q, k, v, lens, sm_scale=0.3, logits_soft_cap=0.0)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        self.check_accounts()
        return None

    def settle(self) -> None:
        """Forced copies are made in one step, and read from the next on."""
        self.step()
        self.step()

    def batch(self, rows: Rows | None, pool_rows: torch.Tensor, lens: torch.Tensor, new: torch.Tensor) -> StepBatch:
        return StepBatch(
            np.ones(len(lens), np.int32), lens.numpy().astype(np.int32), rows, SlotTable(self.table, pool_rows),
            kv_lens_device=lens, out_slots=new, finds_slots=True,
        )  # fmt: skip

    def check_accounts(self) -> None:
        arena, said = self.arena, self.arena.as_dict()
        held = [s for s in (*arena._copies.values(), *arena._waiting.values()) if s.slot >= 0]
        slots = [slot for s in held for slot in range(s.slot, s.slot + s.tokens)]
        assert len(slots) == len(set(slots)) == said["used_tokens"] and set(slots) <= set(arena.slots)
        assert said["contiguous_tokens_read"] <= said["shared_tokens_read"]
        assert said["spans"] == len(arena._copies)
