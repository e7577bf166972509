"""What the checks of ``check_engine.py`` are made of: engines, what is asked of them, and the check itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

if TYPE_CHECKING:
    from check.judge import Judge

RECENT = Version(version("sglang")) >= Version("0.5.23")
FA3, TRITON = {"attention_backend": "fa3"}, {"attention_backend": "triton"}
OURS = {"attention_backend": "packinfer"}
EAGER = {"disable_cuda_graph": True}
CHECK = {"check": True}  # packinfer's setting
WRAP = {"wrap": True}
DUMMY = {"load_format": "dummy"}
EAGLE = {
    "speculative_algorithm": "EAGLE",
    "speculative_draft_model_path": "eagle",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 4,
    "speculative_num_draft_tokens": 8,
}
CHAIN = {**EAGLE, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
# SGLang's own all-reduce may use NVLink multicast, which not every host allows
TP2, TP4 = ({"tp_size": size, "disable_custom_all_reduce": True} for size in (2, 4))
DP2, DP4, PP2 = {"dp_size": 2}, {"dp_size": 4}, {"pp_size": 2}


@dataclass(frozen=True)
class Scenario:
    """One engine.

    Attributes:
        model: a kind of ``check/models.py``.
        engine: arguments of ``sglang.Engine``.
        config: the plugin's settings.
        rounds: names in ``check/rounds.py`` or in the ROUNDS of an area.
        logprobs: whether the likeliest tokens at each position are asked for.
        env: of the engine's processes.
    """

    model: str
    engine: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    rounds: tuple[str, ...] = ("tree", "tree")
    logprobs: bool = True
    gpus: int = 1
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """``judge`` turns what the ``scenarios`` said into rows.

    Attributes:
        feature: what is checked, in the words of docs/support.md.
        gpus: how many it needs; 0 where it runs on a CPU, too.
        since: the SGLang release that brought what is checked.
    """

    judge: Callable[[Judge], None]
    scenarios: tuple[str, ...]
    feature: str
    gpus: int = 1
    since: str = "0.5.17"
