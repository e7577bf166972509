"""``packinfer-sgl doctor``: is everything in place that ``--attention-backend packinfer`` needs?"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from warnings import catch_warnings, simplefilter

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from packinfer_sgl.config import ENV, Config, ConfigError, flag

PACKAGES = ("packinfer-sgl", "sglang", "torch", "triton", "flashinfer-python")
HOOKED = "hooked"  # what plugin.check says of a hook that took


def examine(as_json: bool = False) -> int:
    """Prints what it finds; 0 = healthy, 1 = not, with one line for each reason."""
    with contextlib.redirect_stdout(sys.stderr):  # whatever SGLang says while it is imported is no part of the report
        found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    return 0 if found["healthy"] else 1


def report() -> dict[str, Any]:
    """Plain numbers, strings, lists and dicts; no path and no host name, so that it can be published."""
    found: dict[str, Any] = {
        "healthy": False,
        "troubles": [],
        "warnings": [],
        "versions": _versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "platform": None,
        "gpus": [],
        "hooks": {},
        "settings": None,
    }
    try:
        _look_at_sglang(found)
    except ImportError as e:
        found["troubles"].append(f"SGLang cannot be imported: {e}")
    try:
        found["settings"] = dataclasses.asdict(Config.load())
    except ConfigError as e:
        found["troubles"].append(str(e))
    found["healthy"] = not found["troubles"]
    return found


def _look_at_sglang(found: dict[str, Any]) -> None:
    with catch_warnings():  # of SGLang's own optional parts
        simplefilter("ignore")
        import torch
        from sglang.srt.platforms import current_platform
        from sglang.srt.plugins import load_plugins

        from packinfer_sgl import plugin

        load_plugins()
    found["platform"] = type(current_platform).__name__
    found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    checks = plugin.check()
    held = _hold_checks(found)
    found["hooks"] = {check.target: check.detail for check in [*checks, *held]}
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "packinfer" not in [name.strip() for name in allowed.split(",")]:
        found["troubles"].append(f"SGLANG_PLUGINS={allowed} keeps SGLang from loading packinfer")
    else:
        found["troubles"] += [f"{check.target}: {check.detail}" for check in checks if not check.ok]
    if version("sglang") not in plugin.TESTED:
        tested = ", ".join(plugin.TESTED)
        found["warnings"].append(f"SGLang {version('sglang')} is not tested; tested are {tested}")


def _hold_checks(found: dict[str, Any]) -> list[Any]:
    """The prefix hold's seams: without one nothing is held by default, and a server that was told to hold refuses."""
    from packinfer_sgl import plugin
    from packinfer_sgl.patches import hold

    try:
        wanted, told = Config.load().hold_siblings, "hold_siblings" in Config.given()
    except ConfigError:  # said by ``report``
        return []
    if not wanted:
        return []
    if (problem := hold.put_hooks()) is not None:
        found["troubles" if told else "warnings"].append(f"no requests can be held for a shared prefix: {problem}")
    return plugin.check(hold.hooks())


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    versions = Table.grid(padding=(0, 2))
    for package, its in found["versions"].items():
        versions.add_row(package, its or "not installed")
    console.print(versions, "")
    if found["platform"] is not None:
        console.print(f"platform  {found['platform']}")
        console.print(f"GPU       {', '.join(found['gpus']) or 'none'}\n")
        hooks = Table.grid(padding=(0, 2))
        for target, detail in found["hooks"].items():
            state = "[green]hooked[/]" if detail == HOOKED else "[red]missing[/]"
            hooks.add_row(state, Text(target, overflow="fold"))
        console.print(hooks, "")
    console.print(_settings())
    for text in found["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
    for text in found["troubles"]:
        console.print(f"[red]not healthy:[/] {escape(text)}", soft_wrap=True)
    if found["healthy"]:
        console.print("[green]healthy[/]")


def _settings() -> Table:
    """SGLang 0.5.23 prints its own help before it loads plugins, so the flags are listed here."""
    table = Table.grid(padding=(0, 2))
    for f in dataclasses.fields(Config):
        allowed = " | ".join(f.metadata["choices"]) or f.metadata["unit"]
        table.add_row(Text(flag(f.name), no_wrap=True), f"{allowed}; default {str(f.default).lower()}")
        table.add_row("", Text(f.metadata["help"], style="dim"))
    table.add_row(Text(ENV, no_wrap=True), f"the same for sglang.Engine, as JSON: {escape(Config().to_json())}")
    table.add_row()
    return table
