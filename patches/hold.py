"""With the setting ``hold_siblings``, requests wait while another computes the prefix that they share with it.

A request is held where SGLang would admit it: it stays in the waiting queue, at its place, and SGLang goes on to the
next one. Nothing is taken out of any list, so that nothing can be lost.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.config import Config, ConfigError
from packinfer_sgl.patches.hook import Hook
from packinfer_sgl.planning.prefix_hold import MOST_HELD, Held, Prompt, Wait, wait

logger = logging.getLogger(__name__)

_WAIT = "_packinfer_wait"


class HoldError(RuntimeError):
    """The server cannot hold requests."""


_held: Held | None = None  # what is counted; None: nothing is held in this process


def start(runner: Any) -> Held:
    """From now on the scheduler of this process holds requests; called when a packinfer backend is built. Returns what
    will be counted.

    Raises:
        HoldError: with pipeline parallelism, where the result of a prefill comes several passes later.
    """
    if runner.server_args.pp_size > 1:
        raise HoldError("packinfer: --packinfer-hold-siblings does not work with --pp-size; leave one of them out")
    global _held
    if _held is None:
        _held = Held()
    return _held


class Pass:
    """One pass of the scheduler over its waiting queue."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.held: list[Any] = []
        self._computing: list[Prompt | None] = []
        last = scheduler.last_batch if scheduler.enable_overlap else None  # without overlap its result is in the tree
        launched = last.reqs if last and last.forward_mode.is_extend() else []
        self._launched = [prompt_of(req) for req in launched]

    def wait(self, adder: Any, req: Any) -> Wait | None:
        """How ``req`` waits, or None."""
        prompt = prompt_of(req)
        if prompt is None or adder.preempt_list:  # others have just given up their place for it
            return None
        self._computing += map(prompt_of, adder.can_run_list[len(self._computing) :])
        return wait(prompt, self._computing, self._launched, adder.page_size, getattr(req, _WAIT, None))

    def is_full(self, adder: Any) -> bool:
        """Whether no more requests may be held in this pass, or are admitted after one that is."""
        from sglang.srt.managers.schedule_policy import AddReqResult

        return len(self.held) == MOST_HELD or adder.budget_state() is not AddReqResult.CONTINUE

    def may_overtake(self, adder: Any, req: Any) -> bool:
        """Whether ``req`` leaves the held requests all that they need to be admitted in a later pass: a place in the
        running batch, KV slots, and that pass (the rest of a prompt in chunks goes before everybody)."""
        if not self.held or adder.preempt_list:  # who was preempted for it is lost in 0.5.17 if nobody is admitted
            return True
        places = self.scheduler.get_num_allocatable_reqs(len(adder.running_batch.reqs))
        return (
            len(adder.can_run_list) + len(self.held) < places
            and (adder.rem_chunk_tokens is None or _uncached(req) <= adder.rem_chunk_tokens)
            and sum(_needs(r) + adder.page_size for r in (*self.held, req)) < adder.rem_total_tokens
        )


def prompt_of(req: Any) -> Prompt | None:
    """The request as far as sharing goes; None if it may not share, or what it computes does not enter the tree."""
    if (
        req.session is not None
        or req.multimodal_inputs is not None
        or req.input_embeds is not None
        or req.positional_embed_overrides is not None
        or req.skip_radix_cache_insert
    ):
        return None
    tokens = req.full_untruncated_fill_ids
    usable = len(tokens) - 1  # the last token's output is needed, and the outputs of those with log-probabilities
    if req.return_logprob and req.logprob_start_len >= 0:
        usable = min(usable, req.logprob_start_len)
    tree = (req.extra_key, req.lora_id, getattr(req, "cache_salt", None))  # 0.5.17 has the salt in the extra key
    return Prompt(req, tokens, tree, _cached(req), usable)


def _cached(req: Any) -> int:
    device = req.prefix_len if hasattr(req, "prefix_len") else len(req.prefix_indices)  # 0.5.23 or 0.5.17
    return device + req.host_hit_length


def _uncached(req: Any) -> int:
    return len(req.full_untruncated_fill_ids) - _cached(req)


def _needs(req: Any) -> int:
    """KV slots of the request, as SGLang counts them when it admits one."""
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    new = max(0, req.sampling_params.max_new_tokens - len(req.output_ids))
    return _uncached(req) + min(new, CLIP_MAX_NEW_TOKENS)


_pass: Pass | None = None


def scope_pass(get_batch: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``Scheduler.get_new_batch_prefill``.

    Without a radix cache there is nothing to wait for. With Mamba layers it has states at a few positions only, and a
    request that was looked up in it holds one.
    """
    global _pass
    tree = scheduler.tree_cache
    if _held is None or getattr(tree, "disable", True) or tree.supports_mamba():
        return get_batch(scheduler, *args, **kwargs)
    try:
        _pass = Pass(scheduler)
    except Exception:  # it would end the server: this pass is SGLang's own
        _log_once()
    try:
        return get_batch(scheduler, *args, **kwargs)
    finally:
        _pass = None


@functools.cache
def _log_once() -> None:
    logger.exception("packinfer: requests could not be held back; please report this with the SGLang version")


def hold(add: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``PrefillAdder.add_one_req``, which SGLang calls for one waiting request after the other: in the order of
    its schedule policy, each just looked up in the radix tree."""
    global _pass
    if _pass is None or _held is None:
        return add(adder, req, *args, **kwargs)
    from sglang.srt.managers.schedule_policy import AddReqResult

    before: Wait | None = getattr(req, _WAIT, None)
    try:
        now = _pass.wait(adder, req)
        stays = not _pass.may_overtake(adder, req) if now is None else _pass.is_full(adder)
        cached = _cached(req)  # afterwards without what host memory had of it
    except Exception:  # it would end the server: this pass goes on as SGLang's own
        _pass = None
        _log_once()
        return add(adder, req, *args, **kwargs)
    if stays:
        return AddReqResult.OTHER  # ends the pass
    if now is not None:
        _pass.held.append(req)
        setattr(req, _WAIT, now)
        _held.count_held(before, now)
        return AddReqResult.CONTINUE
    result = add(adder, req, *args, **kwargs)
    if before is not None and adder.can_run_list and adder.can_run_list[-1] is req:
        _held.count_found(before, cached)
        delattr(req, _WAIT)
    return result


def hooks() -> list[Hook]:
    """Those who leave the setting off keep SGLang's own scheduler."""
    try:
        wanted = Config.load().hold_siblings
    except ConfigError:  # said where the settings are used
        wanted = False
    managers = "sglang.srt.managers"
    return [
        Hook(f"{managers}.scheduler.Scheduler.get_new_batch_prefill", scope_pass, HookType.AROUND),
        Hook(f"{managers}.schedule_policy.PrefillAdder.add_one_req", hold, HookType.AROUND),
    ] if wanted else []  # fmt: skip
