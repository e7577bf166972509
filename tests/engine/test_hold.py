"""Requests held while another computes their prefix: a pass of SGLang's scheduler, without an engine.

Whom to hold is decided in packinfer_sgl/planning/prefix_hold.py (tests/unit/test_siblings.py); engines that hold
requests are in test_exactness.py and test_settings.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from types import SimpleNamespace

import pytest


def request(tokens: int = 1000, **more: object):
    """SGLang's own request, as its scheduler has looked it up: nothing of it is cached."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    params = SamplingParams(max_new_tokens=16)
    found = Req("id", "", array("q", range(tokens)), params, vocab_size=tokens, **more)
    found.init_next_round_input()
    return found


@pytest.mark.contract
def test_which_requests_may_share():
    from packinfer_sgl.patches.hold import prompt_of

    plain = prompt_of(request())
    assert len(plain.tokens) == 1000 and plain.usable_tokens == 999 and plain.cached_tokens == 0
    assert prompt_of(request()).tree == plain.tree
    assert prompt_of(request(extra_key="a")).tree != plain.tree
    assert prompt_of(request(lora_id="a")).tree not in (plain.tree, prompt_of(request(extra_key="a")).tree)
    with_logprobs = request(return_logprob=True)
    with_logprobs.logprob_start_len = 5
    assert prompt_of(with_logprobs).usable_tokens == 5
    assert prompt_of(request(input_embeds=[[0.0]])) is None
    assert prompt_of(request(return_hidden_states=True)) is None  # it would get fewer of them
    assert prompt_of(request(return_hidden_states="last")) is not None
    for name in ("session", "multimodal_inputs", "positional_embed_overrides", "skip_radix_cache_insert"):
        other = request()
        assert hasattr(other, name)
        setattr(other, name, SimpleNamespace())
        assert prompt_of(other) is None


class Adder(SimpleNamespace):
    """What the hook reads of SGLang's PrefillAdder, whose making needs a server."""

    def budget_state(self):
        return self.budget


@pytest.fixture
def one_pass():
    """A pass of a scheduler with 8 places, and what its adder answers for a request."""
    from sglang.srt.managers.schedule_policy import AddReqResult
    from sglang.srt.managers.scheduler import NextBatchPlan

    from packinfer_sgl.patches import hold
    from packinfer_sgl.planning.prefix_hold import Held

    adder = Adder(
        can_run_list=[], preempt_list=[], page_size=1, rem_chunk_tokens=4000, rem_total_tokens=20000,
        running_batch=SimpleNamespace(reqs=[], batch_is_full=False), budget=AddReqResult.CONTINUE,
    )  # fmt: skip
    tree = SimpleNamespace(disable=False, supports_mamba=lambda: False)
    scheduler = SimpleNamespace(
        last_batch=None, enable_overlap=True, tree_cache=tree, get_num_allocatable_reqs=lambda running: 8 - running
    )

    def add(adder, req):
        adder.can_run_list.append(req)
        return AddReqResult.CONTINUE

    def admitted(requests) -> list[bool]:
        """Which of them SGLang would run, stopping where the hook says so."""

        def loop(scheduler):
            for req in requests:
                if hold.hold(add, adder, req) is not AddReqResult.CONTINUE:
                    break
            return NextBatchPlan(batch_to_run=None, running_batch=adder.running_batch)

        hold.scope_pass(loop, scheduler)
        return [any(req is other for other in adder.can_run_list) for req in requests]

    admitted.adder, admitted.scheduler, admitted.stop = adder, scheduler, AddReqResult.OTHER
    admitted.held = lambda: hold._held
    hold._held = Held()
    yield admitted
    hold._held = None


def unrelated(tokens: int = 1001):
    return request(tokens, extra_key="other")


@pytest.mark.contract
def test_the_pass_goes_on_behind_a_held_request(one_pass):
    assert one_pass([request(), request(), unrelated(), request()]) == [True, False, True, False]


