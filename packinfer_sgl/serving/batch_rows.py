"""What SGLang's scheduler knows of a batch: its requests, their rows, and their paths in the radix tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

from packinfer_sgl.planning.prefix_tree import PrefixTree

# where the two supported layouts of a request keep: row of req_to_token, lowest radix node, tokens the tree owns
_ROW_NESTED = attrgetter("kv.req_pool_idx", "last_node", "kv.cache_protected_len")  # 0.5.23
_ROW_FLAT = attrgetter("req_pool_idx", "last_node", "cache_protected_len")  # 0.5.17


class BatchRows(NamedTuple):
    """The rows of one scheduled batch, in order.

    While two batches compare equal in ``reqs`` and ``rows``, their requests hold the same slots up to the tokens that
    decode steps appended. A request gets other slots in three ways only. Its KV is taken from it and computed or loaded
    anew (retraction, preemption by priority, ``pause_generation``; row, node and length may come back as they were):
    SGLang counts that in ``retraction_count``, and never resets it. Its row is rewritten to shared slots:
    ``cache_protected_len`` or ``last_node`` change with it. It is a beam.

    Attributes:
        reqs: per row its request; for a beam, which SGLang may give another beam's slots at any step, a new object.
        rows: per row (row of ``req_to_token``, lowest radix node, ``cache_protected_len``, ``retraction_count``).
        tree_cache: SGLang's prefix cache.
        beams: by row of a beam search, its prompt as a node below its radix path: (identity, position of the end).
    """

    reqs: list[Any]
    rows: list[tuple[int, Any, int, Any]]
    tree_cache: Any
    beams: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, schedule_batch: Any) -> BatchRows:
        """Read a ``ScheduleBatch`` (on the scheduler's thread, right before its forward pass)."""
        reqs = list(schedule_batch.reqs)
        nested = bool(reqs) and hasattr(getattr(reqs[0], "kv", None), "cache_protected_len")
        row, unknown = _ROW_NESTED if nested else _ROW_FLAT, object()  # a count that is not there equals no other
        rows = [(*row(req), getattr(req, "retraction_count", unknown)) for req in reqs]
        beams = {}
        tail = getattr(schedule_batch, "beam_tail", None)
        for group, leader, *_ in tail.entries if tail is not None else ():
            # the other beams of a request hold its prompt in its slots, whether the tree has it or not
            prompt = beams[leader] = (-1 - rows[leader][0], group.prompt_len)
            for pool_row in group.member_rows_cpu.tolist():
                beams[len(rows)] = prompt
                reqs.append(object())
                rows.append((pool_row, *rows[leader][1:]))
        return cls(reqs, rows, schedule_batch.tree_cache, beams)

    def prefix_tree(self) -> PrefixTree | None:
        """The batch's prefix tree by the radix tree, or None if this cache keeps no paths to read.

        A row may use a node only if the tree owns all of it in that row (``path_end <= cache_protected_len``): up
        to there its slots are the node's own, and the lock on its lowest node keeps them from being freed.
        """
        nodes = dict.fromkeys(node for _, node, *_ in self.rows)
        paths = _paths(self.tree_cache, list(nodes))
        if paths is None:
            return None
        ids: list[tuple[int, ...]] = []
        ends: list[tuple[int, ...]] = []
        for i, (_, node, protected, _) in enumerate(self.rows):
            path_ids, path_ends = _owned(paths[node], protected)
            if i in self.beams and (not path_ends or path_ends[-1] < self.beams[i][1]):
                path_ids, path_ends = (*path_ids, self.beams[i][0]), (*path_ends, self.beams[i][1])
            ids.append(path_ids)
            ends.append(path_ends)
        return PrefixTree.from_paths(ids, ends)

    def paths(self, rows: list[int]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """Of some rows: row of ``req_to_token``, ids and ends of the radix nodes that it may use (none if unknown)."""
        chosen = [self.rows[row] for row in rows]
        paths = _paths(self.tree_cache, list(dict.fromkeys(node for _, node, *_ in chosen))) or {}
        return [(row, *_owned(paths.get(node, ((), ())), protected)) for row, node, protected, _ in chosen]


Path = tuple[tuple[int, ...], tuple[int, ...]]  # node ids from the root down, and the position after each


def _owned(path: Path, protected: int) -> Path:
    """What of ``path`` lies within the first ``protected`` tokens."""
    ids, ends = path
    if ends and ends[-1] > protected:
        usable = sum(end <= protected for end in ends)
        return ids[:usable], ends[:usable]
    return path


def _paths(tree_cache: Any, nodes: list[Any]) -> dict[Any, Path] | None:
    core = getattr(tree_cache, "tree_core", None)
    if hasattr(core, "collect_path_info"):
        # a streaming session puts an object of its own where others have a node id
        known = [node for node in nodes if isinstance(node, int)]
        paths: dict[Any, Path] = dict.fromkeys(nodes, ((), ()))
        for node, path in zip(known, core.collect_path_info(known)):
            paths[node] = (tuple([p.node_id for p in path]), tuple([p.path_end for p in path]))
        return paths
    root = getattr(tree_cache if core is None else core, "root_node", None)
    if root is None or any(node is None for node in nodes):
        return None
    walked: dict[Any, Path] = {root: ((), ())}
    # 0.5.17 with sliding windows: requests hold ids of nodes
    lowest = {node: core.node_by_id(node) if isinstance(node, int) else node for node in nodes}
    for node in lowest.values():
        if not hasattr(node, "parent"):  # a streaming session's
            walked[node] = ((), ())
        above = []
        while node not in walked:
            above.append(node)
            node = node.parent
        for below in reversed(above):
            ids, ends = walked[node]
            walked[below] = ((*ids, below.id), (*ends, (ends[-1] if ends else 0) + len(below.key)))
            node = below
    return {node: walked[found] for node, found in lowest.items()}


# The batch whose forward pass runs on this thread. SGLang rebuilds or strips its ForwardBatch on the way to the
# attention backend (eager copies, graph replay views), so attributes put on it do not arrive.
_running: list[BatchRows | None] = []
_wanted = False


def want_rows() -> None:
    """From now on the hooks read each batch; called when a packinfer backend is built in this process."""
    global _wanted
    _wanted = True


def rows_wanted() -> bool:
    return _wanted


@contextmanager
def running(rows: BatchRows | None) -> Iterator[None]:
    """Make ``rows`` the running batch for the duration of a forward pass."""
    _running.append(rows)
    try:
        yield
    finally:
        _running.pop()


def running_rows() -> BatchRows | None:
    return _running[-1] if _running else None
