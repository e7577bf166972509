"""Why a server is no faster with packinfer, in words: for ``packinfer-sgl explain``.

``/server_info`` counts batches and KV tokens, no time: how much of a step is attention is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packinfer_sgl.reasons import BatchReason, LayerReason, UngroupedReason

State = Mapping[str, Any]  # internal_states[i]["packinfer"] of GET /server_info

LITTLE = 1.1  # a bound, or a saving, of less is said to be little
UNGROUPED = {
    UngroupedReason.OFF: "grouping is switched off",
    UngroupedReason.NOTHING_SHARED: "their requests shared nothing that is known",
    UngroupedReason.SHORT_SPANS: "what they shared was too short to be worth a read of its own",
    UngroupedReason.SMALL_SAVING: "groups would have saved less than the gate asks for",
    UngroupedReason.FULL_BUFFERS: "a plan with groups did not fit the buffers",
}
FALLBACK = {
    BatchReason.DETERMINISTIC: "verify steps of speculative decoding, not packed in the deterministic mode",
    BatchReason.SPECULATIVE: "speculative decoding that is not packed (trees of drafts, device, base backend)",
    BatchReason.ENCODER_DECODER: "cross attention",
    BatchReason.NO_BATCH: "forwards without a batch of the scheduler (warm-up, capture)",
    BatchReason.TOO_MANY_ROWS: "more requests than the buffers hold",
    BatchReason.OTHER_LENGTHS: "lengths that SGLang states in two ways",
    BatchReason.ERROR: "planning failed, a captured graph then ran without groups: please report what the log says",
    BatchReason.MULTI_ITEM: "multi-item scoring",
}


def explain(state: State) -> list[str]:
    """Sentences about one rank, the most important first."""
    base = state["base_backend"]
    if not state["active"]:
        inactive = [f"packinfer is not active: {state['reason']}."]
        if not base:
            inactive.append("Start the server with --attention-backend packinfer.")
        return inactive
    return [
        f"packinfer is active over {base}; on this device it packs {', '.join(state['packs'])}.",
        *_decode(state),
        *_bound(state),
        *_prefill(state),
        *_others(state),
        *_settings(state),
    ]


def _decode(state: State) -> list[str]:
    steps, ungrouped = state["packed_steps"], state["ungrouped_steps"]
    if not steps:
        return ["No decode or verify step was packed yet: send requests that run at the same time."]
    alone = sum(ungrouped.values())
    said = [f"In {steps - alone:,} of {_n(steps, 'packed decode step')} a shared prefix was read once."]
    for reason, count in sorted(ungrouped.items(), key=lambda one: -one[1]):
        said.append(f"In {count:,} nothing was: {UNGROUPED[UngroupedReason(reason)]}{_gate(state, reason)}.")
    return said


def _gate(state: State, reason: str) -> str:
    """What the gate is, where that is the reason."""
    return f" ({state['device']['least_saving']:g}x)" if reason == UngroupedReason.SMALL_SAVING.value else ""


def _bound(state: State) -> list[str]:
    logical, unique, read = (state[f"kv_tokens_{name}"] for name in ("logical", "unique", "read"))
    if not read:
        return []
    bound, saved = logical / unique, logical / read
    said = [
        f"These steps read {read:,} KV tokens; without packinfer they would have read {logical:,} ({saved:.2f}x), and "
        f"the least is {unique:,}: the bound is {bound:.2f}x."
    ]
    if bound < LITTLE:
        said.append("Requests that ran at the same time shared next to nothing: no kernel can save much here.")
    elif saved < LITTLE:
        said.append("Requests did share something, and next to nothing of it was saved, for the reasons above.")
    share = 1 - read / logical
    said.append(
        f"So at most {share:.0%} of the time that attention reads KV can be gone. How much of a step that is cannot be "
        "told from here: weights, sampling and the scheduler take the rest of it, with short contexts nearly all."
    )
    return said


def _prefill(state: State) -> list[str]:
    packed, stock = state["packed_extends"], state["fallback_steps"].get(BatchReason.EXTEND.value, 0)
    if not packed + stock:
        return []
    said = f"Packed prefill and mixed batches: {packed:,} of {packed + stock:,}"
    if not stock:
        return [f"{said}."]
    why = f"{state['base_backend']} was expected to be faster, or the batch was too large to plan"
    if state.get("deterministic"):
        why = "in SGLang's deterministic mode only decode is packed"
    elif state["config"]["extend"] == "off":
        why = "the setting extend is off"
    elif "extend" not in state["packs"]:
        why = "times of prefill on this device or head dimension are not measured (--packinfer-extend on packs all)"
    return [f"{said}; the others ran on {state['base_backend']}: {why}."]


def _others(state: State) -> list[str]:
    said = []
    for reason, count in sorted(state["fallback_steps"].items(), key=lambda one: -one[1]):
        if reason != BatchReason.EXTEND.value:
            said.append(f"{_n(count, 'batch', 'es')} on {state['base_backend']}: {FALLBACK[BatchReason(reason)]}.")
    for reason, layers in sorted(state["fallback_layers"].items(), key=lambda one: -one[1]):
        if reason == LayerReason.LINEAR_ATTENTION.value:
            said.append(f"{_n(layers, 'layer')} of the model with a state instead of KV: there is nothing to pack.")
        else:
            said.append(f"{_n(layers, 'layer')} of the model on {state['base_backend']} in every batch: {reason}.")
    return said


def _settings(state: State) -> list[str]:
    said = []
    if (held := state["held"]) and held["requests"]:
        said.append(
            f"{_n(held['requests'], 'request')} waited until another one had computed the prefix that they share, and "
            f"found {_n(held['prefix_tokens'], 'prompt token')} of it cached (--packinfer-hold-siblings false turns "
            "that off)."
        )
    if state["config"]["check"]:
        said.append("--packinfer-check is on: every step is compared with the stock backend, which takes longer.")
    if not state["device"]["measured"]:
        said.append(f"There are no measured times of {state['device']['record']}: only what saves much is grouped.")
    if state["packed_steps"] and state["plans"] > state["packed_steps"] / 2:
        said.append(
            f"More than every other step needed a new plan ({state['plan_us_p50']:,.0f} us, median): requests come and "
            "go all the time."
        )
    return said


def _n(count: int, noun: str, plural: str = "s") -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else plural)