@pytest.mark.contract
def test_a_pass_holds_so_many_and_ends(one_pass):
    from packinfer_sgl.planning.prefix_hold import MOST_HELD

    one_pass.scheduler.get_num_allocatable_reqs = lambda running: 1000
    one_pass.adder.rem_total_tokens = 10**7
    few = [request() for _ in range(MOST_HELD + 1)]
    assert one_pass([*few, unrelated(1002)])[-1]
    one_pass.adder.can_run_list.clear()
    assert not one_pass([*few, request(), unrelated(1002)])[-1]
    assert one_pass.held().requests == MOST_HELD
    assert one_pass.held().passes == 2 * MOST_HELD


@pytest.mark.contract
@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("rem_total_tokens", 1016 * 2 + 1),
        ("rem_chunk_tokens", 1000),
        ("running_batch", SimpleNamespace(reqs=[None] * 6)),
        ("budget", "spent"),
    ],
)
def test_nobody_takes_what_a_held_request_needs(what, value, one_pass):
    """KV slots, the next pass (as the rest of a chunked prompt would), a place; and a spent pass is no reason to go on
    looking."""
    setattr(one_pass.adder, what, value)
    assert one_pass([request(), request(), unrelated()]) == [True, False, False]


@pytest.mark.contract
def test_who_is_admitted_keeps_what_could_be_evicted(one_pass):
    """900 of the tokens that are left are its own prefix in the tree, which nobody gets any more once it runs."""
    other = unrelated()
    if hasattr(other, "prefix_len"):
        other.prefix_len = 900
    else:  # 0.5.17
        other.prefix_indices = [0] * 900
    for left, passes in ((1017 + 1018, False), (1017 + 1019, True)):
        one_pass.adder.can_run_list, one_pass.adder.rem_total_tokens = [], left
        assert one_pass([request(), request(), other]) == [True, False, passes]


@pytest.mark.contract
@pytest.mark.parametrize("others", [[], [request]])
def test_a_batch_that_was_full_for_another_is_not_full_for_a_held_request(others, one_pass):
    """As when SGLang has no KV slots for one behind it, whose own cached prefix is all that could be evicted."""
    one_pass.adder.running_batch.batch_is_full = True  # what SGLang sets when it ends such a pass
    one_pass([request(), *(make() for make in others), unrelated()])
    assert one_pass.adder.running_batch.batch_is_full is not bool(others)


@pytest.mark.contract
def test_beams_need_a_place_each(one_pass):
    """Of 8 places one is the leader's; the held request wants 6 or 7, and the one behind it one."""
    for width, passes in ((6, True), (7, False)):
        one_pass.adder.can_run_list = []
        waiting = request()
        waiting.beam_group = SimpleNamespace(beam_width=width)
        assert one_pass([request(), waiting, unrelated()]) == [True, False, passes]


@pytest.mark.contract
def test_one_for_whom_others_were_preempted_is_admitted(one_pass):
    """SGLang 0.5.17 forgets those who were preempted in a pass that admits nobody; they were never answered."""
    one_pass.adder.can_run_list = []
    one_pass.adder.rem_total_tokens = 1
    urgent = unrelated()

    def preempts(scheduler):
        from packinfer_sgl.patches import hold

        hold._pass.hold(one_pass.adder, request())
        one_pass.adder.preempt_list.append(request())
        hold.hold(lambda adder, req: adder.can_run_list.append(req), one_pass.adder, urgent)
        return SimpleNamespace(running_batch=one_pass.adder.running_batch)

    from packinfer_sgl.patches import hold

    hold.scope_pass(preempts, one_pass.scheduler)
    assert one_pass.adder.can_run_list == [urgent]


@pytest.mark.contract
def test_nobody_is_held_for_nothing(one_pass, caplog):
    """Without a radix cache, with Mamba layers, after others were preempted for it, or with the setting off."""
    caplog.set_level("INFO")
    from packinfer_sgl.patches import hold

    def both() -> list[bool]:
        one_pass.adder.can_run_list.clear()
        return one_pass([request(), request()])

    assert both() == [True, False]
    for where, name, value in (
        (one_pass.scheduler.tree_cache, "disable", True),
        (one_pass.scheduler.tree_cache, "supports_mamba", lambda: True),
        (one_pass.adder, "preempt_list", [request()]),
        (hold, "_held", None),
    ):
        before = getattr(where, name)
        setattr(where, name, value)
        assert both() == both() == [True, True], name
        if where is one_pass.scheduler.tree_cache:  # says so, once
            said = "requests are held for a shared prefix: " + one_pass.held().reason
            assert caplog.text.count(said) == 1
        setattr(where, name, before)
        assert both() == [True, False] and one_pass.held().reason is None


