"""The records of the GPUs that were measured, and what stands for all others."""

from __future__ import annotations

import re
from dataclasses import replace

from packinfer_sgl.planning.device_profile import DeviceProfile

# By the name of the GPU. scripts/fit_costs.py and scripts/fit_extend.py write numbers and entries here.
PROFILES = {
    "H200": DeviceProfile(
        name="H200",
        is_measured=True,
        multiprocessors=132,
        bytes_per_us=4.81e06,
        reread_bytes_per_us=5.5e06,
        flops_per_us=2.79e08,
        grouping_item_us=0.02,
        large_item_us=6.93,
        small_item_us=2.38,
        partial_us=0,
        partial_bytes_per_us=3.02e06,
        saturating_programs=1.82,
        # of 27 batches of unequal rows with one prefix, those that read 1.04 to 1.33 times less ran at 0.87 to 1.09
        # times the speed without groups, those that read at least 1.55 times less at 1.06 to 1.35
        least_saving=1.4,
        extend_block_us=1.85,
        extend_half_block_us=1.63,
        extend_item_us=2.35,
        extend_partial_factor=0.687,
        extend_call_us=2.51,
        stock_block_us=1.73,
        stock_half_block_us=1.31,
        stock_tile_us=3.88,
        stock_call_us=3.69,
        extend_margin=1.08,  # of 60 measured batches none that it lets through was slower packed
        # of 33 batches at each head dimension 38 are let through: two of them at 1.01 and 1.10 of the stock backend's
        # time, all others below; with FP8 KV 10 of 30, all below
        extend_factor_64=1.37,
        extend_factor_256=1.08,
        extend_factor_fp8=1.19,
        stock_factor_64=1.34,
        stock_factor_256=1,
        stock_factor_fp8=0.944,
    ),
    # An H100 80GB HBM3. Plans by the H200's record are within 1 % of those by this one in all but single requests; what
    # differs is which extend batches are packed.
    "H100": DeviceProfile(
        name="H100",
        is_measured=True,
        multiprocessors=132,
        bytes_per_us=2.94e06,
        reread_bytes_per_us=5.5e06,
        flops_per_us=1.9e08,
        grouping_item_us=0.02,
        large_item_us=8.36,
        small_item_us=0.88,
        partial_us=0,
        # by hand the H200's: 2.165e6 was measured, and led to plans of extend batches that took 0.6 % longer
        partial_bytes_per_us=3.02e06,
        saturating_programs=0.87,
        least_saving=1.4,
        extend_block_us=1.82,
        extend_half_block_us=1.82,  # the fit says 2.0, but half of a tile takes no longer than all of it
        extend_item_us=3.24,
        extend_partial_factor=0.739,
        extend_call_us=1.34,
        stock_block_us=1.72,
        stock_half_block_us=1.44,
        stock_tile_us=4.79,
        stock_call_us=2.8,
        # of 60 measured batches 54 go where they were faster, and none took over 1.03 of the stock backend's time
        extend_margin=1.08,
        # of 90 batches 42 are let through: one of them at 1.09 of the stock backend's time, all others below
        extend_factor_64=1.31,
        extend_factor_256=1.08,
        extend_factor_fp8=1.16,
        stock_factor_64=1.27,
        stock_factor_256=1.01,
        stock_factor_fp8=0.943,
    ),
}
H200 = PROFILES["H200"]

# A GPU without a record has the H200's times, of which only ratios matter at decode. Grouping saves reads and pads
# products, so it pays the less, the higher the ratio of bandwidth to products. On data-centre GPUs since Ampere that
# ratio is at most 1.3 times the H200's (A100: 2.0 TB/s, 312 TFLOP/s), where groups must save 1.3 times as much: 1.8
# instead of 1.4. The rest is for kernels that were never tuned there.
UNMEASURED_SAVING = 2.0


def profile_for(name: str, multiprocessors: int | None = None) -> DeviceProfile:
    """The record of a GPU, or a conservative guess (``is_measured`` is False) that bears its name.

    Args:
        name: as CUDA gives it, like ``NVIDIA H200``.
        multiprocessors: of the GPU, if known. A slice of a GPU (MIG) or a smaller model of the same name has fewer
            than the one that was measured, and other bandwidth.
    """
    for key, profile in PROFILES.items():
        if re.search(rf"\b{re.escape(key)}\b", name) and multiprocessors in (None, profile.multiprocessors):
            return profile
    return replace(H200, name=name, is_measured=False, least_saving=UNMEASURED_SAVING)
