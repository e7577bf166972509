"""Compile for Hopper every kernel that PackedCuda launches, on a machine without a GPU; one line of JSON for each."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from cases import make_packed, random_case
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from packinfer_sgl.kernels.copy_slots import SlotCopier
from packinfer_sgl.kernels.tiles import EXTEND_TILES, FP8_EXTEND_TILES, WIDE_TILES, decodes_in_one_launch, unit_tiles
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.fitting import Capacity

DTYPE = {64: torch.float16, 128: torch.bfloat16, 256: torch.bfloat16}
FP8 = torch.float8_e4m3fn


class Hopper:
    """What Triton asks the driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: what does not fit into registers."""
    from triton.backends.nvidia import __path__ as nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia[0]) / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return {"registers": int(registers), "stack_bytes": int(stack)}


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    run, what, seen = JITFunction.run, {}, set()

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            use = {"shared_bytes": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
            print(json.dumps({"kernel": kernel.metadata.name, **what, **use}), flush=True)

    JITFunction.run = compile_only
    for (head_dim, dtype), kv_dtype in itertools.product(DTYPE.items(), (None, FP8)):
        for group in (4, 32) if head_dim in WIDE_TILES else (4,):
            tiles = unit_tiles(AttentionShape(2 * group, 2, head_dim, 2 if kv_dtype is None else 1))
            what = {"head_dim": head_dim, "fp8": kv_dtype is FP8, "windowed": False, "group": group, "units": True}
            shape = {"head_dim": head_dim, "dtype": dtype, "kv_dtype": kv_dtype, "tiles": tiles, "group": group}
            case = random_case(0, shared=[512] * 2, tails=[5] * 3, unit_tokens=512, **shape)
            packed = make_packed(case, Capacity.of(case.plan))
            packed._pdl = packed._is_hopper = True
            packed.load(case.plan)
            packed.snapshot(case.req_to_token, case.pool_rows)
            for sinks in (None, torch.zeros(case.q.shape[1], dtype=torch.bfloat16)):
                what["sinks"] = sinks is not None
                packed.run(case.q, case.k, case.v, case.kv_lens, sm_scale=1.0, sinks=sinks)
        extend = (EXTEND_TILES if kv_dtype is None else FP8_EXTEND_TILES).get(head_dim)
        kinds = [(3, None, None, 4), (40, None, None, 4), (3, [5] * 3, extend, 4), (3, [5] * 3, None, 4)]
        if head_dim in WIDE_TILES:
            kinds[:0] = [(3, None, None, 32), (40, None, None, 32), (3, [5] * 3, extend, 32)]
        if decodes_in_one_launch(AttentionShape(64, 2, head_dim, (kv_dtype or dtype).itemsize)):
            kinds[:0] = [(3, None, extend, group) for group in (4, 8, 32)]
        for rows, new, tiles, group in kinds:
            windowed = new is not None
            what = {"head_dim": head_dim, "fp8": kv_dtype is FP8, "windowed": windowed, "group": group}
            shape = {"head_dim": head_dim, "dtype": dtype, "kv_dtype": kv_dtype, "tiles": tiles, "group": group}
            case = random_case(0, shared=[40] * (rows - 1), tails=[5] * rows, new=new, **shape)
            packed = make_packed(case, Capacity.of(case.plan))
            packed._pdl = packed._is_hopper = True
            packed.load(case.plan)
            packed.snapshot(case.req_to_token, case.pool_rows)
            packed.append(case.kv_lens, case.kv_lens)
            for sinks in (None, torch.zeros(case.q.shape[1], dtype=torch.bfloat16)):
                what["sinks"] = sinks is not None
                packed.run(case.q, case.k, case.v, case.kv_lens, sm_scale=1.0, windowed=windowed, sinks=sinks)
            if tiles is not None:
                out, what["sinks"] = torch.empty_like(case.q, dtype=torch.float32), False
                packed.run(case.q, case.k, case.v, case.kv_lens, sm_scale=1.0, windowed=windowed, out=out)
        what = {"head_dim": head_dim, "fp8": kv_dtype is FP8, "windowed": True, "group": 4}
        mask = torch.ones(40, dtype=torch.bool), torch.zeros(len(case.q), dtype=torch.int64)
        packed.run(case.q, case.k, case.v, case.kv_lens, sm_scale=1.0, windowed=True, mask=mask)
        what["windowed"] = False
        SlotCopier([case.k, case.v]).copy(case.req_to_token[0, :5], 7)


if __name__ == "__main__":
    sys.exit(main())
