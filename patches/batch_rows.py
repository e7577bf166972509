"""Carry the scheduler's batch to the attention backend."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.patches.hook import Hook
from packinfer_sgl.serving.batch_rows import BatchRows, rows_wanted, running

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_packinfer_rows"


def read_rows(forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    """After ``ForwardBatch.init_new(cls, batch, model_runner, ...)``: read the batch while it is what will run."""
    if rows_wanted():
        schedule_batch = args[1] if len(args) > 1 else kwargs["batch"]
        try:
            setattr(forward_batch, _ATTRIBUTE, BatchRows.of(schedule_batch))
        except Exception:  # it would end the server; without rows, eager batches go to the stock backend, counted
            _log_once()


@functools.cache
def _log_once() -> None:
    logger.exception(
        "packinfer: a batch could not be read and is not grouped; please report this with the SGLang version"
    )


def scope_rows(forward: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``ModelRunner.forward``: the rows of the batch that runs, in scope for the backend."""
    if not rows_wanted():
        return forward(runner, forward_batch, *args, **kwargs)
    with running(getattr(forward_batch, _ATTRIBUTE, None)):
        return forward(runner, forward_batch, *args, **kwargs)


def scope_loaded(load: Callable[..., Any], graphs: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``DecodeCudaGraphRunner.load_batch``: speculative decoding loads what it will verify ahead of the pass.

    Within a pass the batch may be a copy without rows of its own: those in scope stay.
    """
    rows = getattr(forward_batch, _ATTRIBUTE, None)
    if rows is None:
        return load(graphs, forward_batch, *args, **kwargs)
    with running(rows):
        return load(graphs, forward_batch, *args, **kwargs)


def hooks() -> list[Hook]:
    graphs = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.load_batch"
    return [
        Hook(graphs, scope_loaded, HookType.AROUND),
        Hook("sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new", read_rows, HookType.AFTER),
        Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", scope_rows, HookType.AROUND),
    ]
