"""The attention backend: a stock backend of SGLang whose decode and extend batches run on the packed kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from packinfer_sgl.config import Config
from packinfer_sgl.kernels.copy_slots import SlotCopier
from packinfer_sgl.kernels.reference import copy_slots
from packinfer_sgl.kernels.tiles import tile_policy
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.cpu_profile import CPU
from packinfer_sgl.reasons import BatchReason, LayerReason
from packinfer_sgl.runners.arena import Regroup
from packinfer_sgl.runners.cpu_decode import CpuDecode
from packinfer_sgl.runners.cpu_extend import CpuExtend
from packinfer_sgl.runners.cuda_decode import CudaDecode
from packinfer_sgl.runners.cuda_extend import CudaExtend
from packinfer_sgl.runners.cuda_verify import CudaVerify
from packinfer_sgl.runners.metrics import STATS
from packinfer_sgl.serving.batch_rows import BatchRows, running_rows
from packinfer_sgl.serving.layers import heads_of, is_measured, layer_reason

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

# What a contiguous copy saves of the time to read a scattered span: measured 0.2 to 0.8 on two CPU cores, and 0.02 to
# 0.1 on an H200.
CPU_ARENA_GAIN, CUDA_ARENA_GAIN = 0.3, 0.05

# Rows of an eager batch for which buffers are held on a GPU; graphs may need more, and drafts have those of graphs.
EAGER_ROWS = 256

Step = CpuDecode | CudaDecode | CpuExtend | CudaExtend | CudaVerify  # what can run a forward pass


class PackInferMixin:
    """Decode, extend and verify by work items over the batch's prefix tree; all else by ``super()``, the stock backend.

    The class is ``type("PackInfer" + Base, (PackInferMixin, Base), {})`` over the ``__dict__`` of a built stock
    backend, so that its flags, buffers and metadata keep working (see ``wrap``).
    """

    _packinfer_decode: CpuDecode | CudaDecode | None = None  # on CUDA built when the size of its buffers is known
    _packinfer_make: Callable[[int], CpuDecode | CudaDecode]
    _packinfer_extend: CpuExtend | CudaExtend | None
    _packinfer_drafts: CudaVerify | None = None  # built when the number of drafts is known
    _packinfer_make_drafts: Callable[[int, int], CudaVerify] | None = None
    _packinfer_max_rows: int = 0  # of captured graphs
    _packinfer_verifies: bool = False  # graphs of verify steps were captured packed
    _packinfer_layers: dict[int, LayerReason | None]
    _packinfer_heads: tuple[int, int, int]  # of the layers that are packed
    _packinfer_step: Step | None = None  # runs this forward pass, if packed
    _packinfer_debug: bool
    _packinfer_check: bool = False  # this step is eager, and compared with the stock backend
    _packinfer_tokens: int = 0  # query tokens of an eager step that are no padding
    _packinfer_regroup: Regroup | None

    def packinfer_packs(self) -> list[str]:
        """Kinds of batches that may run on the packed kernels."""
        kinds = {"extend": self._packinfer_extend, "verify": self._packinfer_make_drafts}
        return ["decode", *(kind for kind, runs in kinds.items() if runs is not None)]

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)  # type: ignore[misc]
        self._packinfer_decode = self._packinfer_make(max(max_bs, EAGER_ROWS))
        self._packinfer_drafts, self._packinfer_max_rows = None, max_bs  # an eager dummy run may have built some

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Before an eager forward pass."""
        self._packinfer_step = None
        super().init_forward_metadata(forward_batch)  # type: ignore[misc]
        try:
            self._packinfer_step = self._packinfer_plan(forward_batch)
        except Exception as e:  # it would end the server: the stock backend can run any batch
            if self._packinfer_debug:
                raise
            STATS.count_error(e, "the stock backend runs this batch")
            if self._packinfer_decode is not None:
                self._packinfer_decode.forget()  # its plan may be one that was never loaded
        self._packinfer_check = self._packinfer_debug

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a graph is captured or replayed; some stock backends come here before an eager pass, too."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture)  # type: ignore[misc]
        self._packinfer_step, self._packinfer_check, self._packinfer_tokens = None, False, 0
        if not isinstance(self._packinfer_decode, CudaDecode):
            return
        replayed = not in_capture and hasattr(forward_batch, "num_padding")
        mode = forward_batch.forward_mode
        step = self._packinfer_decode if mode.is_decode() else self._packinfer_chain(forward_batch)
        if step is None:
            if replayed and mode.is_target_verify() and self._packinfer_verifies:
                raise RuntimeError(
                    f"packinfer: a graph of verify steps is replayed with {type(forward_batch.spec_info).__name__}, "
                    "not with the chain of drafts that it was captured for; please report this with the SGLang version"
                )
            if replayed and not forward_batch.actual_forward_mode.is_idle():
                STATS.count_fallback(_mode_reason(mode) or BatchReason.EXTEND)
        elif in_capture:
            self._packinfer_step = step
            self._packinfer_verifies |= isinstance(step, CudaVerify)
            step.step_for_capture(forward_batch.req_pool_indices)
        elif replayed:
            # The captured graph runs the packed kernels whatever the batch is: without rows nothing is shared. An idle
            # rank of data-parallel attention replays it, too, with no row at all.
            n = forward_batch.batch_size - forward_batch.num_padding
            lens = forward_batch.seq_lens_cpu[:n].numpy() if n else np.zeros(0, np.int64)
            pool_rows = forward_batch.req_pool_indices[:n]
            try:
                step.step(_of_rows(n), pool_rows, lens)
            except Exception as e:  # it would end the server; of the batch nothing but rows and lengths is needed
                if self._packinfer_debug:
                    raise
                STATS.count_error(e, "this batch is run without groups")
                step.step_alone(pool_rows, lens)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Captured with the graph, and run at each replay."""
        super().init_forward_metadata_in_graph(forward_batch)  # type: ignore[misc]
        if isinstance(self._packinfer_step, CudaDecode):
            self._packinfer_step.append(forward_batch.seq_lens, forward_batch.out_cache_loc)

    def _packinfer_chain(self, batch: ForwardBatch) -> CudaVerify | None:
        """What runs this batch if it verifies drafts that are a chain, or None."""
        if self._packinfer_make_drafts is None or not batch.forward_mode.is_target_verify():
            return None
        if batch.spec_info is None:  # an idle rank of data-parallel attention
            return self._packinfer_drafts
        drafts = chain_drafts(batch.spec_info)
        if drafts and self._packinfer_drafts is None:
            self._packinfer_drafts = self._packinfer_make_drafts(drafts, self._packinfer_max_rows or EAGER_ROWS)
        return self._packinfer_drafts if drafts and drafts == self._packinfer_drafts.drafts else None

    def _packinfer_plan(self, batch: ForwardBatch) -> Step | None:
        """Plan an eager batch; returns what will run it, None for the stock backend."""
        mode, rows = batch.forward_mode, running_rows()
        if mode.is_idle():
            return None
        step: Step | None = self._packinfer_extend if _is_plain_extend(mode) else self._packinfer_chain(batch)
        if isinstance(step, CudaVerify):
            reason = self._packinfer_plan_rows(step, batch, step.drafts)
        elif step is not None:
            reason = _extend_reason(batch, rows) or self._packinfer_plan_extend(step, batch, rows)
        else:
            reason = _batch_reason(batch, rows is not None) or self._packinfer_plan_decode(batch)
            step = self._packinfer_decode
        if reason is None:
            return step
        STATS.count_fallback(reason)
        return None

    def _packinfer_plan_decode(self, batch: ForwardBatch) -> BatchReason | None:
        """Why the stock backend runs this decode batch after all, or None."""
        if self._packinfer_decode is None:  # not for a prefill: graphs may need larger buffers
            self._packinfer_decode = self._packinfer_make(EAGER_ROWS)
        decode = self._packinfer_decode
        if isinstance(decode, CudaDecode):
            reason = self._packinfer_plan_rows(decode, batch, 1)
            if reason is None:
                decode.append(batch.seq_lens, batch.out_cache_loc)
            return reason
        n = self._packinfer_tokens = _n_rows(batch)
        decode.step(_of_rows(n), batch.req_pool_indices, batch.seq_lens, batch.out_cache_loc)
        return None

    def _packinfer_plan_rows(
        self, step: CudaDecode | CudaVerify, batch: ForwardBatch, row_tokens: int
    ) -> BatchReason | None:
        """The same of rows with so many query tokens each, on a GPU."""
        if batch.batch_size > step.max_rows:
            return BatchReason.TOO_MANY_ROWS
        n = _n_rows(batch)
        self._packinfer_tokens = n * row_tokens
        step.step(_of_rows(n), batch.req_pool_indices[:n], batch.seq_lens_cpu[:n].numpy())
        return None

    def _packinfer_plan_extend(
        self, extend: CpuExtend | CudaExtend, batch: ForwardBatch, rows: BatchRows
    ) -> BatchReason | None:
        """Why the stock backend runs this extend batch after all, or None."""
        q_lens = np.array(batch.extend_seq_lens_cpu, np.int32)
        kv_lens = q_lens + np.array(batch.extend_prefix_lens_cpu, np.int32)
        self._packinfer_tokens = int(q_lens.sum())
        return None if extend.step(rows, batch.req_pool_indices, q_lens, kv_lens) else BatchReason.EXTEND

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **more: Any) -> Any:
        return self._packinfer_forward(super().forward_decode, q, k, v, layer, forward_batch, *args, **more)  # type: ignore[misc]

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *args: Any, **more: Any) -> Any:
        return self._packinfer_forward(super().forward_extend, q, k, v, layer, forward_batch, *args, **more)  # type: ignore[misc]

    def _packinfer_forward(
        self,
        stock: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of one layer, by the plan of this forward pass or by ``stock``."""
        step = self._packinfer_step
        if (
            step is None
            or self._packinfer_layer_reason(layer) is not None
            or not self._packinfer_takes(layer, q, k, kwargs)
        ):
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache:  # else the model has written it, together with the rotary embedding
            _write_kv(self.token_to_kv_pool, layer, forward_batch.out_cache_loc, k, v)  # type: ignore[attr-defined]
        q = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        k_buffer = self.token_to_kv_pool.get_key_buffer(layer.layer_id)  # type: ignore[attr-defined]
        v_buffer = self.token_to_kv_pool.get_value_buffer(layer.layer_id)  # type: ignore[attr-defined]
        hides = self._packinfer_check and step is self._packinfer_decode and self._packinfer_regroup is not None
        with self._packinfer_regroup.sources_hidden(k_buffer, v_buffer) if hides else nullcontext():
            out = step.run(
                q, k_buffer, v_buffer, forward_batch.seq_lens, sm_scale=layer.scaling, logits_soft_cap=layer.logit_cap
            )
        out = out.view(len(q), -1)
        if self._packinfer_check:
            expected = stock(q, k, v, layer, forward_batch, False)
            n = self._packinfer_tokens
            _check_output(out[:n], expected.view_as(out)[:n], layer.layer_id)
        return out

    def _packinfer_takes(self, layer: RadixAttention, q: torch.Tensor, k: torch.Tensor | None, more: Any) -> bool:
        """Whether this call of a layer that can be packed is packed."""
        # Gemma 3 gives SGLang's triton backend a mask after the batch was planned, and this a mask to each verify step
        masked = getattr(getattr(self, "forward_metadata", None), "custom_mask", None) is not None
        if masked or more or k is None or len(q) < self._packinfer_tokens:
            STATS.set_layer(layer.layer_id, LayerReason.CUSTOM_MASK if masked else LayerReason.EXTRA_ARGUMENTS)
            return False
        return True

    def _packinfer_layer_reason(self, layer: RadixAttention) -> LayerReason | None:
        if layer.layer_id not in self._packinfer_layers:
            reason = layer_reason(layer, self.token_to_kv_pool)  # type: ignore[attr-defined]
            if reason is None and self._packinfer_heads != heads_of(layer):
                reason = LayerReason.OTHER_SHAPE
            self._packinfer_layers[layer.layer_id] = reason
            if reason is not None:
                STATS.set_layer(layer.layer_id, reason)
        return self._packinfer_layers[layer.layer_id]


