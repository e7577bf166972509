"""Which of SGLang's batches can be packed at all, by what the ForwardBatch says; and if not, why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from packinfer_sgl.reasons import BatchReason
from packinfer_sgl.serving.batch_rows import BatchRows

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode


def mode_reason(mode: ForwardMode) -> BatchReason | None:
    """Why batches of this mode are the stock backend's where no path packs them, or None for decode."""
    if mode.is_decode():
        return None
    return BatchReason.SPECULATIVE if mode.is_target_verify() else BatchReason.EXTEND


def extend_reason(batch: ForwardBatch, rows: BatchRows | None) -> BatchReason | None:
    """Why an extend batch is the stock backend's, whatever is expected, or None."""
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


def decode_reason(batch: ForwardBatch, rows: BatchRows | None, *, needs_rows: bool) -> BatchReason | None:
    """Why a batch that is no packed extend and no packed verify step is the stock backend's, or None.

    ``needs_rows``: it is, unless its requests are known.
    """
    if (reason := mode_reason(batch.forward_mode)) is not None:
        return reason
    if getattr(batch, "spec_info", None) is not None:
        return BatchReason.SPECULATIVE
    if batch.encoder_lens is not None:
        return BatchReason.ENCODER_DECODER
    return BatchReason.NO_BATCH if rows is None and needs_rows else None


def chain_drafts(spec_info: Any) -> int:
    """Tokens that each row has in a verify step if each of them sees those before it; 0 for trees of drafts."""
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    return int(spec_info.draft_token_num) if type(spec_info) is EagleVerifyInput and spec_info.topk == 1 else 0
