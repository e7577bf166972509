"""``packinfer-sgl doctor``: is everything in place that ``--attention-backend packinfer`` needs?"""

from __future__ import annotations

import dataclasses
import os
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from packinfer_sgl.config import ENV, Config, ConfigError, flag

PACKAGES = ("packinfer-sgl", "sglang", "torch", "triton", "flashinfer-python")


def examine() -> int:
    """Prints what it finds; 0 = healthy, 1 = not, with one line for each reason."""
    console = Console()
    console.print(_versions())
    troubles, warnings = [], []
    try:
        import torch
        from sglang.srt.platforms import current_platform
        from sglang.srt.plugins import load_plugins

        from packinfer_sgl.plugin import TESTED, check
    except ImportError as e:
        troubles.append(f"SGLang cannot be imported: {e}")
    else:
        load_plugins()
        checks = check()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        console.print(f"\nplatform  {type(current_platform).__name__}\nGPU       {gpu}\n", highlight=False)
        hooks = Table("hook", "state", show_edge=False)
        for target, ok, detail in checks:
            hooks.add_row(target, escape(detail) if ok else f"[red]{escape(detail)}[/red]")
        console.print(hooks)
        console.print()
        troubles += [f"{target}: {detail}" for target, ok, detail in checks if not ok]
        allowed = os.environ.get("SGLANG_PLUGINS")
        if allowed and "packinfer" not in [name.strip() for name in allowed.split(",")]:
            troubles.append(f"SGLANG_PLUGINS={allowed} keeps SGLang from loading packinfer")
        if version("sglang") not in TESTED:
            warnings.append(f"SGLang {version('sglang')} is not tested; tested are {', '.join(TESTED)}")
    console.print(_settings())
    console.print()
    try:
        Config.load()
    except ConfigError as e:
        troubles.append(str(e))
    for text in warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)
    for text in troubles:
        console.print(f"[red]not healthy:[/red] {escape(text)}", highlight=False, soft_wrap=True)
    if not troubles:
        console.print("[green]healthy[/green]")
    return 1 if troubles else 0


def _versions() -> Table:
    table = Table("package", "version", show_edge=False)
    for package in PACKAGES:
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    return table


def _settings() -> Table:
    table = Table("flag of sglang serve", f"{ENV} key", "default", "allowed", "meaning", show_edge=False)
    for f in dataclasses.fields(Config):
        allowed = " | ".join(f.metadata["choices"]) or f.metadata["unit"]
        table.add_row(flag(f.name), f.name, str(f.default).lower(), allowed, f.metadata["help"])
    return table
