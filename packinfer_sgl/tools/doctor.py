"""``packinfer-sgl doctor``: is everything in place that ``--attention-backend packinfer`` needs?"""

from __future__ import annotations

import dataclasses
import os
from importlib.metadata import PackageNotFoundError, version
from warnings import catch_warnings, simplefilter

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from packinfer_sgl.config import ENV, Config, ConfigError, flag

PACKAGES = ("packinfer-sgl", "sglang", "torch", "triton", "flashinfer-python")


def examine() -> int:
    """Prints what it finds; 0 = healthy, 1 = not, with one line for each reason."""
    console = Console(highlight=False)
    troubles: list[str] = []
    warnings: list[str] = []
    console.print(_versions(), "")
    try:
        _look_at_sglang(console, troubles, warnings)
    except ImportError as e:
        troubles.append(f"SGLang cannot be imported: {e}")
    console.print(_settings())
    try:
        Config.load()
    except ConfigError as e:
        troubles.append(str(e))
    for text in warnings:
        console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)
    for text in troubles:
        console.print(f"[red]not healthy:[/] {escape(text)}", soft_wrap=True)
    if not troubles:
        console.print("[green]healthy[/]")
    return 1 if troubles else 0


def _look_at_sglang(console: Console, troubles: list[str], warnings: list[str]) -> None:
    with catch_warnings():  # of SGLang's own optional parts
        simplefilter("ignore")
        import torch
        from sglang.srt.platforms import current_platform
        from sglang.srt.plugins import load_plugins

        from packinfer_sgl import plugin

        load_plugins()
    console.print(f"platform  {type(current_platform).__name__}")
    console.print(f"GPU       {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}\n")
    checks = plugin.check()
    hooks = Table.grid(padding=(0, 2))
    for check in checks:
        hooks.add_row("[green]hooked[/]" if check.ok else "[red]missing[/]", Text(check.target, overflow="fold"))
    console.print(hooks, "")
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "packinfer" not in [name.strip() for name in allowed.split(",")]:
        troubles.append(f"SGLANG_PLUGINS={allowed} keeps SGLang from loading packinfer")
    else:
        troubles += [f"{check.target}: {check.detail}" for check in checks if not check.ok]
    if version("sglang") not in plugin.TESTED:
        warnings.append(f"SGLang {version('sglang')} is not tested; tested are {', '.join(plugin.TESTED)}")


def _versions() -> Table:
    table = Table.grid(padding=(0, 2))
    for package in PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    return table


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
