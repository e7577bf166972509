"""SGLang's entry into the plugin: the backend's name, its factory, and the hooks."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from packinfer_sgl import __version__
from packinfer_sgl.config import ENV, Config
from packinfer_sgl.reasons import LayerReason

if TYPE_CHECKING:
    from packinfer_sgl.patches.hook import Hook

logger = logging.getLogger(__name__)

NAME = "packinfer"
TESTED = ("0.5.17", "0.5.23")
# SGLang's lists of backends that its deterministic mode takes, and that keep the radix cache in it; what adds to each
_DETERMINISTIC_CHOICES = {
    "DETERMINISTIC_ATTENTION_BACKEND_CHOICES": "add_deterministic_attention_backend_choices",
    "RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND": "add_radix_supported_deterministic_attention_backend_choices",
}
_REPORTED = ("grouping", "extend", "check", "arena_tokens", "hold_siblings")  # settings that /server_info repeats


class PluginError(RuntimeError):
    """packinfer was asked for and cannot run as it must."""


class Check(NamedTuple):
    """Whether one seam of SGLang is as the plugin needs it."""

    target: str
    ok: bool
    detail: str


def hooks() -> list[Hook]:
    """What the plugin changes in SGLang (``patches/README.md``) in every process; the prefix hold puts its own hooks in
    place where requests are held."""
    from packinfer_sgl.patches import arena, batch_rows, cpu_triton, draft_backend, server_args, server_info

    patches = (server_args, batch_rows, server_info, draft_backend, arena, cpu_triton)
    return [hook for patch in patches for hook in patch.hooks()]


def register() -> None:
    """SGLang's plugin entry point, in every process; SGLang applies the hooks right after it.

    SGLang logs and ignores whatever a plugin raises, so the name comes first: its factory is what refuses to start.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    _add_to_deterministic()
    register_attention_backend(NAME)(create_backend)
    if ENV in os.environ:  # for everybody else the stock factories stay as they are
        for name, factory in ATTENTION_BACKENDS.items():
            if name != NAME and not isinstance(factory, WrappedFactory):
                ATTENTION_BACKENDS[name] = WrappedFactory(name, factory)
    for hook in hooks():
        hook.register()


def _add_to_deterministic() -> None:
    """So that SGLang's deterministic mode takes the name, and keeps the radix cache with it."""
    from sglang.srt import server_args

    for choices, add in _DETERMINISTIC_CHOICES.items():
        if hasattr(server_args, add) and NAME not in getattr(server_args, choices, ()):
            getattr(server_args, add)([NAME])


def check(of: list[Hook] | None = None) -> list[Check]:
    """Look at every seam, or at those of these hooks; valid once SGLang has loaded its plugins."""
    wanted = hooks() if of is None else of
    return [Check(hook.target, problem is None, problem or "hooked") for hook in wanted for problem in [hook.problem()]]


class WrappedFactory:
    """The factory of a stock backend, which packinfer wraps if the setting ``wrap`` says so.

    SGLang checks the backend's name for some models; with a stock name they run on packinfer all the same.
    """

    def __init__(self, name: str, factory: Callable[[Any], Any]) -> None:
        self.name, self.factory = name, factory

    def __call__(self, runner: Any) -> Any:
        config = Config.load()
        return _build(runner, config, self.name, self.factory) if config.wrap else self.factory(runner)