@pytest.mark.contract
def test_what_the_running_pass_computes_is_waited_for_once(one_pass):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    waiting, batch = request(), SimpleNamespace(reqs=[request()], forward_mode=ForwardMode.EXTEND, decoding_reqs=None)
    for mode, overlap, decoding in (
        (ForwardMode.DECODE, True, None),
        (ForwardMode.EXTEND, False, None),
        (ForwardMode.MIXED, True, [*batch.reqs]),  # its prompt has long been there
    ):
        one_pass.scheduler.last_batch = SimpleNamespace(reqs=batch.reqs, forward_mode=mode, decoding_reqs=decoding)
        one_pass.scheduler.enable_overlap = overlap
        assert one_pass([request()]) == [True]
        one_pass.adder.can_run_list.clear()
    one_pass.scheduler.last_batch, one_pass.scheduler.enable_overlap = batch, True
    assert one_pass([waiting]) == [False]
    assert one_pass([waiting]) == [True], "the prefix never came: it is not waited for again"


@pytest.mark.contract
def test_a_failing_pass_leaves_nothing_behind(one_pass):
    from packinfer_sgl.patches import hold

    def fails(scheduler):
        raise ValueError("in SGLang")

    with pytest.raises(ValueError, match="in SGLang"):
        hold.scope_pass(fails, one_pass.scheduler)
    assert hold._pass is None


@pytest.mark.contract
def test_a_pass_that_cannot_decide_goes_on_as_sglangs_own(one_pass, monkeypatch, caplog):
    from packinfer_sgl.patches import hold

    hold._log_once.cache_clear()
    requests = [request() for _ in range(4)]
    for method in ("__init__", "wait", "may_overtake"):
        one_pass.adder.can_run_list = []
        with monkeypatch.context() as patch:
            patch.setattr(hold.Pass, method, lambda *_: 1 / 0)
            assert one_pass(requests) == ([True] * 4)
    one_pass.adder.can_run_list = []
    with monkeypatch.context() as patch:  # of a release that asks trees otherwise
        patch.delattr(one_pass.scheduler.tree_cache, "supports_mamba")
        assert one_pass(requests) == ([True] * 4)
    assert caplog.text.count("requests could not be held back") == 1
    one_pass.adder.can_run_list = []
    assert one_pass(requests) == [True, False, False, False]