def chain_drafts(spec_info: Any) -> int:
    """Tokens that each row has in a verify step if each of them sees those before it; 0 for trees of drafts."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    return int(spec_info.draft_token_num) if type(spec_info) is EagleVerifyInput and spec_info.topk == 1 else 0


def _n_rows(batch: ForwardBatch) -> int:
    """Rows of an eager batch: data-parallel attention pads those of its ranks to one size."""
    return int(batch.batch_size if batch._original_batch_size is None else batch._original_batch_size)


def _of_rows(n: int) -> BatchRows | None:
    """The scheduler's batch if it has so many rows."""
    rows = running_rows()
    return rows if rows is not None and len(rows.reqs) == n else None


def _mode_reason(mode: ForwardMode) -> BatchReason | None:
    if mode.is_decode():
        return None
    return BatchReason.SPECULATIVE if mode.is_target_verify() else BatchReason.EXTEND


def _is_plain_extend(mode: ForwardMode) -> bool:
    """Prefill, chunked prefill, or decodes among them."""
    return mode.name in ("EXTEND", "MIXED")


def _extend_reason(batch: ForwardBatch, rows: BatchRows | None) -> BatchReason | None:
    if batch.spec_info is not None:
        return BatchReason.SPECULATIVE
    if batch.encoder_lens is not None:
        return BatchReason.ENCODER_DECODER
    if batch.multi_item_delimiter_indices is not None:
        return BatchReason.MULTI_ITEM
    if rows is None or not len(rows.reqs) == len(batch.extend_seq_lens_cpu) == batch.batch_size:
        return BatchReason.NO_BATCH
    lens = np.add(batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu)
    known = lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu.numpy()
    return None if np.array_equal(lens, known) else BatchReason.OTHER_LENGTHS


