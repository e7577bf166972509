"""The ``--packinfer-*`` flags on SGLang's command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from packinfer_sgl.config import ENV, Config, ConfigError, flag
from packinfer_sgl.patches.hook import Hook

_BACKEND_FIELDS = ("attention_backend", "decode_attention_backend", "prefill_attention_backend")


def add_flags(result: None, parser: argparse.ArgumentParser) -> None:
    # not in a group of their own: frameworks that start SGLang prefix its flags by replacing this parser's method
    for f in dataclasses.fields(Config):
        text = f"{f.metadata['help']} (default: {str(f.default).lower()})"
        if isinstance(f.default, bool):
            more: dict[str, Any] = {"nargs": "?", "const": True, "metavar": "true|false"}
            parser.add_argument(flag(f.name), dest=_dest(f.name), type=_truth, help=text, **more)
        else:
            parser.add_argument(flag(f.name), dest=_dest(f.name), type=type(f.default), default=None, help=text)


def check_flags(cls: type, args: argparse.Namespace) -> None:
    """Validate the settings and hand them to the processes that SGLang will start; exit on a mistake."""
    given = {
        f.name: value for f in dataclasses.fields(Config) if (value := getattr(args, _dest(f.name), None)) is not None
    }
    named = any(getattr(args, name, None) == "packinfer" for name in _BACKEND_FIELDS)
    if not named and not given and ENV not in os.environ:
        return
    try:
        settings = {**Config.given(), **given}  # no defaults: these may do without what a given one insists on
        config = Config(**settings)
    except ConfigError as e:
        sys.exit(str(e))
    if given and not named and not config.wrap:
        sys.exit(f"packinfer: {flag(next(iter(given)))} needs --attention-backend packinfer, or {flag('wrap')}")
    if named and config.wrap:
        sys.exit(f"packinfer: {flag('wrap')} is for a stock --attention-backend, not for packinfer itself")
    if (named or config.wrap) and getattr(args, "use_ray", False):
        sys.exit("packinfer: the schedulers of --use-ray load no plugins; leave out the flag or packinfer")
    os.environ[ENV] = json.dumps(settings, sort_keys=True)


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")
    return text == "true"


def _dest(name: str) -> str:
    return f"packinfer_{name}"


def hooks() -> list[Hook]:
    args: Any = "sglang.srt.server_args.ServerArgs"
    return [
        Hook(f"{args}.add_cli_args", add_flags, HookType.AFTER),
        Hook(f"{args}.from_cli_args", check_flags, HookType.BEFORE),
    ]