def runner(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(server_args=SimpleNamespace(**{"pp_size": 1, "disaggregation_mode": "null", **settings}))


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is held in this process, nor hooked; what SGLang says of DP attention and its schedule."""
    from sglang.srt import runtime_context
    from sglang.srt.layers import dp_attention
    from sglang.srt.plugins.hook_registry import HookRegistry

    from packinfer_sgl.patches import hold

    monkeypatch.setattr(hold, "_held", None)
    monkeypatch.setattr(dp_attention, "is_dp_attention_enabled", lambda: False)
    monkeypatch.setattr(runtime_context, "get_schedule", SimpleNamespace)
    monkeypatch.setattr(HookRegistry, "_hooks", {**HookRegistry._hooks})
    monkeypatch.setattr(HookRegistry, "_patched", {*HookRegistry._patched})
    return hold


@pytest.mark.contract
@pytest.mark.parametrize(
    ("settings", "deterministic", "dp", "says"),
    [
        ({"pp_size": 2}, None, False, "does not work with --pp-size"),
        ({}, "--enable-deterministic-inference", False, "by default with --enable-deterministic-inference"),
        ({"disaggregation_mode": "prefill"}, None, False, "by default with --disaggregation-mode"),
        ({"disaggregation_mode": "decode"}, None, False, "by default with --disaggregation-mode"),
        ({}, None, True, "by default with DP attention"),
        ({"enable_hierarchical_cache": True}, None, False, "by default with --enable-hierarchical-cache"),
    ],
)
def test_where_nobody_is_held_by_default(settings, deterministic, dp, says, fresh, monkeypatch, caplog):
    """Such a server starts, and says so once; told to hold it does, but for what cannot be."""
    from sglang.srt.layers import dp_attention

    caplog.set_level("INFO")
    monkeypatch.setattr(dp_attention, "is_dp_attention_enabled", lambda: dp)
    monkeypatch.setattr(fresh, "put_hooks", lambda: pytest.fail("hooked for nothing"))
    held = fresh.start(runner(**settings), False, deterministic)
    assert says in held.reason and held.as_dict()["requests"] == 0 and fresh._held is None
    assert caplog.text.count(says) == 1
    monkeypatch.setattr(fresh, "put_hooks", lambda: None)
    if "pp_size" in settings:
        with pytest.raises(fresh.HoldError, match=f"--packinfer-hold-siblings {says}; leave one of them out"):
            fresh.start(runner(**settings), True, deterministic)
    else:
        assert fresh.start(runner(**settings), True, deterministic).reason is None and fresh._held is not None


@pytest.mark.contract
@pytest.mark.parametrize("name", ["min_free_slots_delay", "enable_prefill_delayer", "prefill_decode_interval"])
def test_nobody_is_held_by_default_where_the_next_prefill_is_put_off(name, fresh, monkeypatch):
    from sglang.srt import runtime_context
    from sglang.srt.server_args import ServerArgs

    if name != "prefill_decode_interval":  # 0.5.17 has none
        assert hasattr(ServerArgs, name)
    monkeypatch.setattr(runtime_context, "get_schedule", lambda: SimpleNamespace(**{name: 8}))
    monkeypatch.setattr(fresh, "put_hooks", lambda: None)
    assert f"by default with --{name.replace('_', '-')}" in fresh.start(runner(), False, None).reason
    assert fresh.start(runner(), True, None).reason is None


@pytest.mark.contract
def test_a_seam_that_is_not_there(fresh, monkeypatch, caplog):
    """As in a release that was not tested."""
    from sglang.srt.plugins.hook_registry import HookType

    from packinfer_sgl.patches.hook import Hook

    missing = Hook("sglang.srt.managers.scheduler.Scheduler.nowhere", fresh.hold, HookType.AROUND)
    monkeypatch.setattr(fresh, "hooks", lambda: [missing])
    held = fresh.start(runner(), False, None)
    assert "cannot hook sglang.srt.managers.scheduler.Scheduler.nowhere" in held.reason and fresh._held is None
    assert "Traceback" not in caplog.text
    with pytest.raises(fresh.HoldError, match=r"cannot hook .*nowhere .*; leave it out"):
        fresh.start(runner(), True, None)


@pytest.mark.contract
def test_a_start_that_fails_leaves_sglangs_scheduler(fresh, monkeypatch, caplog):
    monkeypatch.setattr(fresh, "put_hooks", lambda: 1 / 0)
    assert "ZeroDivisionError" in fresh.start(runner(), False, None).reason and fresh._held is None
    assert "please report this" in caplog.text
    with pytest.raises(ZeroDivisionError):
        fresh.start(runner(), True, None)


@pytest.mark.contract
def test_the_scheduler_is_changed_where_requests_are_held_and_nowhere_else():
    """The plugin in a process of its own, as SGLang loads it, with a setting that no backend has read yet."""
    code = """
from types import SimpleNamespace
from sglang.srt import runtime_context
from sglang.srt.layers import dp_attention
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins import load_plugins
of = lambda: (Scheduler.get_new_batch_prefill, PrefillAdder.add_one_req)
before = of()
load_plugins()
from packinfer_sgl.patches import hold
dp_attention.is_dp_attention_enabled = lambda: False
runtime_context.get_schedule = SimpleNamespace
args = SimpleNamespace(pp_size=2, disaggregation_mode="null")
runner = SimpleNamespace(server_args=args)
assert hold.start(runner, False, None).reason and of() == before, "hooked by an installed plugin"
args.pp_size = 1
held = hold.start(runner, False, None)
assert held.reason is None and hold.start(runner, False, None) is held
first = of()
assert not {*first} & {*before} and [hook.problem() for hook in hold.hooks()] == [None, None]
assert hold.put_hooks() is None and of() == first, "hooked twice"
print("done")
"""
    env = {**os.environ, "PACKINFER_CONFIG": '{"hold_siblings": true}'}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert ran.stdout.endswith("done\n"), ran.stderr[-2000:]
