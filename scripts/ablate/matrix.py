"""The axes of ablate_radix.py, and which configurations of the engine it compares."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

Config = dict[str, str]  # a value for each axis
Chosen = dict[str, list[str]]  # for each axis the values to run, the first of them where another axis is looked at


@dataclass(frozen=True)
class Axis:
    """A setting of the engine.

    Attributes:
        values: value -> arguments of sglang.Engine, or with ``packinfer`` settings in PACKINFER_CONFIG; the usual one
            first.
        default: what is run unless the user asks for other values.
        off: the value that switches the thing off, for those that build on each other.
        gives: what reports call it, if not by its name.
        of_tree: whether it makes no difference without a radix cache.
        metric: the figure of report.TITLES that says whether it is worth its while.
        saves: what it saves at best: ``prompt`` tokens computed, ``kv`` tokens read, or nothing that is counted.
    """

    values: dict[str, dict[str, Any]]
    default: tuple[str, ...]
    packinfer: bool = False
    off: str | None = None
    gives: str = ""
    of_tree: bool = True
    metric: str = "output_tokens_per_s"
    saves: str = ""


# Axes with ``off`` build on each other in this order: each is switched on while those below it are still off.
AXES = {
    "radix": Axis({"on": {}, "off": {"disable_radix_cache": True}}, ("on", "off"),
                  off="off", gives="the radix cache", of_tree=False, saves="prompt"),
    "grouping": Axis({v: {"grouping": v} for v in ("multi", "single", "off")}, ("multi", "single", "off"),
                     packinfer=True, off="off", gives="grouping", metric="tpot_p50_ms", saves="kv"),
    "arena": Axis({"off": {}, **{str(n): {"arena_tokens": n} for n in (8192, 32768)}}, ("off",),
                  packinfer=True, off="off", gives="contiguity", metric="tpot_p50_ms"),
    "extend": Axis({"auto": {}, "off": {"extend": "off"}}, ("auto",), packinfer=True, gives="packed prefill",
                   metric="ttft_p50_ms"),
    "hold": Axis({"on": {}, "off": {"hold_siblings": False}}, ("on",), packinfer=True, gives="holding siblings",
                 metric="ttft_p50_ms", saves="prompt"),
    "page": Axis({v: {"page_size": int(v)} for v in ("1", "16", "64")}, ("1",), of_tree=False),
    "eviction": Axis({v: {"radix_eviction_policy": v} for v in ("lru", "lfu")}, ("lru",)),
    "schedule": Axis({v: {"schedule_policy": v} for v in ("fcfs", "lpm", "dfs-weight")}, ("fcfs",)),
}  # fmt: skip
LADDER = [name for name, axis in AXES.items() if axis.off]


@dataclass(frozen=True)
class Step:
    """One value of one axis is changed."""

    axis: str
    before: Config
    after: Config

    def title(self) -> str:
        return f"{AXES[self.axis].gives or self.axis}: {self.after[self.axis]} against {self.before[self.axis]}"


def usual() -> Config:
    return {name: next(iter(axis.values)) for name, axis in AXES.items()}


def settle(config: Config) -> Config:
    """The same engine, said in one way: without a radix cache there is nothing to group, evict or look up, and without
    groups nothing to copy."""
    if config["radix"] == "on":
        bare = config["grouping"] == AXES["grouping"].off
        return {**config, "arena": "off"} if bare else config
    return {name: (axis.off or usual()[name]) if axis.of_tree else config[name] for name, axis in AXES.items()}


def label(config: Config) -> str:
    """What is not usual about it."""
    if config["radix"] == "off":
        config = {**usual(), "radix": "off", "page": config["page"]}
    parts = [f"{name} {value}" for name, value in config.items() if value != usual()[name]]
    return ", ".join(parts) or "usual settings"


def engine_arguments(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of sglang.Engine, and settings of packinfer."""
    both: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in config.items():
        both[AXES[name].packinfer].update(AXES[name].values[value])
    return both


def steps(chosen: Chosen) -> list[Step]:
    """What is compared with what: one axis changes, the others have their first chosen value.

    Of the ladder those below have their first value that is not off, those above are off.
    """
    first = {name: values[0] for name, values in chosen.items()}
    on = {name: next((v for v in chosen[name] if v != AXES[name].off), chosen[name][0]) for name in LADDER}
    off = {name: AXES[name].off if AXES[name].off in chosen[name] else first[name] for name in LADDER}
    found = []
    for name, values in chosen.items():
        before, others = dict(first), values[1:]
        if name in LADDER:
            i = LADDER.index(name)
            before.update({a: on[a] if j < i else off[a] for j, a in enumerate(LADDER)})
            others = [v for v in values if v != before[name]]
        found += [Step(name, settle(before), settle({**before, name: value})) for value in others]
    return [step for step in found if step.before != step.after]


def select(chosen: Chosen, full: bool) -> list[Config]:
    """The configurations to run, each once: those of ``steps``, or with ``full`` the product of all values."""
    if full:
        found = [dict(zip(chosen, values)) for values in itertools.product(*chosen.values())]
    else:
        found = [{name: values[0] for name, values in chosen.items()}]
        found += [config for step in steps(chosen) for config in (step.before, step.after)]
    return [dict(items) for items in dict.fromkeys(tuple(settle(config).items()) for config in found)]
