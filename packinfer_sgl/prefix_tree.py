"""Who shares which span of KV: the prefix tree of one batch, from radix paths or from page tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Spans of KV positions that several rows of a batch hold in the same slots.

    Node ``i`` is the span ``[start[i], end[i])`` of KV positions (tokens), held in equal slots by the rows
    ``row_order[row_lo[i]:row_hi[i]]``, at least two. A child's span begins where its parent's ends; a node without
    parent begins at 0. Nodes stand level by level, so a parent precedes its children. From ``tail_start`` on, a row is
    alone (its tail); the chain of spans of a row and its tail cover every position once.

    Attributes (int32; all on the CPU):
        row_order: [n_rows] row of the batch at each place; a node's rows are neighbours in it.
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

    @property
    def n_rows(self) -> int:
        return len(self.row_order)

    @property
    def n_nodes(self) -> int:
        return len(self.start)

    @classmethod
    def from_neighbours(cls, row_order: Sequence[int], shared_tokens: Sequence[int]) -> PrefixTree:
        """The tree of rows sorted so that sharers are neighbours.

        ``shared_tokens[i]`` is the number of leading tokens that places ``i`` and ``i + 1`` hold in the same slots;
        any two rows share the minimum between them. The nodes are the intervals of that array (as the interval tree
        of a suffix array's LCP table; Abouelhoda, Kurtz, Ohlebusch 2004): one sweep with a stack.
        """
        parent: list[int] = []
        lo: list[int] = []
        hi: list[int] = []
        end: list[int] = []
        # open intervals: [shared tokens, first place, closed children]
        stack: list[tuple[int, int, list[int]]] = [(0, 0, [])]
        for place, shared in enumerate([*shared_tokens, 0]):
            first, orphan = place, -1
            while stack[-1][0] > shared:
                tokens, first, children = stack.pop()
                node = len(end)
                parent.append(-1)
                lo.append(first)
                hi.append(place + 1)
                end.append(tokens)
                for child in children:
                    parent[child] = node
                if stack[-1][0] >= shared:
                    stack[-1][2].append(node)
                else:
                    orphan = node  # its parent is the interval pushed next
            if stack[-1][0] < shared:
                stack.append((shared, first, [] if orphan < 0 else [orphan]))
        return cls._from_postorder(row_order, parent, lo, hi, end)

    @classmethod
    def _from_postorder(
        cls, row_order: Sequence[int], parent: list[int], lo: list[int], hi: list[int], end: list[int]
    ) -> PrefixTree:
        n = len(end)
        depth, start = [0] * n, [0] * n
        for node in range(n - 1, -1, -1):
            above = parent[node]
            if above >= 0:
                depth[node] = depth[above] + 1
                start[node] = end[above]
        order = sorted(range(n), key=lambda i: (depth[i], lo[i]))
        new_index = [0] * n
        for new, old in enumerate(order):
            new_index[old] = new
        tail_start = [0] * len(row_order)
        for i in order:  # deeper nodes come later and overwrite
            tail_start[lo[i] : hi[i]] = [end[i]] * (hi[i] - lo[i])
        nodes = [
            (new_index[parent[i]] if parent[i] >= 0 else -1, depth[i], lo[i], hi[i], start[i], end[i]) for i in order
        ]
        return cls.of_nodes(np.asarray(row_order, np.int32), nodes, tail_start)

    @classmethod
    def of_nodes(
        cls, row_order: Int32, nodes: list[tuple[int, int, int, int, int, int]], tail_start: list[int]
    ) -> PrefixTree:
        """From (parent, depth, row_lo, row_hi, start, end) of each node, level by level."""
        parent, depth, lo, hi, start, end = np.array(nodes, np.int32).reshape(len(nodes), 6).T.copy()
        return cls(row_order, parent, depth, lo, hi, start, end, np.array(tail_start, np.int32))

    @classmethod
    def from_paths(cls, paths: Sequence[tuple[int, ...]], ends: Sequence[tuple[int, ...]]) -> PrefixTree:
        """The tree of radix paths.

        Args:
            paths: per row, the identities of its radix nodes from the root down. Two rows hold a
                node's slots in common iff both paths contain it; what must not be trusted is left out by the caller.
            ends: per row and node, the position after the node's last token.
        """
        row_order = sorted(range(len(paths)), key=paths.__getitem__)
        shared = []
        for a, b in zip(row_order, row_order[1:]):
            common = 0
            path_a = paths[a]
            if path_a is paths[b]:
                common = len(path_a)
            else:
                for x, y in zip(path_a, paths[b]):
                    if x != y:
                        break
                    common += 1
            shared.append(ends[a][common - 1] if common else 0)
        return cls.from_neighbours(row_order, shared)

    @classmethod
    def from_slots(cls, indptr: Int32, indices: Int32, page_size: int, limit_tokens: Int32) -> PrefixTree:
        """The tree of equal page ids in page tables: for the wrapper, beam rows, and a radix cache that is off.

        Args:
            indptr: [n_rows + 1] int32, range of each row in ``indices``.
            indices: [indptr[-1]] int32 page ids (slots at page size 1), in position order.
            page_size: tokens per page.
            limit_tokens: [n_rows] int32, how many leading tokens a row may share (its length, or less where not every
                query of the row sees all of it).
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
        """KV tokens that any kernel must read at least once, for rows of ``kv_lens`` tokens ([n_rows])."""
        return int((self.end - self.start).sum() + kv_lens.sum() - self.tail_start.sum())

    def check_integrity(self) -> None:
        """Raise AssertionError unless the class's promises hold; for tests."""
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
