"""Why a batch or a layer runs on the stock backend instead of the packed kernels, or is packed without groups."""

from __future__ import annotations

from enum import Enum


class BatchReason(str, Enum):
    """Reasons that hold for every layer of one batch."""

    EXTEND = "extend"  # left to the stock backend by the setting, by the expected times, or as too large to plan
    SPECULATIVE = "speculative"
    DETERMINISTIC = "deterministic"  # a verify step in SGLang's deterministic mode, where only decode is packed
    ENCODER_DECODER = "encoder_decoder"
    NO_BATCH = "no_batch"  # a forward that SGLang did not build from its scheduler's batch (warm-up, capture)
    TOO_MANY_ROWS = "too_many_rows"  # more rows than the buffers hold
    OTHER_LENGTHS = "other_lengths"  # an extend whose lengths SGLang states in two ways
    ERROR = "error"  # planning failed, the log says how; a captured graph ran a plan without groups instead
    MULTI_ITEM = "multi_item"  # an extend that scores several items of a request apart from each other


class LayerReason(str, Enum):
    """Reasons that hold for one layer of the model in every batch."""

    LINEAR_ATTENTION = "linear_attention"  # a state, no KV: SGLang's own kernels beside any attention backend
    SLIDING_WINDOW = "sliding_window"  # or chunks of local attention (Llama 4)
    CROSS_ATTENTION = "cross_attention"
    NOT_DECODER = "not_decoder"
    UNEQUAL_HEAD_DIMS = "unequal_head_dims"
    CUSTOM_MASK = "custom_mask"  # set by the model for a batch: images that are seen from both sides
    EXTRA_ARGUMENTS = "extra_arguments"  # rope halves, score modifiers: anything passed beyond q, k, v and sinks
    TEMPERATURE_BY_LENGTH = "temperature_by_length"
    HEAD_DIM = "head_dim"  # a head dimension that the GPU kernels have no tiles for
    GROUP_SIZE = "group_size"  # more query heads per KV head than a small tile has rows
    OTHER_SHAPE = "other_shape"  # other heads than the first packed layer, for which plans are made
    SINKS = "sinks"  # attention sinks that are not one float for each query head
    # FP8 other than e4m3, FP4, integers; FP8 on GPUs before compute capability 8.9, and under a float32 model there
    KV_DTYPE = "kv_dtype"
    KV_SCALES = "kv_scales"  # of FP8 KV: one for each head, or on a CPU any, since torch_native knows none
    KV_POOL = "kv_pool"  # KV that does not lie in one [slots, heads, head_dim] buffer per layer


class UngroupedReason(str, Enum):
    """Why a packed step reads nothing once for several requests."""

    OFF = "off"  # by the setting
    NOTHING_SHARED = "nothing_shared"  # as far as is known of the requests
    SHORT_SPANS = "short_spans"  # no shared span is worth a read of its own
    SMALL_SAVING = "small_saving"  # those that are would save less, all together, than the gate asks for
    FULL_BUFFERS = "full_buffers"  # a plan with groups does not fit
