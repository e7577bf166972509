"""The paths of a batch's radix nodes, each read from SGLang's tree once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

# Nodes that are remembered, unless one batch has more; then those of the batch are read anew.
MOST_NODES = 4096

Path = list[tuple[int, int, bool]]  # from the root down: a node's id, the position after it, whether it has children


class RadixPaths:
    """The nodes on the paths that were read from one prefix cache.

    SGLang gives an id out once, and a node ends where it always did. All that changes a path is a split: it puts a new
    node, with children, above a node that keeps its id. Rows share that new node only if one of them was read after the
    split; so when a path shows an unknown node with children, those read before may lack it, and are forgotten.

    Attributes:
        tree_cache: SGLang's prefix cache.
        nodes: [at least n_nodes, 3] int64: see ``PrefixTree.from_nodes``.
        n_nodes: how many are known.
    """

    def __init__(self, tree_cache: Any) -> None:
        self.tree_cache = tree_cache
        self._root: Any = None
        self._forget()

    def lowest(self, nodes: list[Any]) -> list[int] | None:
        """Index of each radix node in ``nodes``, -1 for one without path; None if this cache keeps no paths to read.

        Args:
            nodes: as requests of this SGLang release hold them. A streaming session puts an object of its own there.
        """
        core = getattr(self.tree_cache, "tree_core", None)
        if hasattr(core, "collect_path_info"):
            return self._places([node if isinstance(node, int) else None for node in nodes], nodes, core, _collect)
        holder = self.tree_cache if core is None else core
        root = getattr(holder, "root_node", None)
        if root is None or None in nodes:
            return None
        if root is not self._root:  # a tree that was reset may count its ids from 0 again
            self._root = root
            self._forget()
        ids = [node if isinstance(node, int) else node.id if hasattr(node, "parent") else None for node in nodes]
        return self._places(ids, nodes, holder, _walk)

    def path(self, lowest: int, limit: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids and ends of the nodes from the root down to index ``lowest`` that end within ``limit`` tokens."""
        ids, ends = [], []
        while lowest >= 0:
            node, lowest, end = self.nodes[lowest].tolist()
            if end <= limit:
                ids.append(node)
                ends.append(end)
        return tuple(ids[::-1]), tuple(ends[::-1])

    def _forget(self) -> None:
        self._place: dict[int | None, int] = {None: -1}
        self.nodes: npt.NDArray[np.int64] = np.empty((256, 3), np.int64)
        self.n_nodes = 0

    def _places(
        self, ids: list[int | None], nodes: list[Any], tree: Any, read: Callable[[Any, list[Any]], Iterator[Path]]
    ) -> list[int]:
        places = [*map(self._place.get, ids)]
        if None in places:
            new = {i: node for i, node, place in zip(ids, nodes, places) if place is None}
            if not self._enter(new, [*read(tree, [*new.values()])]):
                self._forget()
                new = {i: node for i, node in zip(ids, nodes) if i is not None}
                self._enter(new, [*read(tree, [*new.values()])])
            places = [*map(self._place.get, ids)]
        return places  # type: ignore[return-value]

    def _enter(self, new: dict[int | None, Any], paths: list[Path]) -> bool:
        """Add the paths of these nodes; False if those known may lack a node of theirs, or there is no room."""
        known, place = self.n_nodes, self._place
        for lowest, path in zip(new, paths):
            above = -1
            for node, end, is_inner in path:
                at = place.get(node)
                if at is None:
                    if known and (is_inner or self.n_nodes >= MOST_NODES):
                        return False
                    at = place[node] = self.n_nodes
                    if at == len(self.nodes):
                        self.nodes = np.concatenate([self.nodes, np.empty_like(self.nodes)])
                    self.nodes[at] = node, above, end
                    self.n_nodes += 1
                above = at
            place[lowest] = above
        return True


def _collect(core: Any, ids: list[int]) -> Iterator[Path]:
    for path in core.collect_path_info(ids):
        yield [(node.node_id, node.path_end, node.num_children > 0) for node in path]


def _walk(tree: Any, nodes: list[Any]) -> Iterator[Path]:
    """Of the trees of 0.5.17, and of that for models with sliding windows only."""
    for node in nodes:
        node = tree.node_by_id(node) if isinstance(node, int) else node
        above = []
        while node is not tree.root_node:
            above.append(node)
            node = node.parent
        end, path = 0, []
        for node in reversed(above):
            end += len(node.key)
            path.append((node.id, end, len(node.children) > 0))
        yield path
