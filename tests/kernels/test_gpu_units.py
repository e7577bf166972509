"""The deterministic mode's promise on a GPU: out and lse2 of a row have the same bits alone and in any company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Case, check_attention, make_packed, run_packed
from unit_cases import in_company, unit_case

from packinfer_sgl.planning.fitting import Capacity, units_capacity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the mode is for Hopper"
    ),
]
FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPINGS = ("multi", "single", "off")

SHAPES = {
    "as Llama 3": {"group": 4, "head_dim": 128},
    "fp16": {"group": 4, "head_dim": 128, "dtype": torch.float16},
    "pages of 16": {"group": 4, "head_dim": 128, "page_size": 16},
    "pages of 64": {"group": 8, "head_dim": 128, "page_size": 64},
    "soft cap": {"group": 2, "head_dim": 128, "soft_cap": 20.0},
    "sinks": {"group": 4, "head_dim": 128, "sinks": torch.bfloat16},
    "FP8 KV": {"group": 4, "head_dim": 128, "kv_dtype": FP8, "v_scale": 0.75},
    "FP8 KV in pages": {"group": 5, "head_dim": 128, "kv_dtype": FP8, "v_scale": 0.75, "page_size": 16},
    "one query head": {"group": 1, "head_dim": 128},
    "5 query heads": {"group": 5, "head_dim": 128},
    "16 query heads": {"group": 16, "head_dim": 128},
    "32 query heads": {"group": 32, "head_dim": 128, "kv_heads": 1},
    "as gpt-oss": {"group": 8, "head_dim": 64, "sinks": torch.bfloat16},
    "64, fp16, soft cap": {"group": 3, "head_dim": 64, "dtype": torch.float16, "soft_cap": 20.0},
    "64, FP8 KV": {"group": 8, "head_dim": 64, "kv_dtype": FP8, "v_scale": 0.75, "sinks": torch.float32},
    "256": {"group": 8, "head_dim": 256},
    "256, fp16, pages": {"group": 6, "head_dim": 256, "dtype": torch.float16, "page_size": 16},
    "256, FP8 KV": {"group": 8, "head_dim": 256, "kv_dtype": FP8, "v_scale": 0.75},
    "256, soft cap": {"group": 2, "head_dim": 256, "soft_cap": 20.0},
    "FP8 KV, soft cap": {"group": 2, "head_dim": 128, "kv_dtype": FP8, "v_scale": 0.75, "soft_cap": 20.0},
}


def random_rows(seed: int, unit_tokens: int, rows: int = 0, **shape) -> Case:
    """Rows that share more or less than whole units, and have tails within, at and beyond their borders."""
    rng = np.random.default_rng(seed)
    n = rows or int(rng.integers(2, 70 if unit_tokens < 512 else 30))
    edges = [unit_tokens - 1, unit_tokens, unit_tokens + 1, 2 * unit_tokens, 3 * unit_tokens + 5]
    tails = [int(rng.choice([*edges, 1, int(rng.integers(1, 5 * unit_tokens))])) for _ in range(n)]
    return unit_case(
        seed,
        unit_tokens=unit_tokens,
        shared=[int(x) for x in rng.choice([0, 3, *edges, 7 * unit_tokens + 9], n - 1)],
        tails=tails,
        room_tokens=64,
        device="cuda",
        **{"dtype": torch.bfloat16, **shape},
    )


def assert_same(case: Case, of: tuple[torch.Tensor, torch.Tensor], rows: list[int], **how) -> None:
    """The rows planned and run in this company have the bits that they have in ``of``."""
    out, lse2 = run_packed(in_company(case, rows, **how))
    at = torch.tensor(rows, device="cuda")
    assert torch.equal(out, of[0][at]), (rows, how)
    assert torch.equal(lse2, of[1][at]), (rows, how)


@pytest.mark.parametrize("unit_tokens", [128, 512])
@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_company(name: str, unit_tokens: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(1000 + seed)
        case = random_rows(seed, unit_tokens, **SHAPES[name])
        n = len(case.slots)
        right = run_packed(case)
        if seed == 0:  # some rows: the reference is slow
            few = in_company(case, [*range(min(n, 8))], unit_tokens)
            check_attention(few, *run_packed(few), TOLERANCE[case.q.dtype])
        for row in rng.choice(n, min(n, 10), replace=False).tolist():
            assert_same(case, right, [row], unit_tokens=unit_tokens)
        for i in range(8):
            twice = bool(i % 2)
            rows = rng.choice(n, int(rng.integers(1, 2 * n if twice else n + 1)), replace=twice).tolist()
            how = {"grouping": GROUPINGS[i % 3], "once": bool(rng.integers(2))}
            assert_same(case, right, rows, unit_tokens=unit_tokens, **how)


def test_a_row_alone_among_many_siblings_and_among_strangers() -> None:
    """64 rows behind 16,000 tokens, in units of each length that is measured."""
    for unit_tokens in (256, 512, 1024, 2048):
        case = unit_case(
            1, unit_tokens=unit_tokens, shared=[16000] * 63 + [0] * 20, tails=[64 + 9 * i for i in range(84)],
            group=4, kv_heads=8, head_dim=128, dtype=torch.bfloat16, device="cuda", room_tokens=64,
        )  # fmt: skip
        right = run_packed(case)
        for row in (0, 17, 63, 83):
            assert_same(case, right, [row], unit_tokens=unit_tokens)
        assert_same(case, right, [*range(83, -1, -3)], unit_tokens=unit_tokens, grouping="off")
        assert_same(case, right, [5] * 200, unit_tokens=unit_tokens)


def test_other_units_have_other_bits() -> None:
    """Else these tests would see nothing."""
    case = random_rows(3, 512, rows=20, group=4, head_dim=128)
    right, other = run_packed(case), run_packed(in_company(case, [*range(20)], 256))
    assert not torch.equal(right[0], other[0]) and not torch.equal(right[1], other[1])


@pytest.mark.parametrize("name", ["as Llama 3", "FP8 KV in pages", "as gpt-oss", "256"])
def test_a_graph_gives_the_bits_of_an_eager_run(name: str) -> None:
    """One captured graph replays plans of fewer rows, grouped and not; padding comes out as 0."""
    unit_tokens, rows = 512, 48
    case = random_rows(5, unit_tokens, rows=rows, **SHAPES[name])
    right = run_packed(case)
    capacity = units_capacity(
        unit_tokens, max_rows=rows, context_tokens=int(case.kv_lens.max()), pool_tokens=len(case.k) * 64,
        room_tokens=64, row_spans=2,
    )  # fmt: skip
    packed = make_packed(case, capacity)
    q, lens = torch.zeros_like(case.q), torch.ones_like(case.kv_lens)
    out, lse2 = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    page_size = case.k.shape[1] if case.k.dim() == 4 else 1

    def load(some: Case) -> None:
        n = len(some.q)
        q[:n], lens[:n] = some.q, some.kv_lens
        packed.load(some.plan)
        packed.snapshot(some.req_to_token, some.pool_rows)
        out.fill_(float("nan"))

    def run() -> None:
        packed.run(
            q, case.k, case.v, lens, sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap, v_scale=case.v_scale,
            page_size=page_size, sinks=case.sinks, out=out, lse2=lse2,
        )  # fmt: skip

    load(in_company(case, [0], unit_tokens))
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    rng = np.random.default_rng(6)
    for i in range(12):
        chosen = rng.permutation(rows)[: int(rng.integers(1, rows + 1))].tolist()
        load(in_company(case, chosen, unit_tokens, grouping=GROUPINGS[i % 3], once=i % 2 == 1, room=i % 2 * 8))
        graph.replay()
        at = torch.tensor(chosen, device="cuda")
        assert torch.equal(out[: len(chosen)], right[0][at]) and torch.equal(lse2[: len(chosen)], right[1][at])
        assert not out[len(chosen) :].any()


@pytest.mark.parametrize("name", ["as Llama 3", "FP8 KV", "as gpt-oss", "256", "256, FP8 KV"])
def test_tails_that_grow_have_the_bits_of_a_new_plan(name: str) -> None:
    """A plan of some steps ago, against one of now, and against the row alone: across blocks of the kernel, up to the
    end of a unit."""
    unit_tokens, steps = 256, 40
    case = unit_case(
        7, unit_tokens=unit_tokens, shared=[600] * 9, tails=[100 + 2 * i for i in range(10)], room_tokens=64,
        device="cuda", **{"dtype": torch.bfloat16, **SHAPES[name]},
    )  # fmt: skip
    kept = in_company(case, [*range(10)], unit_tokens, room=steps)
    assert int((-case.kv_lens % unit_tokens).min()) >= steps
    packed = make_packed(kept, Capacity.of(kept.plan))
    packed.load(kept.plan)
    packed.snapshot(kept.req_to_token, kept.pool_rows)
    heads = case.k.shape[1:]
    more = torch.randn(2, 10 * steps, *heads, device="cuda").to(case.k.dtype)
    first = len(case.k)
    now = replace(case, k=torch.cat([case.k, more[0]]), v=torch.cat([case.v, more[1]]))
    for step in range(steps):
        new = torch.arange(first + 10 * step, first + 10 * (step + 1), device="cuda")
        lens = now.kv_lens + 1
        table = now.req_to_token.clone()
        table[now.pool_rows, lens - 1] = new.int()
        now = replace(
            now, kv_lens=lens, req_to_token=table, slots=[torch.cat([s, x[None].cpu()]) for s, x in zip(now.slots, new)]
        )
        packed.append(lens, new)
        out, lse2 = torch.full_like(case.q, float("nan")), torch.empty(case.q.shape[:2], device="cuda")
        packed.run(
            now.q, now.k, now.v, lens, sm_scale=case.sm_scale, logits_soft_cap=case.soft_cap, v_scale=case.v_scale,
            sinks=case.sinks, out=out, lse2=lse2,
        )  # fmt: skip
        assert_same(now, (out, lse2), [*range(10)], unit_tokens=unit_tokens)
        assert_same(now, (out, lse2), [step % 10], unit_tokens=unit_tokens)


def test_runs_are_repeatable() -> None:
    case = random_rows(11, 512, rows=64, group=4, head_dim=128, kv_heads=8)
    first = run_packed(case)
    for _ in range(20):
        again = run_packed(case)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