def _batch_reason(batch: ForwardBatch, known: bool) -> BatchReason | None:
    if (reason := _mode_reason(batch.forward_mode)) is not None:
        return reason
    if getattr(batch, "spec_info", None) is not None:
        return BatchReason.SPECULATIVE
    if batch.encoder_lens is not None:
        return BatchReason.ENCODER_DECODER
    return None if known else BatchReason.NO_BATCH


def _check_output(out: torch.Tensor, stock: torch.Tensor, layer_id: int) -> None:
    """Raise RuntimeError if a row of ``out`` ([n, heads * head_dim]) is not the stock backend's within rounding."""
    error = (out.float() - stock.float()).norm(dim=1) / stock.float().norm(dim=1)
    worst = float(error.max())
    STATS.check_error = max(STATS.check_error, worst)
    # float32: sums of some thousand terms in another order; half precision: probabilities and output rounded once more
    if not worst <= {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[out.dtype]:
        raise RuntimeError(
            f"packinfer: layer {layer_id}, row {int(error.argmax())} of {len(out)}: packed attention is off the stock "
            f"backend's by {worst:.2g}; please report this with the SGLang version"
        )


def _write_kv(pool: Any, layer: RadixAttention, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v)


@functools.cache
def packed_class(base: type) -> type:
    """``PackInfer<Base>``, a subclass of the stock backend class."""
    return type(f"PackInfer{base.__name__}", (PackInferMixin, base), {})


def wrap(
    stock: AttentionBackend, runner: Any, config: Config, packed: RadixAttention, arena: range | None
) -> AttentionBackend:
    """Give a built stock backend packed decode and extend of layers like ``packed``.

    The new object shares the stock object's ``__dict__``: helpers that hold the stock object stay coherent with it.
    ``arena``: slots of the runner's KV pool that are ours.
    """
    shape = AttentionShape(*heads_of(packed), runner.token_to_kv_pool.dtype.itemsize)
    backend = object.__new__(packed_class(type(stock)))
    backend.__dict__ = stock.__dict__
    backend._packinfer_layers = {}
    backend._packinfer_heads = heads_of(packed)
    backend._packinfer_debug = config.check
    settings = {"grouping": config.grouping, "check": config.check, "stats": STATS}
    settings["req_to_token"] = runner.req_to_token_pool.req_to_token
    settings["regroup"] = backend._packinfer_regroup = STATS.arena = _regroup(runner, shape, config, arena)
    backend._packinfer_extend = None
    extend = {key: value for key, value in settings.items() if key != "regroup"}
    # with context parallelism a rank has only some of the new tokens
    extends = config.extend if getattr(runner.server_args, "attn_cp_size", 1) == 1 else "off"
    if torch.device(runner.device).type == "cpu":
        backend._packinfer_decode = CpuDecode(shape, CPU.decode_cost, CPU.decode_policy, **settings)
        if extends != "off":
            backend._packinfer_extend = CpuExtend(shape, always=extends == "on", **extend)
    else:
        backend.needs_cpu_seq_lens, pool = True, runner.token_to_kv_pool  # plans are made on the host
        if extends == "on" or extends == "auto" and is_measured(packed, torch.device(runner.device)):
            backend._packinfer_extend = CudaExtend(shape, always=extends == "on", **extend)
            k, v = pool.get_key_buffer(packed.layer_id), pool.get_value_buffer(packed.layer_id)
            backend._packinfer_extend.warm_up(k, v, runner.dtype, packed.logit_cap)
        backend._packinfer_make = lambda max_rows: CudaDecode(
            shape, max_rows=max_rows, pool_tokens=pool.size, **settings
        )
        if extends != "off" and is_measured(packed, torch.device(runner.device)) and not _masks_chains(stock):
            backend._packinfer_make_drafts = lambda drafts, max_rows: CudaVerify(
                shape, drafts, max_rows=max_rows, pool_tokens=pool.size, **extend
            )
    return backend


def _masks_chains(stock: AttentionBackend) -> bool:
    """Whether it gives verify steps a mask, though drafts are a chain; layers with a mask are not packed."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    return isinstance(stock, TritonAttnBackend)


def _regroup(runner: Any, shape: AttentionShape, config: Config, arena: range | None) -> Regroup | None:
    if arena is None:
        return None
    buffers = [*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer]
    on_cpu = buffers[0].device.type == "cpu"
    return Regroup(
        arena,
        buffers,
        runner.req_to_token_pool.req_to_token,
        functools.partial(copy_slots, buffers) if on_cpu else SlotCopier(buffers).copy,
        gain=CPU_ARENA_GAIN if on_cpu else CUDA_ARENA_GAIN,
        tile_queries=(CPU.decode_policy if on_cpu else tile_policy(shape, buffers[0].device)).tile_queries[0],
        force=config.check,
    )
