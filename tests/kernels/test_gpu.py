"""The Triton kernels on a GPU: bf16, extreme shapes, repeated runs, and captured graphs that replay other plans."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import EXTENDS, Case, check_attention, make_packed, random_case, run_packed

from packinfer_sgl.kernels.tiles import EXTEND_TILES, TILES, Tile
from packinfer_sgl.planning.fitting import Capacity

pytestmark = pytest.mark.gpu
# P and the output are rounded to 8 bits: relative to the size of a row
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(case: Case, out: torch.Tensor, lse2: torch.Tensor) -> None:
    check_attention(case, out, lse2, TOLERANCE[case.q.dtype])


SHAPES = [(group, 128, torch.bfloat16) for group in (1, 2, 4, 5, 6, 7, 8, 16, 32)]
SHAPES += [(4, 128, torch.float16), (4, 64, torch.bfloat16), (4, 64, torch.float16)]
SHAPES += [(32, 64, torch.bfloat16), (4, 256, torch.bfloat16), (4, 256, torch.float16)]


@pytest.mark.parametrize(("group", "head_dim", "dtype"), SHAPES)
@pytest.mark.parametrize(("page_size", "soft_cap"), [(1, 0.0), (16, 20.0)])
def test_random_trees(group: int, head_dim: int, dtype: torch.dtype, page_size: int, soft_cap: float) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed * 100 + group)
        n = int(rng.integers(1, 70))
        case = random_case(
            seed,
            shared=[int(x) for x in rng.choice([0, 16, 64, 160, 320], n - 1)],
            tails=[int(x) for x in rng.integers(1, 300, n)],
            group=group,
            head_dim=head_dim,
            dtype=dtype,
            device="cuda",
            page_size=page_size,
            max_split_tokens=int(rng.choice([64, 100, 1 << 30])),
            soft_cap=soft_cap,
        )
        check(case, *run_packed(case))


@pytest.mark.parametrize("sinks", [None, torch.bfloat16], ids=["", "sinks"])
@pytest.mark.parametrize(("group", "page_size", "soft_cap"), [(8, 1, 0.0), (12, 16, 20.0), (16, 1, 0.0), (32, 16, 0.0)])
def test_random_trees_in_one_launch(group: int, page_size: int, soft_cap: float, sinks: torch.dtype | None) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed * 100 + group)
        n = int(rng.integers(1, 70))
        shared, tails = rng.choice([0, 16, 64, 160, 320], n - 1).tolist(), rng.integers(1, 300, n).tolist()
        layer = {"group": group, "head_dim": 128, "dtype": torch.bfloat16, "soft_cap": soft_cap, "sinks": sinks}
        cut = {"page_size": page_size, "max_split_tokens": int(rng.choice([64, 100, 1 << 30]))}
        case = random_case(seed, shared=shared, tails=tails, device="cuda", tiles=EXTEND_TILES[128], **layer, **cut)
        check(case, *run_packed(case))


@pytest.mark.parametrize("sinks", [None, torch.bfloat16], ids=["", "sinks"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (1, 128), (2, 64), (2, 128)])
@pytest.mark.parametrize(
    "batch",
    [
        {"shared": [1000] * 30, "tails": [*range(1, 311, 10)], "max_split_tokens": 1 << 30},
        {"shared": [0] * 30, "tails": [*range(1, 3100, 100)], "shares": 41},
        {"shared": [600] * 9, "tails": [90] * 10, "new": [70, 90] * 5, "max_split_tokens": 256},
        {"shared": [1000] * 15, "tails": [*range(4, 164, 10)], "new": [4] * 16, "max_split_tokens": 300},
    ],
    ids=["decode", "decode, nothing shared", "extend", "verify"],
)
def test_32_query_heads_of_a_kv_head(batch, kv_heads: int, head_dim: int, sinks: torch.dtype | None) -> None:
    shape = {"group": 32, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": torch.bfloat16, "sinks": sinks}
    case = random_case(3, device="cuda", **shape, **batch)
    check(case, *run_packed(case))


@pytest.mark.parametrize(
    ("shared", "tails"),
    [
        ([], [1]),
        ([], [131072]),
        ([0] * 1023, [3] * 1024),
        ([512] * 1023, [1] * 1024),
        ([130000, 130000], [1072, 1, 500]),
    ],
    ids=["one token", "131,072 tokens", "1,024 rows", "1,024 sharers", "long prefix"],
)
def test_extreme_shapes(shared: list[int], tails: list[int]) -> None:
    case = random_case(
        1, shared=shared, tails=tails, head_dim=128, dtype=torch.bfloat16, device="cuda", max_split_tokens=2048
    )
    check(case, *run_packed(case))


@pytest.mark.parametrize("shares", [3, 41, 82])
def test_equal_shares(shares: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 90))
        case = random_case(
            seed,
            shared=[0] * (n - 1),
            tails=[int(x) for x in np.exp(rng.uniform(0, 8, n))],
            head_dim=128,
            dtype=torch.bfloat16,
            device="cuda",
            shares=shares,
        )
        check(case, *run_packed(case))


EXTEND_SHAPES = [
    (1, 128, torch.bfloat16, 1, 0.0),
    (3, 128, torch.bfloat16, 1, 0.0),
    (4, 128, torch.bfloat16, 1, 0.0),
    (5, 128, torch.bfloat16, 16, 20.0),
    (8, 128, torch.bfloat16, 1, 0.0),
    (16, 128, torch.bfloat16, 16, 0.0),
    (4, 128, torch.float16, 1, 20.0),
    (4, 64, torch.bfloat16, 1, 0.0),
    (5, 64, torch.float16, 16, 20.0),
    (4, 256, torch.bfloat16, 1, 0.0),
    (32, 128, torch.bfloat16, 1, 0.0),
    (32, 64, torch.bfloat16, 16, 20.0),
]


@pytest.mark.parametrize("name", EXTENDS)
@pytest.mark.parametrize(("group", "head_dim", "dtype", "page_size", "soft_cap"), EXTEND_SHAPES)
def test_extends(name: str, group: int, head_dim: int, dtype: torch.dtype, page_size: int, soft_cap: float) -> None:
    shape = {"group": group, "head_dim": head_dim, "dtype": dtype, "page_size": page_size, "soft_cap": soft_cap}
    case = random_case(1, device="cuda", **shape, **{"max_split_tokens": 300, **EXTENDS[name]})
    check(case, *run_packed(case))


@pytest.mark.parametrize(("group", "head_dim", "dtype", "page_size", "soft_cap"), EXTEND_SHAPES)
def test_random_extends(group: int, head_dim: int, dtype: torch.dtype, page_size: int, soft_cap: float) -> None:
    for seed in range(16):
        rng = np.random.default_rng(seed * 100 + group)
        n = int(rng.integers(1, 60))
        shared = [int(x) for x in rng.choice([0, 16, 64, 160, 320], n - 1)]
        tails = [int(x) for x in np.exp(rng.uniform(0, 6.5, n))]
        case = random_case(
            seed,
            shared=shared,
            tails=tails,
            new=[max(1, int(x * rng.choice([0.3, 1.0]))) for x in tails],
            window_left=int(rng.choice([-1, -1, 0, 40, 300])),
            group=group,
            head_dim=head_dim,
            dtype=dtype,
            device="cuda",
            page_size=page_size,
            max_split_tokens=int(rng.choice([64, 100, 1 << 30])),
            max_inline_tail_tokens=int(rng.choice([0, 500])),
            soft_cap=soft_cap,
        )
        check(case, *run_packed(case))


# Of which rows are written by one item, and which are merged from a few partial results, or from many.
SINK_BATCHES = {
    "direct": {"shared": [0] * 20, "tails": [90] * 21, "max_split_tokens": 1 << 30},
    "few partial results": {"shared": [300] * 20, "tails": [30] * 21, "max_split_tokens": 1 << 30},
    "many partial results": {"shared": [900] * 20, "tails": [500] * 21, "max_split_tokens": 64},
    "one row": {"shared": [], "tails": [4000], "max_split_tokens": 100},
    "equal shares": {"shared": [0] * 20, "tails": [90, 2000, 5] * 7, "shares": 41},
    "an extend": {"shared": [0] * 6, "tails": [1, 31, 33, 64, 130, 257, 4], "new": [1, 31, 33, 64, 130, 257, 4],
                  "max_split_tokens": 1 << 30},
    "few listed": {"shared": [300] * 15, "tails": [20] * 16, "new": [20] * 16, "max_split_tokens": 1 << 30},
    "many listed": {"shared": [900, 0, 900], "tails": [400] * 4, "new": [70] * 4, "max_split_tokens": 100},
    "riding tails": EXTENDS["riding tails"],
    "window": {**EXTENDS["window"], "max_split_tokens": 64},
}  # fmt: skip


@pytest.mark.parametrize("soft_cap", [0.0, 20.0], ids=["", "soft cap"])
@pytest.mark.parametrize("sinks", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "head_dim"), [(8, 64), (4, 128), (16, 128), (8, 256)])
@pytest.mark.parametrize("name", SINK_BATCHES)
def test_sinks(name: str, group: int, head_dim: int, sinks: torch.dtype, soft_cap: float) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        shape = {"group": group, "head_dim": head_dim, "dtype": dtype, "soft_cap": soft_cap, "sinks": sinks}
        case = random_case(1, device="cuda", **shape, **SINK_BATCHES[name])
        check(case, *run_packed(case))
        if dtype == torch.bfloat16 and sinks == torch.bfloat16:  # what a graph holds is the address of the sinks
            check_graph(case)


def check_graph(case) -> None:
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    out, lse2 = torch.empty_like(case.q), torch.empty(case.q.shape[:2], device="cuda")

    def run() -> None:
        packed.run(
            case.q, case.k, case.v, case.kv_lens, sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap,
            windowed=case.visible is not None, sinks=case.sinks, out=out, lse2=lse2,
        )  # fmt: skip

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for factor in (1, -0.5):
        case.sinks.mul_(factor)
        out.fill_(float("nan"))
        graph.replay()
        check(case, out, lse2)


@pytest.mark.parametrize(
    ("shared", "tails", "new"),
    [([], [7000], [1000]), ([4096] * 15, [130] * 16, [120] * 16), ([0] * 299, [40] * 300, [40] * 300)],
    ids=["a long chunk", "a long prefix", "300 prompts"],
)
@pytest.mark.parametrize("max_split_tokens", [1024, 1 << 30])
def test_large_extends(shared: list[int], tails: list[int], new: list[int], max_split_tokens: int) -> None:
    case = random_case(
        1, shared=shared, tails=tails, new=new, head_dim=128, dtype=torch.bfloat16, device="cuda",
        max_split_tokens=max_split_tokens,
    )  # fmt: skip
    check(case, *run_packed(case))


@pytest.mark.parametrize("new", [None, [50] * 41], ids=["decode", "extend"])
def test_runs_are_repeatable(new: list[int] | None) -> None:
    case = random_case(
        2, shared=[300] * 40, tails=[50] * 41, head_dim=128, dtype=torch.bfloat16, device="cuda", max_split_tokens=64,
        new=new,
    )  # fmt: skip
    first = run_packed(case)
    for _ in range(20):
        again = run_packed(case)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_plan_that_is_loaded_once_serves_many_layers() -> None:
    """Programs take items, of which there are more than programs, from a counter that ends where it began."""
    case = random_case(
        1, shared=[0] * 299, tails=[40] * 300, new=[40] * 300, head_dim=128, dtype=torch.bfloat16, device="cuda"
    )
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    out, lse2 = torch.empty_like(case.q), torch.empty(case.q.shape[:2], device="cuda")

    def run() -> None:
        packed.run(case.q, case.k, case.v, case.kv_lens, sm_scale=case.sm_scale, windowed=True, out=out, lse2=lse2)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
        run()
    for layer in (run, run, graph.replay, graph.replay, run):
        out.fill_(float("nan"))
        lse2.fill_(float("nan"))
        layer()
        check(case, out, lse2)


@pytest.mark.parametrize("tiles", [TILES[128], EXTEND_TILES[128]], ids=["two launches", "one launch"])
def test_one_graph_replays_many_plans(tiles: tuple[Tile, ...]) -> None:
    """A graph captured with one plan runs others, smaller batches included; rows beyond a plan come out as 0."""
    rows = 24
    cases = [
        random_case(seed, shared=shared, tails=tails, head_dim=128, dtype=torch.bfloat16, device="cuda", tiles=tiles)
        for seed, (shared, tails) in enumerate(
            [([200] * 23, [30] * 24), ([0] * 23, [90] * 24), ([64, 0, 300], [5, 80, 1, 7]), ([], [1])]
        )
    ]
    capacity = Capacity(rows, 400, 400, 100, 800, max(c.plan.kv_capacity for c in cases) + 8)
    packed = make_packed(cases[0], capacity)
    slots = max(len(c.k) for c in cases)
    q = torch.zeros(rows, *cases[0].q.shape[1:], dtype=torch.bfloat16, device="cuda")
    k, v = torch.zeros(2, slots, *cases[0].k.shape[1:], dtype=torch.bfloat16, device="cuda")
    lens = torch.ones(rows, dtype=torch.long, device="cuda")
    out, lse2 = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")

    def load(case) -> None:
        n = len(case.q)
        q[:n], lens[:n] = case.q, case.kv_lens
        k[: len(case.k)], v[: len(case.v)] = case.k, case.v
        packed.load(case.plan)
        packed.snapshot(case.req_to_token, case.pool_rows)
        out.fill_(float("nan"))

    def run() -> None:
        packed.run(q, k, v, lens, sm_scale=cases[0].sm_scale, out=out, lse2=lse2)

    load(cases[0])
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case in cases + cases[::-1]:
        load(case)
        graph.replay()
        n = len(case.q)
        check(case, out[:n], lse2[:n])
        assert not out[n:].any()


@pytest.mark.parametrize("tiles", [TILES[128], EXTEND_TILES[128]], ids=["two launches", "one launch"])
def test_grown_tails_are_read(tiles: tuple[Tile, ...]) -> None:
    """The plan of one step serves the next ones: slots are appended, items read up to the row's length of now."""
    case = random_case(
        3, shared=[100, 100], tails=[20, 30, 40], head_dim=128, dtype=torch.bfloat16, device="cuda", tiles=tiles
    )
    packed = make_packed(case, Capacity.of(case.plan))
    packed.load(case.plan)
    packed.snapshot(case.req_to_token, case.pool_rows)
    free = torch.isnan(case.k[:, 0, 0]).nonzero()[:, 0].tolist()
    for _ in range(2):
        new = torch.tensor([free.pop() for _ in range(3)], device="cuda") if len(free) > 2 else None
        if new is None:
            break
        case.k[new], case.v[new] = torch.randn(2, 3, *case.k.shape[1:], dtype=torch.bfloat16, device="cuda")
        lens = case.kv_lens + 1
        packed.append(lens, new)
        case = dataclasses.replace(
            case, kv_lens=lens, slots=[torch.cat([s, x[None].cpu()]) for s, x in zip(case.slots, new)]
        )
        out, lse2 = torch.full_like(case.q, float("nan")), torch.empty(case.q.shape[:2], device="cuda")
        packed.run(case.q, case.k, case.v, lens, sm_scale=case.sm_scale, out=out, lse2=lse2)
        check(case, out, lse2)


def test_plan_beyond_capacity_is_refused() -> None:
    case = random_case(4, shared=[100], tails=[20, 30], head_dim=128, dtype=torch.bfloat16, device="cuda")
    packed = make_packed(case, dataclasses.replace(Capacity.of(case.plan), items=1))
    with pytest.raises(ValueError, match="does not fit the buffers: .*items"):
        packed.load(case.plan)
