"""Which rows share which span of KV: the prefix tree of one batch, from radix paths or from page tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numba import njit

Int32 = npt.NDArray[np.int32]


# The fields of a tree in the order of ``PrefixTree.block``: two of its rows, then six of its nodes.
FIELDS = ("row_order", "tail_start", "parent", "depth", "row_lo", "row_hi", "start", "end")


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Spans of KV positions that several rows of a batch hold in the same slots.

    Node ``i`` is the span ``[start[i], end[i])`` of KV positions (tokens), held in equal slots by at least two rows,
    ``row_order[row_lo[i]:row_hi[i]]``. A child's span begins where its parent's ends; a node without parent begins at
    0. Nodes stand level by level, so a parent precedes its children. From ``tail_start`` on, a row's tokens are private
    (its tail). The chain of a row's spans and its tail cover every position once.

    Compiled functions make trees as one block of memory; the arrays are views that are made when they are asked for.

    Attributes (int32; all on the CPU):
        row_order: [n_rows] row of the batch at each place (its index in sorted order); a node's rows are neighbours.
        parent: [n_nodes] index of the node above, -1 for none.
        depth: [n_nodes] number of nodes above.
        row_lo, row_hi: [n_nodes] range of places in ``row_order``.
        start, end: [n_nodes] span in tokens.
        tail_start: [n_rows] first private position, by place in ``row_order``.
    """

    row_order: Int32
    parent: Int32
    depth: Int32
    row_lo: Int32
    row_hi: Int32
    start: Int32
    end: Int32
    tail_start: Int32

    if TYPE_CHECKING:

        @property
        def n_rows(self) -> int: ...

        @property
        def n_nodes(self) -> int: ...

        @property
        def block(self) -> Int32:
            """All fields, in the order of ``FIELDS``."""
    else:

        def __getattr__(self, name: str) -> Any:
            if name == "block":
                value = np.concatenate([getattr(self, field) for field in FIELDS])
            elif name == "n_rows":
                value = len(self.row_order)
            elif name == "n_nodes":
                value = len(self.start)
            elif name in FIELDS:
                n, nodes, at = self.n_rows, self.n_nodes, FIELDS.index(name)
                begin, size = (at * n, n) if at < 2 else (2 * n + (at - 2) * nodes, nodes)
                value = self.block[begin : begin + size]
            else:
                raise AttributeError(name)
            self.__dict__[name] = value
            return value

    @classmethod
    def of_block(cls, block: Int32, n_rows: int) -> PrefixTree:
        """The tree of ``n_rows`` rows whose ``block`` this is."""
        tree = cls.__new__(cls)
        values = tree.__dict__
        values["block"], values["n_rows"], values["n_nodes"] = block, n_rows, (len(block) - 2 * n_rows) // 6
        return tree

    @classmethod
    def unshared(cls, n_rows: int) -> PrefixTree:
        """The tree of rows that share nothing, or of which it is not known what they share."""
        return cls.from_neighbours(range(n_rows), [0] * (n_rows - 1))

    @classmethod
    def from_neighbours(cls, row_order: Sequence[int], shared_tokens: Sequence[int]) -> PrefixTree:
        """The tree of rows sorted so that sharers are neighbours.

        ``shared_tokens[i]`` is the number of leading tokens that places ``i`` and ``i + 1`` hold in the same slots;
        any two rows share the minimum between them.
        """
        order = np.array(row_order, np.int32)
        return cls.of_block(_intervals(order, np.array(shared_tokens, np.int32)), len(order))

    @classmethod
    def from_paths(cls, paths: Sequence[tuple[int, ...]], ends: Sequence[tuple[int, ...]]) -> PrefixTree:
        """The tree of radix paths.

        Args:
            paths: of each row, the identities of its radix nodes from the root down. Two rows hold a node's slots in
                common iff both paths contain it; the caller leaves out nodes of which that is not sure.
            ends: of each row and node, the position after the node's last token.
        """
        place: dict[int, int] = {}
        nodes: list[tuple[int, int, int]] = []
        for path, path_ends in zip(paths, ends):
            for i, (node, end) in enumerate(zip(path, path_ends)):
                if node not in place:
                    place[node] = len(nodes)
                    nodes.append((node, place[path[i - 1]] if i else -1, end))
        lowest = [place[path[-1]] if path else -1 for path in paths]
        limits = [path_ends[-1] if path_ends else 0 for path_ends in ends]
        return cls.from_nodes(np.array(nodes, np.int64).reshape(-1, 3), lowest, limits)

    @classmethod
    def from_nodes(cls, nodes: npt.NDArray[np.int64], lowest: list[int], limits: list[int]) -> PrefixTree:
        """The tree of rows whose radix paths are given by their lowest nodes.

        Args:
            nodes: [n_nodes, 3] of each radix node its identity, the index of the node above it (-1: none), and the
                position after its last token. Two rows hold its slots in common if it is on both their paths.
            lowest: per row, the index of its lowest node; -1 for none.
            limits: per row, the leading tokens that it may share: nodes that end beyond are left out.
        """
        return cls.of_block(_from_nodes(nodes, np.array(lowest + limits, np.int64)), len(lowest))

    @classmethod
    def from_slots(cls, indptr: Int32, indices: Int32, page_size: int, limit_tokens: Int32) -> PrefixTree:
        """The tree of equal page ids in page tables: for the wrapper, for beam rows, and without a radix cache.

        Args:
            indptr: [n_rows + 1] int32, range of each row in ``indices``.
            indices: [indptr[-1]] int32 page ids (slots at page size 1), in position order.
            page_size: tokens per page.
            limit_tokens: [n_rows] int32 leading tokens that a row may share: its length, or less if not every query of
                the row sees all of it.
        """
        limits = limit_tokens.tolist()
        tables = [
            indices[a : min(b, a - (-limit // page_size))]
            for a, b, limit in zip(indptr[:-1].tolist(), indptr[1:].tolist(), limits)
        ]
        # big-endian bytes sort like the page ids; a row that may share less sorts before those it is a prefix of
        keys = [(table.astype(">i4").tobytes(), limit) for table, limit in zip(tables, limits)]
        row_order = sorted(range(len(tables)), key=keys.__getitem__)
        shared = []
        for a, b in zip(row_order, row_order[1:]):
            n = min(len(tables[a]), len(tables[b]))
            differ = tables[a][:n] != tables[b][:n]
            pages = int(differ.argmax()) if differ.any() else n
            shared.append(min(pages * page_size, limits[a], limits[b]))
        return cls.from_neighbours(row_order, shared)

    def unique_tokens(self, kv_lens: Int32) -> int:
        """KV tokens that any kernel must read at least once, for rows of ``kv_lens`` tokens ([n_rows] int32)."""
        return int(count_unique(self.start, self.end, self.tail_start, kv_lens))

    def check_integrity(self) -> None:
        """For tests: raise AssertionError unless what the class's docstring says is true."""
        assert sorted(self.row_order.tolist()) == list(range(self.n_rows))
        covered = np.zeros(self.n_rows, np.int64)
        for i in range(self.n_nodes):
            lo, hi, above = self.row_lo[i], self.row_hi[i], self.parent[i]
            assert 0 <= lo < hi - 1 < self.n_rows and self.start[i] < self.end[i] and above < i
            if above >= 0:
                assert self.row_lo[above] <= lo and hi <= self.row_hi[above]
                assert self.start[i] == self.end[above] and self.depth[i] == self.depth[above] + 1
            else:
                assert self.start[i] == 0 and self.depth[i] == 0
            assert (covered[lo:hi] == self.start[i]).all()
            covered[lo:hi] = self.end[i]
        assert (covered == self.tail_start).all()


@njit(cache=True)
def _from_nodes(nodes, lowest_and_limits):  # type: ignore[no-untyped-def]
    """The block of ``PrefixTree.from_nodes``: its rows in the order of the identities on their paths."""
    n = len(lowest_and_limits) // 2
    bottom, limits = lowest_and_limits[:n].copy(), lowest_and_limits[n:]
    depth = np.zeros(n + 1, np.int64)
    for row in range(n):
        while bottom[row] >= 0 and nodes[bottom[row], 2] > limits[row]:
            bottom[row] = nodes[bottom[row], 1]
        node = bottom[row]
        while node >= 0:
            depth[row] += 1
            node = nodes[node, 1]
    path = np.full((n, depth.max()), -1, np.int64)  # a shorter path comes before those that go on
    for row in range(n):
        node = bottom[row]
        for level in range(depth[row] - 1, -1, -1):
            path[row, level], node = node, nodes[node, 1]

    order, merged = np.arange(n), np.empty(n, np.int64)
    width = 1  # a merge sort from the bottom up: ranges of so many places are sorted
    while width < n:
        for lo in range(0, n, 2 * width):
            middle, hi = min(lo + width, n), min(lo + 2 * width, n)
            a, b = lo, middle
            for place in range(lo, hi):
                takes_b = a == middle
                if a < middle and b < hi:
                    for level in range(path.shape[1]):
                        of_a, of_b = path[order[a], level], path[order[b], level]
                        if of_a != of_b:
                            takes_b = of_b < 0 or (of_a >= 0 and nodes[of_b, 0] < nodes[of_a, 0])
                            break
                if takes_b:
                    merged[place], b = order[b], b + 1
                else:
                    merged[place], a = order[a], a + 1
        order, merged = merged, order
        width *= 2

    shared = np.zeros(max(n - 1, 0), np.int32)
    for place in range(n - 1):
        a, b = order[place], order[place + 1]
        for level in range(depth[a]):
            if path[a, level] != path[b, level]:
                break
            shared[place] = nodes[path[a, level], 2]
    return _intervals(order.astype(np.int32), shared)


@njit(cache=True)
def count_unique(start, end, tail_start, kv_lens):  # type: ignore[no-untyped-def]
    """``PrefixTree.unique_tokens``."""
    tokens = 0
    for i in range(len(start)):
        tokens += end[i] - start[i]
    for row in range(len(kv_lens)):
        tokens += kv_lens[row] - tail_start[row]
    return tokens


@njit(cache=True)
def _intervals(row_order, shared_tokens):  # type: ignore[no-untyped-def]
    """The block of ``PrefixTree.from_neighbours``.

    They are the intervals of ``shared_tokens`` (as the interval tree of a suffix array's LCP table; Abouelhoda, Kurtz,
    Ohlebusch 2004): one sweep over the places, with a stack of the intervals that are still open.
    """
    n_rows = len(row_order)
    parent = np.full(n_rows, -1, np.int32)
    lo, hi, end = np.empty(n_rows, np.int32), np.empty(n_rows, np.int32), np.empty(n_rows, np.int32)
    n = 0
    open_nodes = np.empty(n_rows + 1, np.int32)
    open_tokens = np.zeros(n_rows + 1, np.int32)
    top = 0  # the entry at the bottom stands for "nothing shared"
    for place in range(n_rows):
        shared = shared_tokens[place] if place < n_rows - 1 else 0
        first, orphan = place, -1
        while open_tokens[top] > shared:
            node = open_nodes[top]
            top -= 1
            first, hi[node] = lo[node], place + 1
            if open_tokens[top] < shared:
                orphan = node  # its parent is the interval opened next
            elif top > 0:
                parent[node] = open_nodes[top]
        if open_tokens[top] < shared:
            top += 1
            open_nodes[top], open_tokens[top] = n, shared
            lo[n], end[n] = first, shared
            if orphan >= 0:
                parent[orphan] = n
            n += 1

    depth = np.zeros(n, np.int32)
    begins = np.zeros(n + 1, np.int64)  # of each level, the index of its first node
    for i in range(n):
        above = parent[i]
        while above >= 0:
            depth[i] += 1
            above = parent[above]
        begins[depth[i] + 1] += 1
    for level in range(n):
        begins[level + 1] += begins[level]
    # level by level; within a level intervals were opened from left to right
    block, new_index = np.zeros(2 * n_rows + 6 * n, np.int32), np.empty(n, np.int32)
    block[:n_rows] = row_order
    tail_start, nodes = block[n_rows : 2 * n_rows], block[2 * n_rows :].reshape((6, n))
    for i in range(n):
        new_index[i], begins[depth[i]] = begins[depth[i]], begins[depth[i]] + 1
    for i in range(n):
        new, above = new_index[i], parent[i]
        nodes[0, new], nodes[4, new] = (-1, 0) if above < 0 else (new_index[above], end[above])
        nodes[1, new], nodes[2, new], nodes[3, new], nodes[5, new] = depth[i], lo[i], hi[i], end[i]
    for new in range(n):
        tail_start[nodes[2, new] : nodes[3, new]] = nodes[5, new]  # deeper nodes come later and overwrite
    return block
