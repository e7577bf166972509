"""What SGLang's scheduler knows of a batch: its requests, their rows, and their paths in the radix tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.serving.radix_paths import RadixPaths

# where the two supported layouts of a request keep: row of req_to_token, lowest radix node, tokens the tree owns, and
# how often its KV was taken from it
_NESTED = "kv.req_pool_idx", "last_node", "kv.cache_protected_len"  # 0.5.23
_FLAT = "req_pool_idx", "last_node", "cache_protected_len"  # 0.5.17
_COUNT = "retraction_count"
_ROWS = {names: (attrgetter(*names, _COUNT), attrgetter(*names)) for names in (_NESTED, _FLAT)}


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
        counted, row = _ROWS[_NESTED if nested else _FLAT]
        try:
            rows = [*map(counted, reqs)]
        except AttributeError:  # a count that is not there equals no other
            rows = [(*row(req), getattr(req, _COUNT, object())) for req in reqs]
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
        paths = _paths_of(self.tree_cache)
        lowest = paths.lowest([row[1] for row in self.rows])
        if lowest is None:
            return None
        limits, nodes = [row[2] for row in self.rows], paths.nodes
        if self.beams:
            nodes = nodes[: paths.n_nodes]
        below: dict[int, int] = {}  # of each prompt of beams, its index
        for i, (prompt, end) in self.beams.items():
            ids, ends = paths.path(lowest[i], limits[i])
            if prompt not in below and (not ends or ends[-1] < end):
                above = int(np.flatnonzero(nodes[:, 0] == ids[-1])[0]) if ids else -1
                below[prompt] = len(nodes)
                nodes = np.concatenate([nodes, np.array([(prompt, above, end)], np.int64)])
            if prompt in below:
                lowest[i], limits[i] = below[prompt], end
        return PrefixTree.from_nodes(nodes, lowest, limits)

    def paths(self, rows: list[int]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """Of some rows: row of ``req_to_token``, ids and ends of the radix nodes that it may use (none if unknown)."""
        chosen, paths = [self.rows[row] for row in rows], _paths_of(self.tree_cache)
        lowest = paths.lowest([row[1] for row in chosen]) or [-1] * len(chosen)
        return [(row, *paths.path(node, protected)) for (row, _, protected, _), node in zip(chosen, lowest)]


_paths = RadixPaths(None)


def _paths_of(tree_cache: Any) -> RadixPaths:
    """What is known of the paths in this cache; of one at a time."""
    global _paths
    if _paths.tree_cache is not tree_cache:
        _paths = RadixPaths(tree_cache)
    return _paths


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
