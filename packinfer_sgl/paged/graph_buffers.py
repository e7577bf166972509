"""FlashInfer's buffers for CUDA graphs: page tables at fixed addresses, and what a captured graph holds for good."""

from __future__ import annotations

import torch

from packinfer_sgl.planning.batch import SlotTable
from packinfer_sgl.planning.fitting import Capacity
from packinfer_sgl.planning.prefix_tree import Int32

INT32 = 1 << 31  # tokens of a cache that plans can name
PARTIAL_BYTES = 1 << 29  # most memory for partial results; a plan that needs more shares less


def check_pages(n_pages: int, page_size: int) -> None:
    """Raise ValueError if the kernels cannot name the tokens of so many pages."""
    if n_pages * page_size >= INT32:
        raise ValueError(f"kv indices name page {n_pages - 1}: tokens past 2**31 are not supported on CUDA")


class GraphBuffers:
    """Page tables of a wrapper with ``use_cuda_graph``. Each plan is written there, and a captured graph reads them."""

    def __init__(self, device: torch.device, buffers: dict[str, torch.Tensor | None]) -> None:
        """
        Args:
            buffers: kv indptr, kv indices, kv last_page_len and, in prefill, qo_indptr, by FlashInfer's names of these
                arguments; int32, contiguous, on ``device``.
        """
        self._names, self._tables = list(buffers), list[torch.Tensor]()
        for name, buffer in buffers.items():
            if not isinstance(buffer, torch.Tensor):
                raise ValueError(f"{name} must be a tensor with use_cuda_graph, is {buffer!r}")
            if buffer.dim() != 1 or buffer.dtype != torch.int32 or not buffer.is_contiguous():
                raise ValueError(f"{name} must be int32, contiguous, with one dimension")
            if buffer.device != device:
                raise ValueError(f"{name} is on {buffer.device}, the wrapper on {device}")
            self._tables.append(buffer)
        for i in (0, 3):
            if i < len(self._tables) and len(self._tables[i]) != len(self._tables[2]) + 1:
                raise ValueError(f"{self._names[i]} must have one entry more than {self._names[2]}")
        self.capacity: Capacity | None = None
        self._baked: dict[str, object] = {}
        self._most_queries = 0
        self._most_pages = INT32

    def check_batch(self, tables: tuple[Int32, ...], n_pages: int, baked: dict[str, object]) -> Capacity:
        """What plans may need: settled by the first one.

        Args:
            tables: kv indptr, kv indices, kv last_page_len, qo_indptr.
            n_pages: the highest page that is read, plus 1.
            baked: what a captured graph holds for good, by name; at least num_qo_heads, head_dim, page_size and
                fixed_split_size (pages, 0 for none).

        Raises:
            ValueError: the buffers, or a graph that was captured over them, cannot take the batch.
        """
        _, indices, last_page_len, qo_indptr = tables
        n_queries, sizes = int(qo_indptr[-1]), [len(x) for x in self._tables]
        if len(last_page_len) != sizes[2]:
            raise ValueError(f"the batch has {len(last_page_len)} requests, {self._names[2]} was made for {sizes[2]}")
        if len(indices) > sizes[1]:
            raise ValueError(f"the batch has {len(indices)} kv indices, {self._names[1]} holds {sizes[1]}")
        if self.capacity is None:
            heads, head_dim, page_size = (int(str(baked[name])) for name in ("num_qo_heads", "head_dim", "page_size"))
            most = PARTIAL_BYTES // (heads * (head_dim + 1) * 4)
            units = 0
            if split := int(str(baked["fixed_split_size"])):
                # a partial result of each query for each split of its request, whatever they share
                units = (sizes[1] // split + sizes[2]) * -(-n_queries // max(sizes[2], 1))
                if units > most:
                    raise ValueError(f"fixed_split_size={split} makes {units} partial results: too many for a graph")
            # Uncut and ungrouped, any batch fits: an item for each tile of queries, and each KV token once a request.
            self.capacity = Capacity(
                queries=n_queries,
                slots=max(8 * n_queries, units),
                items=max(8 * sizes[2] + n_queries + 4096, units),
                spans=2 * sizes[2],
                partials=max(min(8 * n_queries + 65536 // heads, most), units),
                kv_slots=sizes[1] * page_size,
            )
            self._baked, self._most_queries = baked, n_queries
        if n_queries > self._most_queries:
            raise ValueError(
                f"the batch has {n_queries} queries, but the first plan or a captured q had {self._most_queries}: "
                "begin with the largest"
            )
        for name, value in baked.items():
            if value != self._baked[name]:
                raise ValueError(f"{name}={value}, but CUDA graphs hold what was planned first: {self._baked[name]}")
        if n_pages > self._most_pages:
            raise ValueError(f"kv indices name page {n_pages - 1}, but a captured cache has {self._most_pages}")
        return self.capacity

    def write(self, tables: tuple[Int32, ...], page_size: int) -> SlotTable:
        """Copy the page tables into the buffers, on the current stream."""
        for buffer, values in zip(self._tables, tables):
            buffer[: len(values)].copy_(pinned(values, buffer.device), non_blocking=True)
        return SlotTable(self._tables[1], self._tables[0], page_size)

    def capture(self, queries: int, pages: int) -> None:
        """A graph is being captured over a q of so many queries and a cache of so many pages."""
        self._most_queries = min(self._most_queries, queries)
        self._most_pages = min(self._most_pages, pages)


def pinned(values: Int32, device: torch.device) -> torch.Tensor:
    """A copy in pinned memory, which torch keeps until the GPU has read it."""
    x = torch.from_numpy(values)
    return x.pin_memory() if device.type == "cuda" else x
