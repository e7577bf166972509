"""Our constructors, ``plan`` and ``run`` take what the installed FlashInfer takes, in its order, with its defaults."""

from __future__ import annotations

import inspect
from inspect import Parameter
from types import ModuleType

import pytest

import packinfer_sgl

decode = pytest.importorskip("flashinfer.decode", reason="FlashInfer is not installed")
attention = pytest.importorskip("flashinfer.attention", reason="FlashInfer is not installed")
prefill = pytest.importorskip("flashinfer.prefill", reason="FlashInfer is not installed")

SINKS = "BatchAttentionWithAttentionSinkWrapper"
NAMES = ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper", SINKS]


def home(name: str) -> ModuleType:
    return attention if name == SINKS else decode if "Decode" in name else prefill


def flashinfer_parameters(name: str, method: str) -> list[Parameter]:
    module = home(name)
    wrapper = getattr(module, name)
    parameters = list(inspect.signature(getattr(wrapper, method)).parameters.values())
    if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return parameters
    # decode's plan(..., page_size, *deprecated_positional_args, **kwargs): names and defaults are in _plan_impl, and a
    # tuple says in which order they may still be given by position
    legacy = module._BATCH_DECODE_PLAN_LEGACY_POS_ARGS
    named = dict(inspect.signature(wrapper._plan_impl).parameters)
    positional = [named.pop(p.name) for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    positional += [named.pop(name).replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for name in legacy]
    return [*positional, *named.values()]


def faults(theirs: list[Parameter], ours: list[Parameter]) -> list[str]:
    found = []
    position = {p.name: i for i, p in enumerate(ours)}
    for i, parameter in enumerate(theirs):
        if parameter.name not in position:
            found.append(f"{parameter.name} is missing")
            continue
        own = ours[position[parameter.name]]
        if own.kind is not parameter.kind:
            found.append(f"{parameter.name} is {own.kind.description}, theirs {parameter.kind.description}")
        if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD and position[parameter.name] != i:
            found.append(f"{parameter.name} stands at {position[parameter.name]}, theirs at {i}")
        if own.default != parameter.default:
            found.append(f"{parameter.name} is {own.default!r} by default, theirs {parameter.default!r}")
    return found


@pytest.mark.contract
@pytest.mark.parametrize("method", ["__init__", "plan", "run", "begin_forward", "forward", "forward_return_lse"])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_flashinfer(name: str, method: str) -> None:
    ours = list(inspect.signature(getattr(getattr(packinfer_sgl, name), method)).parameters.values())
    assert faults(flashinfer_parameters(name, method), ours) == []


@pytest.mark.contract
@pytest.mark.parametrize("name", NAMES)
def test_other_members_are_those_of_flashinfer(name: str) -> None:
    ours = getattr(packinfer_sgl, name)
    theirs = getattr(home(name), name)
    # not offered: they size, name or load FlashInfer's own kernels
    left_out = {"workspace_size", "resolved_backend", "prewarm_paged_kv_stride_variant"}
    public = {member for member in dir(theirs) if not member.startswith("_")} - left_out
    assert public - set(dir(ours)) == set()


def test_a_wrong_signature_is_found() -> None:
    def theirs(a: int, b: int = 1, *args: int, c: int | None = None) -> None: ...
    def swapped(b: int = 1, a: int = 0, *args: int, c: int | None = None) -> None: ...
    def other_default(a: int, b: int = 2, *args: int, c: int | None = None) -> None: ...
    def missing(a: int, b: int = 1, *args: int) -> None: ...
    def more(a: int, b: int = 1, *args: int, c: int | None = None, d: int = 0) -> None: ...

    parameters = [
        list(inspect.signature(f).parameters.values()) for f in (theirs, more, swapped, other_default, missing)
    ]
    assert [len(faults(parameters[0], ours)) for ours in parameters] == [0, 0, 3, 1, 1]
