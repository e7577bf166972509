"""Packed or stock: the router decides it for each forward pass and each layer, and counts why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from packinfer_sgl.kernels.reference import fits_sinks
from packinfer_sgl.planning.batch import SlotTable, StepBatch, causal
from packinfer_sgl.planning.prefix_tree import Int32
from packinfer_sgl.reasons import BatchReason, LayerReason
from packinfer_sgl.runners.arena import Arena
from packinfer_sgl.serving.batch_reasons import chain_drafts, decode_reason, extend_reason, mode_reason
from packinfer_sgl.serving.batch_rows import BatchRows, running_rows
from packinfer_sgl.serving.layers import LayerGate, is_fp8
from packinfer_sgl.serving.metrics import Stats
from packinfer_sgl.serving.packed_path import Kind, PackedPath

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

# Rows of an eager batch for which buffers are held on a GPU; graphs may need more, and drafts have those of graphs.
EAGER_ROWS = 256
# How far a row of the stock backend may be from a packed one where KV is FP8: fa3 and triton round queries and weights
# to e4m3, too, which alone moves rows of random KV by up to 0.09 (logits of standard deviation 4).
FP8_LIMIT = 0.12


class Router:
    """For each forward pass: which packed path runs it, or that the stock backend does.

    Attributes:
        path: what runs this pass; None for the stock backend.
        unit_tokens: in SGLang's deterministic mode, the unit in which KV is summed (``planning.units``); else 0.
    """

    def __init__(
        self,
        gate: LayerGate,
        stats: Stats,
        *,
        req_to_token: torch.Tensor,
        on_gpu: bool,
        make_decode: Callable[[int], PackedPath],
        extend: PackedPath | None,
        make_verify: Callable[[int, int], PackedPath] | None,
        check: bool,
        arena: Arena | None = None,
        make_any_rows: Callable[[], PackedPath] | None = None,
        unit_tokens: int = 0,
    ) -> None:
        """
        Args:
            gate: which layers can be packed.
            req_to_token: [pool rows, max context] int32, SGLang's table of slots.
            on_gpu: whether graphs may be captured, and lengths are to be read from SGLang's copies on the host.
            make_decode: makes the path of decode steps for at most so many rows.
            extend: the path of prefill and mixed batches; None: the stock backend's.
            make_verify: makes that of verify steps, for so many drafts of at most so many rows; None: the stock
                backend's.
            check: see ``config.Config``.
            arena: of the decode path, if there is one.
            make_any_rows: with ``unit_tokens``, makes the path of eager decode steps of more rows than ``make_decode``
                has buffers for: each decode step must be packed, for the stock backend's bits are others.
            unit_tokens: see above.
        """
        self._make_any_rows, self._any_rows, self.unit_tokens = make_any_rows, None, unit_tokens
        self.gate, self.stats, self.extend, self.check, self.arena = gate, stats, extend, check, arena
        self._req_to_token, self._make_decode, self._make_verify = req_to_token, make_decode, make_verify
        self._on_gpu = on_gpu
        self._decode: PackedPath | None = None  # made when the size of its buffers is known
        self._verify: PackedPath | None = None  # made when the number of drafts is known
        self._graph_rows = 0  # most rows of captured graphs
        self._captured_verify = False
        self.path: PackedPath | None = None
        self._compares = False  # this pass is eager, and compared with the stock backend
        self._tokens = 0  # query tokens of an eager pass that are no padding

    def kinds(self) -> list[str]:
        """Kinds of batches that may be packed."""
        extras = {Kind.EXTEND: self.extend, Kind.VERIFY: self._make_verify}
        return [Kind.DECODE.value, *(kind.value for kind, path in extras.items() if path is not None)]

    def hold_graphs(self, max_rows: int) -> None:
        """Graphs of up to so many rows will be captured."""
        self._decode = self._make_decode(max(max_rows, EAGER_ROWS))
        self._verify, self._graph_rows = None, max_rows  # an eager dummy run may have made one

    def read_scales(self) -> None:
        """The scales of FP8 KV again, after new weights; what was captured keeps those from before."""
        if self.gate.read_scales() and self._graph_rows:
            logger.error(
                "packinfer: new weights changed the scales of FP8 KV, and captured graphs keep the old ones: restart "
                "the server, or start it with --disable-cuda-graph"
            )

    # --- what runs a pass

    def begin_eager(self, batch: ForwardBatch) -> None:
        """Decide who runs this eager pass, and prepare for it."""
        self.path, self._compares = None, self.check
        try:
            path, reason = self._choose(batch, running_rows())
        except Exception as e:  # it would end the server: the stock backend can run any batch
            if self.check or self._deterministic:
                raise
            return self.stats.count_error(e, "the stock backend runs this batch")
        if reason is not None:
            self.stats.count_fallback(reason)
        else:
            self.path = path
        return None

    def begin_graph(self, batch: ForwardBatch, in_capture: bool) -> None:
        """Prepare for a graph that is captured or replayed; some stock backends ask before an eager pass, too."""
        self.path, self._compares, self._tokens = None, False, 0
        if not self._on_gpu or self._decode is None:
            return
        mode = batch.forward_mode
        path = self._decode if mode.is_decode() else self._verify_path(batch)
        if in_capture:
            if path is not None:
                self.path = path
                self._captured_verify |= path.kind is Kind.VERIFY
                n = len(batch.req_pool_indices)
                path.capture(self._batch(path, None, batch.req_pool_indices, np.full(n, path.row_tokens, np.int32)))
        elif hasattr(batch, "num_padding"):  # a replay
            if path is not None:
                self._replay(path, batch)
            elif mode.is_target_verify() and self._captured_verify:
                raise RuntimeError(
                    f"packinfer: a graph of verify steps is replayed with {type(batch.spec_info).__name__}, not with "
                    "the chain of drafts that it was captured for; please report this with the SGLang version"
                )
            elif not batch.actual_forward_mode.is_idle():
                self.stats.count_fallback(self._in_mode(mode_reason(mode)) or BatchReason.EXTEND)

    def append_in_graph(self, batch: ForwardBatch) -> None:
        """Captured with the graph of a decode step: enter the new slots."""
        if self.path is not None and self.path.kind is Kind.DECODE:
            self.path.runner.append(batch.seq_lens, batch.out_cache_loc)

    def _replay(self, path: PackedPath, batch: ForwardBatch) -> None:
        """The captured graph runs the packed kernels whatever the batch is: without requests nothing is shared. An idle
        rank of data-parallel attention replays it, too, with no row at all."""
        n = batch.batch_size - batch.num_padding
        lens = _first(batch.seq_lens_cpu, n).numpy().astype(np.int32) if n else np.zeros(0, np.int32)
        if path.kind is Kind.VERIFY:
            lens = lens + np.int32(path.row_tokens)  # SGLang counts the drafts once they are accepted
        self._step(path, self._batch(path, _if_rows(running_rows(), n), _first(batch.req_pool_indices, n), lens))

    def _step(self, path: PackedPath, step: StepBatch) -> None:
        """Prepare the packed kernels for a batch that nothing else may run."""
        try:
            path.step(step)
        except Exception as e:  # it would end the server; of the batch nothing but rows and lengths is needed
            if self.check:
                raise
            self.stats.count_error(e, "this batch is run without groups")
            path.step_alone(step)

    @property
    def _deterministic(self) -> bool:
        return self.unit_tokens > 0

    def _in_mode(self, reason: BatchReason | None) -> BatchReason | None:
        """Verify steps have a reason of their own in the deterministic mode."""
        return BatchReason.DETERMINISTIC if self._deterministic and reason is BatchReason.SPECULATIVE else reason

    def _choose(self, batch: ForwardBatch, rows: BatchRows | None) -> tuple[PackedPath | None, BatchReason | None]:
        """The path that is prepared for this eager pass; or why the stock backend runs it, None for an idle rank."""
        mode = batch.forward_mode
        if mode.is_idle():
            return None, None
        if mode.name in ("EXTEND", "MIXED") and self.extend is not None:
            reason = extend_reason(batch, rows)
            return self.extend, self._plan_extend(batch, rows) if reason is None else reason
        if (verify := self._verify_path(batch)) is not None:
            return verify, self._plan_rows(verify, batch, rows)
        if (reason := decode_reason(batch, rows, needs_rows=not self._deterministic)) is not None:
            return None, self._in_mode(reason)
        if self._decode is None:  # not for a prefill: graphs may need larger buffers
            self._decode = self._make_decode(EAGER_ROWS)
        path = self._decode
        if batch.batch_size > path.max_rows and self._make_any_rows is not None:
            path = self._any_rows = self._any_rows or self._make_any_rows()
        return path, self._plan_rows(path, batch, rows)

    def _plan_extend(self, batch: ForwardBatch, rows: BatchRows | None) -> BatchReason | None:
        assert self.extend is not None
        q_lens = np.array(batch.extend_seq_lens_cpu, np.int32)
        kv_lens = q_lens + np.array(batch.extend_prefix_lens_cpu, np.int32)
        table = SlotTable(self._req_to_token, batch.req_pool_indices)
        self._tokens = int(q_lens.sum())
        step = StepBatch(q_lens, kv_lens, rows, table, visible=causal(q_lens, kv_lens))
        return None if self.extend.step(step) else BatchReason.EXTEND

    def _plan_rows(self, path: PackedPath, batch: ForwardBatch, rows: BatchRows | None) -> BatchReason | None:
        """Decode and verify: as many new tokens in each row."""
        if batch.batch_size > path.max_rows:
            return BatchReason.TOO_MANY_ROWS
        # data-parallel attention pads the batches of its ranks to one size
        n = int(batch.batch_size if batch._original_batch_size is None else batch._original_batch_size)
        self._tokens = n * path.row_tokens
        lens = _first(batch.seq_lens_cpu if self._on_gpu else batch.seq_lens, n).numpy().astype(np.int32)
        new: dict[str, Any] = {}
        if path.kind is Kind.VERIFY:
            lens = lens + np.int32(path.row_tokens)
        else:
            new = {"kv_lens_device": _first(batch.seq_lens, n), "out_slots": _first(batch.out_cache_loc, n)}
        step = self._batch(path, _if_rows(rows, n), _first(batch.req_pool_indices, n), lens, **new)
        if self._deterministic:
            self._step(path, step)
        else:
            path.step(step)
        return None

    def _batch(
        self, path: PackedPath, rows: BatchRows | None, pool_rows: torch.Tensor, kv_lens: Int32, **new: Any
    ) -> StepBatch:
        q_lens = np.full(len(kv_lens), path.row_tokens, np.int32)
        visible = causal(q_lens, kv_lens) if path.kind is Kind.VERIFY else None
        table = SlotTable(self._req_to_token, pool_rows)
        return StepBatch(
            q_lens, kv_lens, rows, table, visible=visible, row_tokens=path.row_tokens, finds_slots=not self._on_gpu,
            **new,
        )  # fmt: skip

    def _verify_path(self, batch: ForwardBatch) -> PackedPath | None:
        """What runs this batch if it verifies drafts that are a chain, or None."""
        if self._make_verify is None or not batch.forward_mode.is_target_verify():
            return None
        if batch.spec_info is None:  # an idle rank of data-parallel attention
            return self._verify
        drafts = chain_drafts(batch.spec_info)
        if drafts and self._verify is None:
            self._verify = self._make_verify(drafts, self._graph_rows or EAGER_ROWS)
        return self._verify if self._verify is not None and drafts == self._verify.row_tokens else None

    # --- what runs a layer

    def attend(
        self,
        stock: Callable[..., torch.Tensor],
        backend: Any,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        batch: ForwardBatch,
        save_kv_cache: bool,
        **more: Any,
    ) -> torch.Tensor:
        """Attention of one layer of this pass, by its path or by ``stock``, the stock backend's own method.

        Args:
            backend: the stock backend: its KV pool, and the metadata of this pass.
            save_kv_cache: False if the model has written k and v, together with the rotary embedding.
            more: what SGLang passes on beyond that.
        """
        path = self.path
        if path is None or self.gate.reason(layer, pool := backend.token_to_kv_pool) is not None:
            return stock(q, k, v, layer, batch, save_kv_cache, **more)
        reason = _call_reason(backend, layer, k, more)
        if reason is None and len(q) < self._tokens:
            reason = LayerReason.EXTRA_ARGUMENTS
        if reason is not None:
            self.stats.set_layer(layer.layer_id, reason)
            return stock(q, k, v, layer, batch, save_kv_cache, **more)
        given = (k.clone(), v.clone()) if self._compares and v is not None else (k, v)
        if save_kv_cache:
            _write_kv(pool, layer, batch.out_cache_loc, k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        kv = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        hides = self._compares and path.kind is Kind.DECODE and self.arena is not None
        with self.arena.sources_hidden(*kv) if hides and self.arena is not None else nullcontext():
            k_scale, v_scale = self.gate.scales(layer)
            out = path.run(
                q, *kv, batch.seq_lens, sm_scale=layer.scaling * k_scale, logits_soft_cap=layer.logit_cap,
                v_scale=v_scale, sinks=more.get("sinks"),
            )  # fmt: skip
        out = out.view(len(q), -1)
        if self._compares:
            # copies from before the write: SGLang divides k and v by the scales of FP8 KV in place
            expected = stock(q, *given, layer, batch, False, **more).view_as(out)
            self._compare(out[: self._tokens], expected[: self._tokens], layer.layer_id, is_fp8(pool))
        return out

    def _compare(self, out: torch.Tensor, stock: torch.Tensor, layer_id: int, with_fp8: bool) -> None:
        """Raise RuntimeError if a row of ``out`` ([n, heads * head_dim]) is not the stock backend's within rounding.

        ``with_fp8``: KV is FP8.
        """
        error = (out.float() - stock.float()).norm(dim=1) / stock.float().norm(dim=1)
        worst = float(error.max())
        self.stats.check_error = max(self.stats.check_error, worst)
        # float32: sums of some thousand terms in another order; half precision: probabilities and output rounded again
        limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[out.dtype]
        if with_fp8 and out.dtype != torch.float32:
            limit = FP8_LIMIT
        if not worst <= limit:
            raise RuntimeError(
                f"packinfer: layer {layer_id}, row {int(error.argmax())} of {len(out)}: packed attention is off the "
                f"stock backend's by {worst:.2g}; please report this with the SGLang version"
            )


def _call_reason(
    backend: Any, layer: RadixAttention, k: torch.Tensor | None, more: dict[str, Any]
) -> LayerReason | None:
    """Why this call of a layer is the stock backend's, by what it is called with beyond q and v; or None."""
    # Gemma 3 gives SGLang's triton backend a mask after the batch was planned, and this a mask to each verify step
    if getattr(getattr(backend, "forward_metadata", None), "custom_mask", None) is not None:
        return LayerReason.CUSTOM_MASK
    # some models pass sinks=None
    if k is None or any(value is not None for name, value in more.items() if name != "sinks"):
        return LayerReason.EXTRA_ARGUMENTS
    sinks = more.get("sinks")
    return None if sinks is None or fits_sinks(sinks, layer.tp_q_head_num) else LayerReason.SINKS


def _first(of_rows: torch.Tensor, n: int) -> torch.Tensor:
    """Without the padding, if there is any; a slice costs more than to look."""
    return of_rows if len(of_rows) == n else of_rows[:n]


def _if_rows(rows: BatchRows | None, n: int) -> BatchRows | None:
    """The scheduler's batch if it has so many rows."""
    return rows if rows is not None and len(rows.reqs) == n else None


def _write_kv(pool: Any, layer: RadixAttention, slots: torch.Tensor, k: Any, v: Any) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    scales = (layer.k_scale, layer.v_scale) if is_fp8(pool) else ()  # FP8 checkpoints have them for any pool
    pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v, *scales)
