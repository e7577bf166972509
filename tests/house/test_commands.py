"""Commands in the documents: programs that exist, with options that they have."""

from __future__ import annotations

import argparse
import re
import shlex

import pytest
from test_house import ROOT

from packinfer_sgl.cli import _parser

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/recipes.md", "docs/reference.md", "docs/support.md")


def commands(text: str) -> list[list[str]]:
    """What stands in indented blocks, in words: without assignments before it, comments, and what is piped to."""
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue  # no shell
        ends = [i for i, word in enumerate(words) if word in ("|", "&&", ";")]
        words = words[: ends[0]] if ends else words
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        found.append(words)
    return [words for words in found if words]


@pytest.fixture(scope="module")
def sglang_flags() -> set[str]:
    """Of ``sglang serve``, the plugin's included."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return {flag for action in parser._actions for flag in action.option_strings}


def faults(words: list[str], sglang_flags: set[str]) -> list[str]:
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    if words[:2] == ["sglang", "serve"]:
        return [flag for flag in flags if flag not in sglang_flags]
    if words[0] in ("python", "bash") and len(words) > 1 and re.match(r"(scripts|examples)/", words[1]):
        if not (ROOT / words[1]).is_file():
            return [words[1]]
        folder = (ROOT / words[1]).parent
        source = "".join(path.read_text() for path in folder.rglob("*.[ps][yh]")) if words[0] == "python" else ""
        return [flag for flag in flags if words[0] == "python" and f'"{flag}"' not in source]
    if words[0] == "packinfer-sgl":
        try:
            _parser().parse_args(words[1:])
        except SystemExit:
            return [shlex.join(words)]
    return []


@pytest.mark.contract
@pytest.mark.parametrize("path", DOCUMENTS)
def test_commands_of(path: str, sglang_flags: set[str]) -> None:
    found = commands((ROOT / path).read_text())
    assert found and [fault for words in found for fault in faults(words, sglang_flags)] == []


@pytest.mark.parametrize(
    "line",
    [
        "sglang serve --packinfer-nothing on",
        "X=1 sglang serve --model-path M \\\n      --attention-back-end packinfer  # and so on",
        "python scripts/nothing.py",
        "python scripts/soak.py --nothing | tee log",
        "bash scripts/nothing.sh && true",
        "packinfer-sgl estimate FILE --nothing",
        "packinfer-sgl nothing",
    ],
)
def test_a_wrong_command_is_found(line: str, sglang_flags: set[str]) -> None:
    (words,) = commands(f"Like this:\n\n    {line}\n")
    assert len(faults(words, sglang_flags)) == 1


def test_all_commands_are_seen() -> None:
    recipes = commands((ROOT / "docs" / "recipes.md").read_text())
    assert sum(words[:2] == ["sglang", "serve"] for words in recipes) == 6
    assert sum(words[0] == "curl" for words in recipes) == 2
