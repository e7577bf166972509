"""With the setting ``hold_siblings``, requests wait while another computes the prefix that they share with it.

Its hooks are put in place when a packinfer backend is built that wants them: nobody else's scheduler is changed.

A request is held where SGLang would admit it: it stays in the waiting queue, at its place, and SGLang goes on to the
next one. Nothing is taken out of any list, so that nothing can be lost.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from packinfer_sgl.patches.hook import Hook
from packinfer_sgl.planning.prefix_hold import MOST_HELD, Held, Prompt, Wait, wait

logger = logging.getLogger(__name__)

_WAIT = "_packinfer_wait"
# Settings of SGLang with which nobody has held requests yet, so that they are not held by default: other tiers of the
# cache may bring what is waited for by themselves, and data-parallel ranks go in step.
_LEFT_OUT = (
    "enable_hierarchical_cache", "enable_lmcache", "enable_flexkv", "enable_unified_cache_external_linker",
    "enable_hisparse", "dllm_algorithm",
)  # fmt: skip
# Likewise: they put off the prefill after another one, so that a wait of one pass would become one of many.
_PUT_OFF = ("min_free_slots_delay", "enable_prefill_delayer", "prefill_decode_interval")


class HoldError(RuntimeError):
    """The server cannot hold requests, and was told to."""


_held: Held | None = None  # what is counted; None: nothing is held in this process


def start(runner: Any, told: bool, deterministic: str | None) -> Held:
    """From now on the scheduler of this process holds requests, if that can be; called when a packinfer backend is
    built. Returns what will be counted, or why nothing will be.

    Args:
        told: the user gave the setting; by default requests are not held where nobody has tried it.
        deterministic: the flag of SGLang's deterministic mode, if it is on.

    Raises:
        HoldError: the user gave the setting, and it cannot be kept: with pipeline parallelism, where the result of a
            prefill comes several passes later, or if a hook did not take.
    """
    global _held
    if _held is not None:  # of another backend in this process
        return _held
    reason = _impossible(runner)
    if told and reason is not None:
        raise HoldError(f"packinfer: --packinfer-hold-siblings {reason}; leave one of them out")
    try:
        reason = reason or (None if told else _left_out(runner, deterministic)) or put_hooks()
    except Exception as e:  # a default must not end the server
        if told:
            raise
        logger.exception("packinfer: please report this with the SGLang version")
        reason = f"failed at the start ({e!r})"
    if reason is None:
        _held = Held()
        return _held
    if told:
        raise HoldError(f"packinfer: --packinfer-hold-siblings {reason}; leave it out")
    logger.info("packinfer: no requests are held for a shared prefix: --packinfer-hold-siblings %s", reason)
    return Held(reason=reason)


def _impossible(runner: Any) -> str | None:
    return "does not work with --pp-size" if runner.server_args.pp_size > 1 else None


def _left_out(runner: Any, deterministic: str | None) -> str | None:
    """Why requests are not held unless the user says so."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.runtime_context import get_schedule

    args, flags = runner.server_args, []
    if deterministic is not None:  # with fa3 a prompt that is found whole may get other bits than one that is computed
        flags.append(deterministic)
    if args.disaggregation_mode != "null":  # decode servers compute no prompts; prefill servers: not tried
        flags.append("--disaggregation-mode")
    if is_dp_attention_enabled():  # 0.5.23 names its size, 0.5.17 turns it on
        flags.append("DP attention")
    schedule = get_schedule()  # with what SGLang chooses itself: an interval for some models
    names = [name for name in _LEFT_OUT if getattr(args, name, None)]
    names += [name for name in _PUT_OFF if getattr(schedule, name, None)]
    flags += [f"--{name.replace('_', '-')}" for name in names]
    return f"is left out by default with {flags[0]}" if flags else None


def put_hooks() -> str | None:
    """Put this file's hooks in place. Why one is not, or None: they all are."""
    if not any(hook.missing() for hook in hooks()):  # else the registry would log a traceback
        for hook in hooks():
            if hook.problem() is not None:
                hook.register()
        HookRegistry.apply_hooks()
    problems = [f"cannot hook {hook.target} ({problem})" for hook in hooks() if (problem := hook.problem()) is not None]
    return problems[0] if problems else None


