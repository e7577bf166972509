"""Measure tile classes and piece lengths of the packed decode kernels on one GPU.

    python scripts/tune/tune_kernels.py --out DIR [--only D1,D5] [--seconds 200]

For each workload, variants of the tile table at the planner's pieces, then piece lengths of all classes for the best.
The table in ``kernels/tiles.py`` comes from its output.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from functools import cached_property
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/

import numpy as np
import torch
from bench.kernel_inputs import Inputs
from bench.kernel_workloads import HEAD_DIM, workloads
from bench_kernels import Timed, error, ours

from packinfer_sgl.kernels import tiles
from packinfer_sgl.kernels.tiles import Tile
from packinfer_sgl.planning.policy import TilePolicy

Table = tuple[Tile, ...]
LARGE, SMALL = tiles.TILES[HEAD_DIM]
VARIANTS: dict[str, Table] = {
    "as is": (LARGE, SMALL),
    "large in Triton": (dataclasses.replace(LARGE, kernel="triton", producer_registers=0, registers=255), SMALL),
    "large x128 s2": (dataclasses.replace(LARGE, tokens=128, stages=2, registers=128), SMALL),
    "large s4": (dataclasses.replace(LARGE, stages=4), SMALL),
    "large, 2 programs": (dataclasses.replace(LARGE, resident=2, programs=2), SMALL),
    "small, 4 programs": (LARGE, dataclasses.replace(SMALL, programs=4)),
    "small, 16 programs": (LARGE, dataclasses.replace(SMALL, programs=16)),
    "small x64": (LARGE, dataclasses.replace(SMALL, tokens=64)),
    "small w2": (LARGE, dataclasses.replace(SMALL, warps=2)),
    "small s4": (LARGE, dataclasses.replace(SMALL, stages=4)),
}
LARGE_CHUNKS = (256, 384, 512, 768, 1024, 1536, 2048, 4096)
SMALL_CHUNKS = (256, 512, 1024, 1 << 30)


@dataclasses.dataclass(frozen=True)
class Fixed(TilePolicy):
    """Piece lengths as told: ``chunks`` of the classes with many rows, and of the last class."""

    chunks: tuple[int, int] = (0, 0)

    @cached_property
    def table(self) -> np.ndarray:
        table = TilePolicy(self.tile_queries, self.chunks[0]).table
        table["max_split_tokens"][-1] = self.chunks[1]
        return table


def measure(x: Inputs, reference: torch.Tensor, table: Table, chunks: tuple[int, int] | None) -> tuple[float, dict]:
    real_policy = tiles.tile_policy

    def policy(shape: object, device: object) -> TilePolicy:
        auto = real_policy(shape, device)
        return Fixed(auto.tile_queries, 0, None, chunks) if chunks else auto

    with mock.patch.dict(tiles.TILES, {HEAD_DIM: table}), mock.patch("bench_kernels.tile_policy", policy):
        (call, outs), info = ours(x)
        outs[0].fill_(float("nan"))
        call(0)
        assert error(outs, reference) < 0.02, (table, chunks)
        timed = Timed(call, x.copies)
        for _ in range(3):
            timed.measure()
    return sorted(timed.us)[1], info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="D")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()
    started, results = time.perf_counter(), []
    args.out.mkdir(parents=True, exist_ok=True)
    for work in workloads():
        if not work.name.startswith(tuple(args.only.split(","))):
            continue
        if time.perf_counter() - started > args.seconds:
            break
        x = Inputs(work, contiguous=False)
        reference = x.reference()
        rows: list[tuple[float, str, tuple[int, int] | None, dict]] = []
        for name, table in VARIANTS.items():
            us, info = measure(x, reference, table, None)
            rows.append((us, name, None, info))
        print(f"== {work.name}: " + ", ".join(f"{name} {us:.1f}" for us, name, _, _ in rows), flush=True)
        as_is = rows[0]
        large = LARGE_CHUNKS if work.node_tokens else LARGE_CHUNKS[-1:]
        for chunks in itertools.product(large, SMALL_CHUNKS):
            us, info = measure(x, reference, VARIANTS["as is"], chunks)
            rows.append((us, "as is", chunks, info))
        best = min((r for r in rows if r[2]), key=lambda r: r[0])
        print(f"   planner {as_is[0]:.1f} {as_is[3]}\n   best {best[0]:.1f} {best[2]} {best[3]}", flush=True)
        results.append({"workload": work.name, "rows": rows})
        (args.out / "tune.json").write_text(json.dumps(results))
        del x, reference
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
