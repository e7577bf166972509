"""The arena: slots at the top of SGLang's KV pool that its allocator does not hand out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.patches.hook import Hook

# settings of SGLang with which a node of the radix tree may come to hold other KV, or no decode step is packed
_REFUSED = (
    "enable_hierarchical_cache", "enable_lmcache", "enable_flexkv", "enable_hisparse", "enable_unified_memory",
    "enable_unified_cache_external_linker", "speculative_algorithm",
)  # fmt: skip


class ArenaError(RuntimeError):
    """The server cannot have an arena."""


def carve(runner: Any, tokens: int) -> range:
    """Take ``tokens`` slots, in whole pages, from the top of the runner's KV pool; once, before SGLang's scheduler
    reads the pool's size.

    SGLang derives what it counts as free, used and leaked from the two numbers that are lowered here, and builds its
    free list from one of them whenever it empties the cache.

    Raises:
        ArenaError: SGLang is set up in a way that the arena does not support, or the pool is too small.
    """
    from sglang.srt.environ import envs
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

    allocator, args = runner.token_to_kv_pool_allocator, runner.server_args
    page = allocator.page_size
    tokens = tokens // page * page
    for name in _REFUSED:
        if getattr(args, name, None):
            raise _error(f"does not work with --{name.replace('_', '-')}")
    if getattr(args, "dcp_size", 1) > 1:
        raise _error("does not work with --dcp-size")
    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        raise _error("does not work with SGLANG_ENABLE_POST_CAPTURE_KV_SIZING, which sizes the KV pool later")
    if type(allocator) not in (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator):
        raise _error(f"does not work with SGLang's {type(allocator).__name__}")
    if getattr(runner, "packinfer_carved", False):
        raise _error("serves one attention backend, and this server builds several")
    if not page <= tokens <= runner.max_total_num_tokens // 2:
        raise _error(
            f"must be between one page ({page}) and half of the KV pool ({runner.max_total_num_tokens // 2} tokens)"
        )
    allocator.size -= tokens
    if type(allocator) is PagedTokenToKVPoolAllocator:  # on platform plugins 0.5.17 takes it for page size 1, too
        allocator.num_pages = allocator.size // page
    allocator.clear()
    runner.max_total_num_tokens -= tokens
    runner.packinfer_carved = True
    first = allocator.size // page * page + page  # page 0 takes the writes of padding
    return range(first, first + tokens)


def _error(why: str) -> ArenaError:
    return ArenaError(f"packinfer: --packinfer-arena-tokens {why}; change it, or leave the arena out (0)")


_called: list[weakref.WeakMethod[Callable[[], object]]] = []  # in this process


def when_flushed(call: Callable[[], object]) -> None:
    """From now on ``call``, a method, is called whenever SGLang's cache was flushed, while its object lives: there may
    be several backends in a process."""
    _called[:] = [*(method for method in _called if method() is not None), weakref.WeakMethod(call)]


def drop_copies(flushed: bool, *args: Any, **kwargs: Any) -> None:
    """After ``Scheduler.flush_cache``, also when weights were updated: no node of the tree is left."""
    for method in _called if flushed else []:
        if (call := method()) is not None:
            call()


def hooks() -> list[Hook]:
    return [Hook("sglang.srt.managers.scheduler.Scheduler.flush_cache", drop_copies, HookType.AFTER)]