class Pass:
    """One pass of the scheduler over its waiting queue."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._held = self._held_rows = self._held_slots = 0
        self._computing: list[Prompt | None] = []
        last = scheduler.last_batch if scheduler.enable_overlap else None  # without overlap its result is in the tree
        self._last = last if last and last.forward_mode.is_extend() else None

    @functools.cached_property
    def _launched(self) -> list[Prompt | None]:  # most passes find nobody waiting
        if self._last is None:
            return []
        decoding = {id(req) for req in self._last.decoding_reqs or ()}  # in a mixed batch; their prompts are cached
        return [prompt_of(req) for req in self._last.reqs if id(req) not in decoding]

    def wait(self, adder: Any, req: Any) -> Wait | None:
        """How ``req`` waits, or None."""
        prompt = prompt_of(req)
        if prompt is None or adder.preempt_list:  # others have just given up their place for it
            return None
        self._computing += map(prompt_of, adder.can_run_list[len(self._computing) :])
        return wait(prompt, self._computing, self._launched, adder.page_size, getattr(req, _WAIT, None))

    def hold(self, adder: Any, req: Any) -> None:
        """``req`` waits in this pass."""
        self._held += 1
        self._held_rows += _rows(req)
        self._held_slots += _needs(req) + adder.page_size

    def is_full(self, adder: Any) -> bool:
        """Whether no more requests may be held in this pass, or are admitted after one that is."""
        from sglang.srt.managers.schedule_policy import AddReqResult

        return self._held == MOST_HELD or adder.budget_state() is not AddReqResult.CONTINUE

    def may_overtake(self, adder: Any, req: Any) -> bool:
        """Whether ``req`` leaves the held requests all that they need to be admitted in a later pass: places in the
        running batch, KV slots, and that pass (the rest of a prompt in chunks goes before everybody)."""
        if not self._held or adder.preempt_list:  # who was preempted for it is lost in 0.5.17 if nobody is admitted
            return True
        places = self.scheduler.get_num_allocatable_reqs(len(adder.running_batch.reqs))
        return (
            len(adder.can_run_list) + _rows(req) + self._held_rows <= places
            and (adder.rem_chunk_tokens is None or _uncached(req) <= adder.rem_chunk_tokens)
            # what it has in the tree can be evicted for others until it is admitted
            and self._held_slots + _cached(req) + _needs(req) + adder.page_size < adder.rem_total_tokens
        )

    def end(self, plan: Any) -> None:
        """SGLang may have found the batch full for a request behind a held one (of more beams, or for want of slots).
        Then it would look at nobody until a running request leaves."""
        if self._held:
            plan.running_batch.batch_is_full = False


def prompt_of(req: Any) -> Prompt | None:
    """The request as far as sharing goes; None if it may not share, or what it computes does not enter the tree."""
    if (
        req.session is not None
        or req.multimodal_inputs is not None
        or req.input_embeds is not None
        or req.positional_embed_overrides is not None
        or req.skip_radix_cache_insert
        or req.return_hidden_states is True  # of the tokens that are computed for it
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


def _rows(req: Any) -> int:
    """Places in the running batch."""
    beams = getattr(req, "beam_group", None)  # 0.5.17 has none
    return 1 if beams is None else beams.beam_width


def _needs(req: Any) -> int:
    """KV slots of the request, as SGLang counts them when it admits one."""
    from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

    new = max(0, req.sampling_params.max_new_tokens - len(req.output_ids))
    return _uncached(req) + min(new, CLIP_MAX_NEW_TOKENS)


_pass: Pass | None = None


def scope_pass(get_batch: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``Scheduler.get_new_batch_prefill``."""
    global _pass
    this = _pass = _begin(scheduler)
    try:
        plan = get_batch(scheduler, *args, **kwargs)
    finally:
        _pass = None
    if this is not None:
        try:
            this.end(plan)
        except Exception:  # it would end the server
            _log_once()
    return plan


def _begin(scheduler: Any) -> Pass | None:
    if _held is None:
        return None
    try:
        before, _held.reason = _held.reason, _useless(scheduler.tree_cache)
        if _held.reason is None:
            return Pass(scheduler)
        if before is None:
            logger.info("packinfer: no requests are held for a shared prefix: %s", _held.reason)
    except Exception:  # it would end the server: this pass is SGLang's own
        _log_once()
    return None


def _useless(tree: Any) -> str | None:
    """Why waiting for what enters this tree is of no use."""
    if getattr(tree, "disable", True):
        return "there is no radix cache"
    if tree.supports_mamba():  # and a request that was looked up holds a state
        return "of layers with a state the radix cache has a few positions only"
    return None


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
        if now is not None and not stays:
            _pass.hold(adder, req)
    except Exception:  # it would end the server: this pass goes on as SGLang's own
        _pass = None
        _log_once()
        return add(adder, req, *args, **kwargs)
    if stays:
        return AddReqResult.OTHER  # ends the pass
    if now is not None:
        setattr(req, _WAIT, now)
        _held.count_held(before, now)
        return AddReqResult.CONTINUE
    result = add(adder, req, *args, **kwargs)
    if before is not None and adder.can_run_list and adder.can_run_list[-1] is req:
        _held.count_found(before, cached)
        delattr(req, _WAIT)
    return result


def hooks() -> list[Hook]:
    """What is put in place where requests are held."""
    managers = "sglang.srt.managers"
    return [
        Hook(f"{managers}.scheduler.Scheduler.get_new_batch_prefill", scope_pass, HookType.AROUND),
        Hook(f"{managers}.schedule_policy.PrefillAdder.add_one_req", hold, HookType.AROUND),
    ]
