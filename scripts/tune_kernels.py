"""Measure tile classes and piece lengths of the packed decode kernels on one GPU.

    python scripts/tune_kernels.py [--only D1,D5] [--out DIR]

For each workload, every pair of tile classes at the planner's pieces, then a grid of piece lengths for the best pair.
The tables and constants in ``kernels/packed.py`` come from its output.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from bench_kernels import HEAD_DIM, Inputs, Timed, error, ours, workloads

from packinfer_sgl.kernels import packed
from packinfer_sgl.kernels.packed import Tile, Tiles
from packinfer_sgl.plan import TilePolicy

LARGE = [
    (Tile(64, 64, 4, 3), 2),
    (Tile(64, 64, 4, 3), 1),
    (Tile(64, 64, 4, 2), 2),
    (Tile(128, 64, 8, 3), 1),
    (Tile(128, 64, 8, 2), 1),
    (Tile(128, 128, 8, 2), 1),
]
SMALL = [
    (Tile(16, 32, 2, 4), 4),
    (Tile(16, 32, 2, 4), 8),
    (Tile(16, 32, 2, 4), 32),
    (Tile(16, 64, 2, 3), 8),
    (Tile(16, 64, 4, 3), 8),
    (Tile(16, 32, 2, 5), 8),
]
CHUNKS = (256, 512, 768, 1024, 2048, 4096, 1 << 30)


@dataclasses.dataclass(frozen=True)
class Fixed(TilePolicy):
    """Piece lengths as told."""

    large_chunk: int = 0
    small_chunk: int = 0

    def pieces(self, tokens: np.ndarray, queries: np.ndarray, small: np.ndarray) -> np.ndarray:
        return np.maximum(-(-tokens // np.where(small, self.small_chunk, self.large_chunk)), 1)


def measure(x: Inputs, reference: torch.Tensor, tiles: Tiles, chunks: tuple[int, int] | None) -> tuple[float, dict]:
    policy = packed.tile_policy
    if chunks:

        def policy(shape: object, device: object) -> TilePolicy:
            auto = real_policy(shape, device)
            return Fixed(auto.large_queries, auto.small_queries, 0, None, *chunks)

    real_policy = packed.tile_policy
    with mock.patch.dict(packed.TILES, {HEAD_DIM: tiles}), mock.patch("bench_kernels.tile_policy", policy):
        (call, outs), info = ours(x)
        outs[0].fill_(float("nan"))
        call(0)
        assert error(outs, reference) < 0.02, (tiles, chunks)
        timed = Timed(call, x.copies)
        for _ in range(3):
            timed.measure()
    return sorted(timed.us)[1], info


def label(tile: Tile, per_sm: int) -> str:
    return f"{tile.block_m}x{tile.block_n} w{tile.warps} s{tile.stages} x{per_sm}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="D1 ,D2,D3,D5,D6,D7,D8,D10,D11")
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
        large = LARGE if work.node_tokens else LARGE[:1]
        rows = []

        def go(tiles: Tiles, chunks: tuple[int, int] | None, x=x, reference=reference, rows=rows, work=work) -> float:
            try:
                us, info = measure(x, reference, tiles, chunks)
            except Exception as e:
                print(work.name, tiles, chunks, f"{type(e).__name__}: {e}"[:200], flush=True)
                return float("inf")
            rows.append((us, tiles, chunks, info))
            results.append(
                {"workload": work.name, "us": us, "tiles": dataclasses.asdict(tiles), "chunks": chunks, "plan": info}
            )
            return us

        for (tile, slots), (small, small_slots) in itertools.product(large, SMALL):
            if large is LARGE and (tile, slots) != LARGE[0] and (small, small_slots) not in SMALL[:2]:
                continue
            go(Tiles(tile, small, slots, small_slots), None)
        best = min(rows, key=lambda row: row[0])
        for chunks in itertools.product(CHUNKS[1:] if work.node_tokens else CHUNKS[-1:], CHUNKS):
            go(best[1], chunks)
        rows.sort(key=lambda row: row[0])
        auto = min((row for row in rows if row[2] is None), key=lambda row: row[0])
        print(f"== {work.name}: planner's pieces {auto[0]:.1f} us {auto[1]} {auto[3]}", flush=True)
        for us, tiles, chunks, info in rows[:4]:
            print(f"   {us:.1f} us  {chunks}  {label(tiles.large, tiles.large_slots)}  "
                  f"{label(tiles.small, tiles.small_slots)}  {info}", flush=True)  # fmt: skip
        (args.out / "tune.json").write_text(json.dumps(results))
        del x, reference
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
