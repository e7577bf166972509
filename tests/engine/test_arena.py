"""What the arena takes of SGLang's allocator and radix tree, without an engine (engines: test_settings.py)."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import pytest
import torch
from engines import SGLANG


def runner(size: int = 1000, page_size: int = 1, paged: bool = False, **args: object) -> SimpleNamespace:
    """What ``carve`` reads of a ModelRunner, with SGLang's own allocator."""
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

    more = {"page_size": page_size} if paged else {}
    allocator = (PagedTokenToKVPoolAllocator if paged else TokenToKVPoolAllocator)(
        size, dtype=torch.int64, device="cpu", kvcache=None, need_sort=False, **more
    )
    return SimpleNamespace(
        token_to_kv_pool_allocator=allocator, max_total_num_tokens=size, server_args=SimpleNamespace(**args)
    )


@pytest.mark.contract
@pytest.mark.parametrize(
    ("paged", "page_size", "asked", "got"),
    [(False, 1, 300, 300), (True, 1, 300, 300), (True, 16, 310, 304), (True, 64, 64, 64)],
)
def test_carved_slots_are_never_handed_out(paged, page_size, asked, got):
    from packinfer_sgl.patches.arena import carve

    size = 1000 // page_size * page_size
    server = runner(size, page_size, paged)
    slots = carve(server, asked)
    assert len(slots) == got and slots.stop == size + page_size, "the buffers have page_size rows more than slots"
    allocator = server.token_to_kv_pool_allocator
    for _ in range(2):
        assert allocator.available_size() == server.max_total_num_tokens == size - got
        pages = allocator.free_pages
        handed_out = (pages[:, None] * page_size + torch.arange(page_size)).view(-1)
        assert int(handed_out.min()) == page_size and int(handed_out.max()) == slots.start - 1
        allocator.clear()  # as when the cache is flushed


@pytest.mark.contract
@pytest.mark.parametrize(
    ("asked", "args", "line"),
    [
        (501, {}, "must be between one page (1) and half of the KV pool (500 tokens)"),
        (1, {"enable_hierarchical_cache": True}, "does not work with --enable-hierarchical-cache"),
        (1, {"enable_lmcache": True}, "does not work with --enable-lmcache"),
        (1, {"enable_unified_memory": True}, "does not work with --enable-unified-memory"),
        (1, {"dcp_size": 2}, "does not work with --dcp-size"),
        (1, {"speculative_algorithm": "EAGLE"}, "does not work with --speculative-algorithm"),
    ],
)
def test_an_arena_that_cannot_be_is_refused(asked, args, line):
    from packinfer_sgl.patches.arena import ArenaError, carve

    server = runner(**args)
    with pytest.raises(ArenaError) as error:
        carve(server, asked)
    assert str(error.value).startswith("packinfer: --packinfer-arena-tokens ") and line in str(error.value)
    assert server.max_total_num_tokens == server.token_to_kv_pool_allocator.size == 1000


@pytest.mark.contract
def test_other_reasons_to_refuse(monkeypatch):
    from packinfer_sgl.patches.arena import ArenaError, carve

    server = runner()
    carve(server, 100)
    with pytest.raises(ArenaError, match="serves one attention backend, and this server builds several"):
        carve(server, 100)
    server = runner(64, 64, paged=True)
    with pytest.raises(ArenaError, match="one page"):
        carve(server, 63)
    server = runner()
    server.token_to_kv_pool_allocator.__class__ = type("OtherAllocator", (type(server.token_to_kv_pool_allocator),), {})
    with pytest.raises(ArenaError, match="does not work with SGLang's OtherAllocator"):
        carve(server, 100)
    monkeypatch.setenv("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "1")
    with pytest.raises(ArenaError, match="SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"):
        carve(runner(), 100)


@pytest.mark.contract
@pytest.mark.parametrize("core", ["default"] if SGLANG == "0.5.17" else ["default", "python"])
def test_a_node_keeps_its_tokens_and_slots(core, monkeypatch):
    """What makes a copy right: as long as SGLang's tree has a node, the slots up to its end stay the same, and no other
    node ever gets its id, whatever is inserted, split, evicted or flushed."""
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    if core != "default":
        monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", core)
    from bench.bench_plan import radix_cache

    from packinfer_sgl.serving.radix_paths import RadixPaths

    cache, _ = radix_cache()
    rng = random.Random(0)
    slots = iter(range(1 << 40))
    seen: dict[int, tuple[list[int], list[int]]] = {}
    known: list[list[int]] = []
    for _ in range(600):
        event = rng.random()
        if event < 0.5 or not known:
            start = rng.choice(known)[: rng.randint(0, 30)] if known else []
            known.append(start + [rng.randint(1, 3) for _ in range(rng.randint(1, 12))])
            value = torch.tensor([next(slots) for _ in known[-1]])
            cache.insert(InsertParams(key=RadixKey(array("q", known[-1])), value=value))
        elif event < 0.6:
            cache.evict(EvictParams(num_tokens=rng.randint(1, 40)))
        elif event < 0.61:
            cache.reset()
        for tokens in rng.sample(known, min(len(known), 8)):
            match = cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens))))
            indices = getattr(match, "device_indices", None)  # 0.5.17
            if indices is None:
                indices = cache.path_device_indices(match.last_device_node)
            held = indices.tolist()
            paths = RadixPaths(cache)
            (lowest,) = paths.lowest([match.last_device_node])
            ids, ends = paths.path(lowest, len(tokens))
            for node, end in zip(ids, ends, strict=True):
                assert seen.setdefault(node, (tokens[:end], held[:end])) == (tokens[:end], held[:end])
    assert len(seen) > 300