def create_backend(runner: Any) -> Any:
    """The factory behind ``--attention-backend packinfer``; called in each model process.

    Raises:
        PluginError: a hook did not take, the server's deterministic mode cannot be kept (``check_deterministic``), or
            the base does not go together with its KV cache.
        ConfigError: a setting is wrong.
        ArenaError: the server cannot have an arena.
        HoldError: the server was told to hold requests, and cannot.
        UnsupportedModel: models of this kind are never packed.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    config = Config.load()
    if config.wrap:
        raise PluginError("packinfer: wrap is for a stock --attention-backend, not for packinfer itself")
    base = base_backend(config, runner.device)
    if base not in ATTENTION_BACKENDS:
        raise PluginError(
            f"packinfer: base backend {base!r} is not registered with SGLang; "
            f"known: {', '.join(sorted(set(ATTENTION_BACKENDS) - {NAME}))}"
        )
    if base == "fa3" and runner.server_args.kv_cache_dtype == "fp8_e5m2":  # SGLang knows it by the name only
        raise PluginError(
            "packinfer: SGLang's fa3 has no kernels for fp8_e5m2 KV; choose --kv-cache-dtype fp8_e4m3, which is "
            "packed, or --packinfer-base-backend triton"
        )
    return _build(runner, config, base, ATTENTION_BACKENDS[base])


def _build(runner: Any, config: Config, base: str, factory: Callable[[Any], Any]) -> Any:
    import torch

    from packinfer_sgl.kernels.tiles import device_profile
    from packinfer_sgl.patches import hold
    from packinfer_sgl.patches.arena import carve, when_flushed
    from packinfer_sgl.planning.cpu_profile import CPU
    from packinfer_sgl.serving.backend import wrap
    from packinfer_sgl.serving.batch_rows import want_rows
    from packinfer_sgl.serving.build import build_router
    from packinfer_sgl.serving.layers import check_base, layer_reasons, linear_layers
    from packinfer_sgl.serving.metrics import STATS, start_prometheus

    checks = check()
    if broken := [c for c in checks if not c.ok]:
        raise PluginError(
            f"packinfer: cannot hook {broken[0].target} ({broken[0].detail}); SGLang {version('sglang')} is installed, "
            f"tested are {', '.join(TESTED)}: install one of them or choose a stock --attention-backend"
        )
    if version("sglang") not in TESTED:
        warnings.warn(
            f"packinfer {__version__} is tested with SGLang {', '.join(TESTED)}, not {version('sglang')}", stacklevel=2
        )
    deterministic = _deterministic()
    if deterministic and not runner.is_draft_worker:  # drafts are never packed
        check_deterministic(deterministic, config, base, runner)
        if deterministic == "--rl-on-policy-target":
            logger.warning(
                "packinfer %s: log-probabilities of decode are the same in any batch, but not those of a trainer that "
                "computes them with FA3: packed decode sums in another order",
                __version__,
            )
    stock = factory(runner)
    if runner.is_draft_worker:
        return stock
    from sglang.srt.platforms import current_platform
    from sglang.srt.runtime_context import get_parallel

    reasons = layer_reasons(runner)
    check_base(stock, base, runner)
    STATS.base_backend = base
    STATS.details = {
        "version": __version__,
        "sglang_version": version("sglang"),
        "platform": type(current_platform).__name__,
        "hooks": [c.target for c in checks],
        "config": {name: getattr(config, name) for name in _REPORTED},
        "deterministic": None,
    }
    for layer_id in linear_layers(runner):
        STATS.set_layer(layer_id, LayerReason.LINEAR_ATTENTION)
    for layer, why in reasons.items():
        if why is not None:
            STATS.set_layer(layer.layer_id, why)
    packable = [layer for layer, why in reasons.items() if why is None]
    if not packable:
        names = ", ".join(sorted({why.value for why in reasons.values()}))
        STATS.reason = f"no attention layer of {type(runner.model).__name__} can be packed ({names})"
        logger.warning("packinfer %s: %s: everything runs on %s", __version__, STATS.reason, base)
        return stock
    if config.hold_siblings:
        held = hold.start(runner, "hold_siblings" in Config.given(), deterministic)
        STATS.sections["held"] = held.as_dict
        if held.reason is None:
            checks += check(hold.hooks())
            STATS.details["hooks"] = [c.target for c in checks]
    slots = carve(runner, config.arena_tokens) if config.arena_tokens else None
    profile = CPU if runner.device == "cpu" else device_profile(torch.device(runner.device))
    if not profile.is_measured:
        logger.warning(
            "packinfer %s: there is no record of times of %s: prefixes are grouped where that saves much, and prefill "
            "stays on %s",
            __version__,
            profile.name,
            base,
        )
    STATS.details["device"] = {
        "record": profile.name, "measured": profile.is_measured, "least_saving": profile.least_saving,
    }  # fmt: skip
    router = build_router(stock, runner, config, packable, slots, STATS, deterministic=deterministic is not None)
    if deterministic:
        STATS.details["deterministic"] = {"unit_tokens": router.unit_tokens}
    backend = wrap(stock, router)
    when_flushed(router.read_scales)
    if router.arena is not None:
        when_flushed(router.arena.drop)
        STATS.sections["arena"] = router.arena.as_dict
    want_rows()
    STATS.active, STATS.reason = True, None
    STATS.details["packs"] = router.kinds()
    ranks = getattr(runner, "ps", None) or get_parallel()  # 0.5.17 or 0.5.23
    start_prometheus({f"{kind}_rank": str(getattr(ranks, f"{kind}_rank") or 0) for kind in ("pp", "tp", "dp")})
    logger.info(
        "packinfer %s: shared prefixes read once, over %s on %s (SGLang %s, %d hooks verified, grouping %s%s)",
        __version__,
        base,
        type(current_platform).__name__,
        version("sglang"),
        len(checks),
        config.grouping,
        f", deterministic in units of {router.unit_tokens} tokens" if deterministic else "",
    )
    return backend


def check_deterministic(flag: str, config: Config, base: str, runner: Any) -> None:
    """Raise PluginError, naming cause and cure, where packinfer cannot keep what SGLang's deterministic mode promises:
    bits of a request that do not depend on what runs beside it.

    Args:
        flag: by which the server is in the mode.
        base: the stock backend, which runs all but decode.
    """
    import torch
    from sglang.srt import server_args
    from sglang.srt.runtime_context import get_schedule

    from packinfer_sgl.kernels.tiles import is_hopper

    problem = None
    if not all(hasattr(server_args, name) for name in _DETERMINISTIC_CHOICES.values()):
        problem = f"SGLang {version('sglang')} has no registry of deterministic backends; install {' or '.join(TESTED)}"
    elif not is_hopper(torch.device(runner.device)):
        problem = "packed decode keeps bits on Hopper GPUs only; leave out packinfer here"
    elif base != "fa3":
        problem = f"it runs over fa3, whose deterministic form is known, not over {base}; choose fa3"
    elif config.extend == "on":
        problem = "prefill stays on fa3, and --packinfer-extend is on; leave it at auto, or off"
    elif config.arena_tokens:
        problem = "--packinfer-arena-tokens copies spans up to radix nodes' ends, groups end at blocks; leave it out"
    elif get_schedule().enable_mixed_chunk:
        problem = "--enable-mixed-chunk runs some decode tokens with prefills, on fa3, with other bits; leave it out"
    elif _decodes_as_prefill():
        problem = (
            "DP attention runs decode steps as prefills, on fa3, with other bits, while another rank prefills; add "
            "--disable-prefill-cuda-graph"
        )
    if problem is not None:
        raise PluginError(f"packinfer: {flag}: {problem}")


def _decodes_as_prefill() -> bool:
    """Whether SGLang (0.5.23) may replay graphs of prefill for a batch of decodes, where another rank prefills."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend

    return (
        hasattr(ScheduleBatch, "convert_decode_to_extend")
        and is_dp_attention_enabled()
        and check_cuda_graph_backend(Phase.PREFILL, Backend.BREAKABLE)
    )


def _deterministic() -> str | None:
    """The flag by which this server promises bits that do not depend on the batch, or None."""
    from sglang.srt.runtime_context import get_exec

    settings = get_exec().deterministic
    for name in ("rl_on_policy_target", "enable_deterministic_inference"):  # the first brings the second with it
        if getattr(settings, name, None):
            return f"--{name.replace('_', '-')}"
    return None


def base_backend(config: Config, device: str) -> str:
    """The stock backend beneath: as configured, else what suits the device."""
    if config.base_backend != "auto":
        return config.base_backend
    if device == "cpu":
        return "torch_native"
    import torch

    return "fa3" if torch.cuda.get_device_capability()[0] == 9 else "flashinfer"
