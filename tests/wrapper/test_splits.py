"""``fixed_split_size`` and ``disable_split_kv``: the KV of a request is cut at the same positions in any batch.

On a GPU bits are compared; in Triton's interpreter, whose products are numpy's, values and plans.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paged_cases import int32

from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper as Decode
from packinfer_sgl import BatchPrefillWithPagedKVCacheWrapper as Prefill
from packinfer_sgl.paged import batch as paged
from packinfer_sgl.paged import kernels
from packinfer_sgl.paged.graph_buffers import GraphBuffers
from packinfer_sgl.planning.plan import Col

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if ON_HOPPER else "cpu"
PAGE, HEADS = 16, (4, 2, 64)
SPLIT = {"fixed_split_size": 8}  # 128 tokens, a block
WHOLE = {"disable_split_kv": True}
PREFIX = [*range(20)]  # pages: two splits and a half
TABLES = [[*PREFIX, 20, 21], [*PREFIX, 22], [*PREFIX[:17], 23], [24, 25, 26], [*range(27, 45)]]
LAST = [5, 16, 1, 9, 16]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_HOPPER:
        monkeypatch.setattr(paged, "kernels_on", kernels.OnCuda)


def tables(rows: list[int], device: str = "cpu") -> tuple[torch.Tensor, ...]:
    lens = [0, *np.cumsum([len(TABLES[row]) for row in rows]).tolist()]
    pages = [page for row in rows for page in TABLES[row]]
    return tuple(x.to(device) for x in (int32(lens), int32(pages), int32([LAST[row] for row in rows])))


def cache() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(45, 2, PAGE, HEADS[1], HEADS[2], generator=generator).half().to(DEVICE)


def queries() -> torch.Tensor:
    return torch.randn(len(TABLES), HEADS[0], HEADS[2], generator=torch.Generator().manual_seed(1)).half().to(DEVICE)


def run(rows: list[int], wrapper: Decode | None = None, **how) -> tuple[torch.Tensor, torch.Tensor]:
    wrapper = wrapper or Decode(torch.empty(0, device=DEVICE))
    wrapper.plan(*tables(rows), *HEADS, PAGE, q_data_type=torch.float16, **how)
    return wrapper.run(queries()[rows], cache(), return_lse=True)


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("how", [SPLIT, WHOLE], ids=str)
def test_a_request_has_its_bits_in_any_batch(how: dict) -> None:
    everyone = [*range(len(TABLES))]
    out, lse = run(everyone, **how)
    expected, expected_lse = run(everyone)
    torch.testing.assert_close(out, expected, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
    for rows in ([0], [3], [4, 0], [1, 2, 0, 1]):
        again, again_lse = run(rows, **how)
        if ON_HOPPER:
            assert torch.equal(again, out[rows]) and torch.equal(again_lse, lse[rows])
        else:
            torch.testing.assert_close(again, out[rows], rtol=2e-3, atol=2e-3)


@pytest.mark.usefixtures("on_cuda")
def test_where_kv_is_cut() -> None:
    wrapper = Decode(torch.empty(0, device=DEVICE))
    run([0, 1, 2], wrapper, **SPLIT)
    items = wrapper._planned().items
    assert not (items[:, Col.A_POS] % 128).any() and items[:, Col.A_LEN].max() == 128
    assert wrapper.kv_tokens.read == 2 * 128 + sum(wrapper._kv_lens.tolist()) - 3 * 2 * 128
    run([0, 1, 2], wrapper, **WHOLE)
    shared = 256 if ON_HOPPER else 0  # whole blocks, read once although no request's KV is split
    assert not wrapper._planned().merge_indptr.any()
    assert wrapper.kv_tokens.read == wrapper.kv_tokens.logical - 2 * shared
    run([0, 1, 2], wrapper, fixed_split_size=-1)  # as if it were not given
    assert not wrapper._unit_tokens


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize("pages", [1 << 20, 1 << 27, 1 << 40])
def test_a_split_may_be_longer_than_any_request(pages: int) -> None:
    out, lse = run([0, 1, 2], fixed_split_size=pages)
    whole, whole_lse = run([0, 1, 2], **WHOLE)
    assert torch.equal(out, whole) and torch.equal(lse, whole_lse)


@pytest.mark.usefixtures("on_cuda")
def test_what_is_not_supported() -> None:
    with pytest.raises(NotImplementedError, match="fixed_split_size of these pages .* units of 48 tokens are not of"):
        run([0], fixed_split_size=3)
    with pytest.raises(NotImplementedError, match="fixed_split_size and disable_split_kv .* a part of its request's"):
        run([0], **SPLIT, window_left=10)
    prefill = Prefill(torch.empty(0, device=DEVICE))
    with pytest.raises(NotImplementedError, match="fixed_split_size"):
        prefill.plan(int32([0, 1]), *tables([0]), *HEADS, PAGE, **SPLIT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize("how", [SPLIT, WHOLE], ids=str)
def test_a_cpu_refuses(how: dict) -> None:
    with pytest.raises(NotImplementedError, match="fixed_split_size and disable_split_kv are not supported on the CPU"):
        run([0], **how)


def test_splits_too_many_for_a_graph_are_refused_each_time() -> None:
    """What was refused settles no sizes."""
    names, sizes = ("indptr", "indices", "last_page_len"), (3, 1 << 20, 2)
    buffers = {name: torch.zeros(n, dtype=torch.int32) for name, n in zip(names, sizes, strict=True)}
    graph = GraphBuffers(torch.device("cpu"), buffers)
    some = (*(x.numpy() for x in tables([0, 1])), np.arange(3, dtype=np.int32))
    baked = {"num_qo_heads": 32, "head_dim": 128, "page_size": PAGE, "fixed_split_size": 8}
    for _ in range(2):
        with pytest.raises(ValueError, match="fixed_split_size=8 makes 131074 partial results: too many for a graph"):
            graph.check_batch(some, 45, baked)
    capacity = graph.check_batch(some, 45, {**baked, "fixed_split_size": 64})
    assert capacity.partials == capacity.slots == capacity.items == (1 << 20) // 64 + 2


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="for Hopper")
def test_a_graph_has_the_bits_of_an_eager_run() -> None:
    everyone = [*range(len(TABLES))]
    out, lse = run(everyone, **SPLIT)
    buffers = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (len(TABLES) + 1, 400, len(TABLES))]
    wrapper = Decode(torch.empty(0, device="cuda"), use_cuda_graph=True, paged_kv_indptr_buffer=buffers[0],
                     paged_kv_indices_buffer=buffers[1], paged_kv_last_page_len_buffer=buffers[2])  # fmt: skip
    q, kv = torch.empty_like(queries()), cache()
    got, got_lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")

    def plan(rows: list[int]) -> None:
        wrapper.plan(*tables(rows), *HEADS, PAGE, q_data_type=torch.float16, **SPLIT)
        q.copy_(queries()[rows])

    plan([4, 3, 2, 1, 0])
    wrapper.run(q, kv, out=got, lse=got_lse, return_lse=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, kv, out=got, lse=got_lse, return_lse=True)
    for rows in ([4, 3, 2, 1, 0], [0, 0, 1, 2, 4], everyone):
        plan(rows)
        graph.replay()
        assert torch.equal(got, out[rows]) and torch.equal(got_lse, lse[rows])
    with pytest.raises(ValueError, match="fixed_split_size=16, but CUDA graphs hold"):
        wrapper.plan(*tables(everyone), *HEADS, PAGE, q_data_type=torch.float16, fixed_split_size=16)
