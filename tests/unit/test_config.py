"""Every mistake in the settings is one line that names the setting and says what is allowed."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packinfer_sgl import config
from packinfer_sgl.config import Config, ConfigError, flag

DEFAULTS = {
    "base_backend": "auto", "grouping": "multi", "extend": "auto", "check": False, "arena_tokens": 0, "wrap": False,
    "hold_siblings": True,
}  # fmt: skip


def message(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        Config.from_json(text)
    (line,) = str(error.value).splitlines()
    assert line.startswith("packinfer: ")
    return line


def test_defaults() -> None:
    assert dataclasses.asdict(Config()) == DEFAULTS
    assert Config.from_json("") == Config.from_json("{}") == Config()


def test_every_setting_is_described() -> None:
    for f in dataclasses.fields(Config):
        assert f.metadata["help"] and f.metadata["unit"] and "choices" in f.metadata


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"grouping": "all"}', ["grouping", "'all'", "off, single, multi"]),
        ('{"grouping": "Multi"}', ["grouping", "off, single, multi"]),
        ('{"grouping": ""}', ["grouping", "off, single, multi"]),
        ('{"grouping": "single\\nmulti"}', ["grouping", "off, single, multi"]),
        ('{"grouping": 1}', ["grouping", "1", "str"]),
        ('{"extend": true}', ["extend", "True", "str"]),
        ('{"extend": "all"}', ["extend", "'all'", "auto, on, off"]),
        ('{"grouping": null}', ["grouping", "None", "str"]),
        ('{"grouping": ["multi"]}', ["grouping", "str"]),
        ('{"check": 1}', ["check", "1", "bool"]),
        ('{"check": 0}', ["check", "0", "bool"]),
        ('{"check": "true"}', ["check", "'true'", "bool"]),
        ('{"hold_siblings": 256}', ["hold_siblings", "256", "bool"]),
        ('{"arena_tokens": -1}', ["arena_tokens", "-1", "0 or more"]),
        ('{"arena_tokens": "5"}', ["arena_tokens", "'5'", "int"]),
        ('{"arena_tokens": 1.0}', ["arena_tokens", "1.0", "int"]),
        ('{"arena_tokens": true}', ["arena_tokens", "True", "int"]),
        ('{"check": null}', ["check", "None", "bool"]),
        ('{"base_backend": true}', ["base_backend", "True", "str"]),
        ('{"base_backend": ""}', ["base_backend", "''", "stock backend", "auto"]),
        ('{"base_backend": "packinfer"}', ["base_backend", "'packinfer'", "stock backend", "auto"]),
        ('{"group": "multi"}', ["'group'", "base_backend, check, extend, grouping, hold_siblings"]),
        ('{"base-backend": "triton"}', ["'base-backend'", "base_backend, check, extend, grouping, hold_siblings"]),
        ('{"a\\nb": 1, "grouping": "off"}', ["base_backend, check, extend, grouping, hold_siblings"]),
        ("{grouping: off}", ["PACKINFER_CONFIG", "JSON"]),
        ('{"grouping": "off"', ["PACKINFER_CONFIG", "JSON"]),
        ("\n\n\n{,}\n", ["PACKINFER_CONFIG", "JSON"]),
        ("grouping=off", ["PACKINFER_CONFIG", "JSON"]),
        (" ", ["PACKINFER_CONFIG", "JSON"]),
        ('{"wrap": true, "base_backend": "fa3"}', ["wrap", "base_backend", "auto"]),
        ("[]", ["PACKINFER_CONFIG", "JSON object"]),
        ("null", ["PACKINFER_CONFIG", "JSON object"]),
        ("[\n]", ["PACKINFER_CONFIG", "JSON object"]),
        ('"off"', ["PACKINFER_CONFIG", "JSON object"]),
    ],
)
def test_mistakes(text: str, names: list[str]) -> None:
    line = message(text)
    assert [name for name in names if name not in line] == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text() | st.sampled_from(list(DEFAULTS)), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(JSON.map(json.dumps) | st.text())
def test_any_text_is_a_config_or_one_line(text: str) -> None:
    try:
        loaded = Config.from_json(text)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        given = json.loads(text or "{}")
        assert dataclasses.asdict(loaded) == DEFAULTS | given
        assert [type(value) for value in given.values()] == [type(DEFAULTS[name]) for name in given]


@given(
    st.sampled_from(["auto", "triton", "fa3"]),
    st.sampled_from(["off", "single", "multi"]),
    st.sampled_from(["auto", "on", "off"]),
    st.booleans(),
    st.integers(0, 1 << 30),
    st.booleans(),
    st.booleans(),
)
def test_json_round_trip(
    base_backend: str, grouping: str, extend: str, check: bool, arena_tokens: int, wrap: bool, hold: bool
) -> None:
    written = Config("auto" if wrap else base_backend, grouping, extend, check, arena_tokens, wrap, hold)
    assert Config.from_json(written.to_json()) == written


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKINFER_CONFIG", '{"grouping": "off"}')
    assert Config.load() == Config(grouping="off")
    monkeypatch.delenv("PACKINFER_CONFIG")
    assert Config.load() == Config()


def test_what_the_user_gave_is_told_from_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKINFER_CONFIG", '{"hold_siblings": true, "grouping": "off"}')
    assert Config.given() == {"hold_siblings": True, "grouping": "off"}
    monkeypatch.setenv("PACKINFER_CONFIG", "[]")
    with pytest.raises(ConfigError, match="JSON object"):
        Config.given()
    monkeypatch.delenv("PACKINFER_CONFIG")
    assert Config.given() == {}


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().grouping = "off"  # type: ignore[misc]


def test_flag_names() -> None:
    assert [flag(f.name) for f in dataclasses.fields(Config)] == [
        "--packinfer-base-backend",
        "--packinfer-grouping",
        "--packinfer-extend",
        "--packinfer-check",
        "--packinfer-arena-tokens",
        "--packinfer-wrap",
        "--packinfer-hold-siblings",
    ]
    assert config.ENV == "PACKINFER_CONFIG"
