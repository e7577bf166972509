"""SGLang started as frameworks for reinforcement learning start it (``rollouts.py``); weights change between rollouts
and in the middle of them.

AReaL is not among them: its own launcher loads no plugins, and servers that it is given addresses of are started by
SGLang's command line, as in test_start.py.
"""

from __future__ import annotations

import pytest
from engines import POOL, SGLANG, Ran, run_engine
from lib.servers import free_port
from rollouts import PAUSE_AFTER, SAMPLES, TOKENS

pytestmark = pytest.mark.engine

SLEEPS = SGLANG == "0.5.17"  # 0.5.23 then waits for a GPU


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> str:
    from packinfer_sgl.tools.tiny_model import write_tiny_model

    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "other", seed=1))


def ids(ran: Ran, name: str) -> list[list[int]]:
    samples = [out["ids"] for out in ran.said[name]]
    assert [len(sample) for sample in samples] == [TOKENS] * SAMPLES
    return samples


def roll_out(framework: str, config: dict, model: str, other: str, **args: object) -> Ran:
    args = {"dtype": "float32", "log_level": "warning", "skip_server_warmup": True, **POOL, **args}
    scenario = {"model": model, "other": other, "sleeps": SLEEPS, "args": args}
    return run_engine(scenario, config, None, "rollouts.py", framework)


@pytest.mark.contract
def test_verl_asks_for_packinfer_before_it_is_registered(model, other_model):
    """With ``check`` each step's slots and each layer are compared with SGLang's, and each copy with what it was copied
    from: after a pause, in the middle of a change of weights, and after memory was released."""
    config = {"check": True, "arena_tokens": 1000}
    ran = roll_out("verl", config, model, other_model, attention_backend="packinfer")
    first = ids(ran, "first")
    assert [state["active"] for state in ran.states.values()] == [True] * (5 + SLEEPS)
    assert ran.state["base_backend"] == "torch_native" and 0 < ran.state["check_error"] < 1e-5
    for name in ran.states:  # the first token is a prefill's, and so is the first after a retraction
        assert ran.counted(name, "packed_steps") >= TOKENS - 2
    assert ran.state["kv_tokens_read"] < 0.3 * ran.state["kv_tokens_logical"]
    assert ran.state["arena"]["hits"] > 0
    for name, retracted in (("in_place", 0), ("retract", 1)):
        assert [out["retracted"] for out in ran.said[name]] == [retracted] * SAMPLES
    assert [sample[:PAUSE_AFTER] for sample in ids(ran, "in_place")] == [said[:PAUSE_AFTER] for said in first]
    assert all(sample != said for sample, said in zip(ids(ran, "in_place"), first)), "other weights, other tokens"
    assert ids(ran, "again") == first != ids(ran, "other")
    if SLEEPS:
        assert ids(ran, "slept") == first


@pytest.mark.parametrize("framework", [pytest.param("slime", marks=pytest.mark.contract), "miles"])
def test_a_parser_made_before_plugins_are_loaded(framework, model, other_model):
    """It refuses packinfer's name; with the setting ``wrap`` packinfer runs over the backend that was chosen."""
    ran = roll_out(framework, {"wrap": True, "check": True}, model, other_model, port=free_port())
    assert "argument --sglang-attention-backend: invalid choice: 'packinfer'" in ran.said["refusal"][0]
    assert ran.state["active"] and ran.state["base_backend"] == "torch_native"
    assert ran.state["packed_steps"] >= 3 * (TOKENS - 1) and 0 < ran.state["check_error"] < 1e-5
    assert ran.state["kv_tokens_read"] < 0.3 * ran.state["kv_tokens_logical"]
    assert ids(ran, "again") == ids(ran, "first") != ids(ran, "other")
