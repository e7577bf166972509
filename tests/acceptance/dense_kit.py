"""Runs SGLang's unit tests of attention backends (``sglang.test.kits.attention_unittest``) on packinfer: adds what a
server has and their bare model runner lacks, and a prefix that requests share."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any
from unittest import TestCase

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_parallel
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense

from packinfer_sgl import plugin
from packinfer_sgl.serving import batch_rows, metrics
from packinfer_sgl.serving.packed_path import Kind

SHARED = 256  # a multiple of the pages of all cases
LAYOUTS = ("contiguous", "shuffled_pages", "interleaved_pages", "non_monotonic_extend")
SIZES = {"head_dim": 64, "hidden_size": 256, "max_context_len": 512}


class Node:
    """Of a radix tree, as far as the plugin reads it."""

    def __init__(self, ident: int, tokens: int, parent: Node | None = None) -> None:
        self.id, self.key, self.parent, self.children = ident, range(tokens), parent, {}


ROOT = Node(0, 0)
PREFIX = Node(1, SHARED, ROOT)


class DenseKit:
    """The kit's cases, as they are and behind ``SHARED`` tokens that all requests hold in the slots of the first."""

    def __init__(self, monkeypatch, device: str, dtype: torch.dtype, tolerance: float) -> None:
        """``tolerance``: absolute; of outputs of about 0.02 behind 256 tokens, of 0.2 behind a few."""
        load_plugins()
        self.patch, self.kind, self.stats = monkeypatch, {"device": device, "dtype": dtype}, metrics.Stats()
        self.sharers, self.contiguous, self._overrides = 0, False, []
        monkeypatch.setenv("PACKINFER_CONFIG", '{"extend": "on"}')
        monkeypatch.setattr(metrics, "STATS", self.stats)
        monkeypatch.setattr(batch_rows, "_wanted", False)  # afterwards it is again as it was
        monkeypatch.setitem(ATTENTION_BACKENDS, plugin.NAME, self._create_backend)
        self.tolerance = {"DENSE_ATOL": tolerance, "DENSE_RTOL": 10 * tolerance}
        for name, value in self.tolerance.items():
            monkeypatch.setattr(dense, name, value)
        for name in ("make_loc_fn", "_token_loc", "_populate_prefix_kv"):
            monkeypatch.setattr(dense, name, getattr(self, f"_{name.lstrip('_')}")(getattr(dense, name)))

    def close(self) -> None:
        while self._overrides:
            self._overrides.pop().restore()

    def run(self, run: Any, case: Any, *, shared: bool, contiguous: bool = False, **more: Any) -> dict[str, Any]:
        """``run`` is one of the kit's functions. Returns what packinfer has counted.

        Args:
            contiguous: slots lie in order, whatever layout the kit chooses.
        """
        self.sharers, self.contiguous = case.batch_size if shared else 0, contiguous
        if shared:
            case = dataclasses.replace(case, prefix_lens=tuple(n + SHARED for n in case.prefix_lens))
        for name, value in self.tolerance.items():
            self.patch.setattr(sys.modules[run.__module__], name, value)
        self.stats.__init__()
        # SGLang sets the ranks when it starts; 0.5.17 has that of data parallelism elsewhere
        ranks = {name: 0 for name in ("pp_rank", "tp_rank", "dp_rank") if hasattr(type(get_parallel()), name)}
        with get_parallel().override(**ranks), torch.no_grad():
            run(TestCase(), case, **{**SIZES, **self.kind, **more})
        return self.stats.as_dict()

    # --- what a server has

    def _create_backend(self, runner: Any) -> Any:
        self._overrides.append(runner._server_args_override)
        config = runner.model_config
        runner.model.attn = RadixAttention(
            config.num_attention_heads, config.head_dim, config.head_dim**-0.5, config.num_key_value_heads, layer_id=0
        )
        backend = plugin.create_backend(runner)
        backend.__class__ = type("OnKit", (_OnKit, type(backend)), {"kit": self})
        return backend

    def rows(self, batch: Any) -> batch_rows.BatchRows:
        """As the scheduler would tell of requests whose shared prefix is in the tree."""
        lens = batch.seq_lens_cpu.tolist()
        nodes = [PREFIX if row < self.sharers and lens[row] >= SHARED else ROOT for row in range(len(lens))]
        rows = [(row, node, len(node.key), 0) for row, node in zip(batch.req_pool_indices.tolist(), nodes)]
        return batch_rows.BatchRows([object() for _ in rows], rows, SimpleNamespace(root_node=ROOT), {})

    # --- how requests come to share slots

    def _slot_of(self, loc_fn: Any) -> Any:
        def shared(row: int, position: int, **more: Any) -> int:
            return loc_fn(0 if row < self.sharers and position < SHARED else row, position, **more)

        return shared

    def _make_loc_fn(self, make_loc_fn: Any) -> Any:
        return lambda layout, **more: self._slot_of(make_loc_fn("contiguous" if self.contiguous else layout, **more))

    def _token_loc(self, token_loc: Any) -> Any:
        return self._slot_of(token_loc)

    def _populate_prefix_kv(self, populate: Any) -> Any:
        def shared(module: Any, case: Any, runner: Any, prefix_hidden: list[torch.Tensor], **more: Any) -> None:
            for hidden in prefix_hidden[1 : self.sharers]:
                hidden[:SHARED] = prefix_hidden[0][:SHARED]  # in place: the reference reads it, too
            populate(module, case, runner, prefix_hidden, **more)

        return shared


class _OnKit:
    """Before the backend's class: the running batch in scope, and the kit's replays of a graph as SGLang's."""

    kit: DenseKit

    def init_forward_metadata(self, batch: Any) -> None:
        with batch_rows.running(self.kit.rows(batch)):
            super().init_forward_metadata(batch)

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        replayed = isinstance(batch, SimpleNamespace)
        if replayed:
            batch.num_padding = 0  # the kit looks at the output of padding, too
        with batch_rows.running(self.kit.rows(batch)):
            super().init_forward_metadata_out_graph(batch, in_capture)
        if replayed:  # the kit runs the layers again, where SGLang's graph has their launches
            router = self._packinfer
            router.path = router._decode if batch.forward_mode.is_decode() else router._verify
            assert router.path.kind is (Kind.DECODE if batch.forward_mode.is_decode() else Kind.VERIFY)
