"""The plugin's settings: one frozen record, read once per process."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

ENV = "PACKINFER_CONFIG"
FLAG_PREFIX = "--packinfer-"


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or lies outside its range."""


def _setting(default: Any, help: str, *, unit: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "unit": unit, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting with its unit, default and range; the flag of ``a_b`` is ``--packinfer-a-b``, its key ``a_b``."""

    base_backend: str = _setting(
        "auto",
        "stock attention backend beneath packinfer, which runs whatever is not packed; auto = fa3 on Hopper, "
        "flashinfer on other GPUs, torch_native on the CPU",
        unit="name registered with SGLang",
    )
    grouping: str = _setting(
        "multi",
        "which shared prefixes are read once: off = none, single = at most one per request, multi = every level",
        unit="mode",
        choices=("off", "single", "multi"),
    )
    extend: str = _setting(
        "auto",
        "which prefills, chunks and mixed batches are packed: auto = those that are expected to be faster (none on "
        "GPUs without measured times, nor with FP8 KV or soft-capped logits), on = all, off = none, nor verify steps "
        "of speculative decoding",
        unit="mode",
        choices=("auto", "on", "off"),
    )
    check: bool = _setting(
        False,
        "debugging: compare the KV slots that are read with SGLang's table and, outside of CUDA graphs, each layer "
        "with the stock backend; a mismatch stops the server",
        unit="true or false",
        choices=("true", "false"),
    )
    arena_tokens: int = _setting(
        0,
        "KV slots taken from SGLang's pool for contiguous copies of scattered shared prefixes; 0 = none",
        unit="tokens",
    )
    wrap: bool = _setting(
        False,
        "pack over the server's stock --attention-backend, for models for which SGLang checks the backend's name, and "
        "for frameworks that know stock names only",
        unit="true or false",
        choices=("true", "false"),
    )
    hold_siblings: bool = _setting(
        True,
        "hold requests that share a long uncached prefix while one of them computes it; false = as SGLang admits them; "
        "true stops the server where that cannot be, the default does without",
        unit="true or false",
        choices=("true", "false"),
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            wanted = type(f.default)
            if type(value) is not wanted:
                raise ConfigError(f"packinfer: {f.name} must be a {wanted.__name__}, not {value!r}")
            if wanted is str and choices and value not in choices:
                raise ConfigError(f"packinfer: {f.name} is {value!r}; allowed: {', '.join(choices)}")
        if self.arena_tokens < 0:
            raise ConfigError(f"packinfer: arena_tokens is {self.arena_tokens}; it must be 0 or more")
        if not self.base_backend or self.base_backend == "packinfer":
            raise ConfigError(
                f"packinfer: base_backend is {self.base_backend!r}; name a stock backend of SGLang, or auto"
            )
        if self.wrap and self.base_backend != "auto":
            raise ConfigError(
                "packinfer: wrap takes the server's --attention-backend; base_backend must be auto with it"
            )

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Parse the JSON object of ``PACKINFER_CONFIG``; raises ConfigError with one line on any mistake."""
        return cls(**cls._values(text))

    @classmethod
    def _values(cls, text: str) -> dict[str, Any]:
        try:
            values = json.loads(text or "{}")
        except json.JSONDecodeError as e:
            raise ConfigError(f"packinfer: {ENV} is not valid JSON ({e})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"packinfer: {ENV} must be a JSON object, not {text!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"packinfer: unknown setting {unknown[0]!r} in {ENV}; known: {', '.join(sorted(known))}")
        return values

    @classmethod
    def load(cls) -> Config:
        """The settings of this process, from the environment that the server's start-up prepared."""
        return cls.from_json(os.environ.get(ENV, ""))

    @classmethod
    def given(cls) -> dict[str, Any]:
        """Of the settings of this process, those that the user gave, be it as they are by default; raises ConfigError
        with one line for what is no JSON object of settings."""
        return cls._values(os.environ.get(ENV, ""))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def flag(name: str) -> str:
    """``base_backend`` -> ``--packinfer-base-backend``."""
    return FLAG_PREFIX + name.replace("_", "-")
