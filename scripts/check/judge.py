"""From what engines said to rows of PASS, FAIL and REFUSED."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from check.compare import Ran, compare

STOCK = "-unwrapped"  # a wrapped engine that failed, once more without packinfer


@dataclass
class Row:
    """``verdict``: PASS, FAIL, REFUSED (by SGLang or by packinfer, as ``note`` says) or UNTESTED (``note``: why)."""

    check: str
    what: str
    verdict: str
    note: str


def account(ran: Ran) -> str:
    """The plugin's own account of an engine, in a few words."""
    parts = []
    for state in ran.states:
        if not state.get("active"):
            parts.append(f"inactive: {state.get('reason')}")
            continue
        text = f"{state['packed_steps']} packed steps over {state['base_backend']}"
        text += f", KV tokens read {state['kv_tokens_read']} of {state['kv_tokens_logical']}"
        for kind in ("fallback_steps", "fallback_layers", "fitted_plans", "audited_steps"):
            if state.get(kind):
                text += f", {kind} {state[kind]}"
        parts.append(text)
    ranks = f"; packed steps by rank {ran.ranks}" if len(ran.ranks) > 1 else ""
    return "; ".join(parts) + ranks


def packs(ran: Ran) -> bool:
    """Every rank that can be seen decoded on the packed kernels, and reads shared tokens once."""
    states = [s for s in ran.states if s.get("active")]
    return (
        bool(states)
        and len(states) == len(ran.states)
        and all(s["packed_steps"] > 0 and s["kv_tokens_read"] < s["kv_tokens_logical"] for s in states)
        and all(steps > 0 for steps in ran.ranks.values())
    )


class Judge:
    """What ``ran`` says of each check, as ``rows``.

    Args:
        near_tie: a log-probability by which correct kernels may differ even if two stock engines do not.
    """

    def __init__(self, ran: dict[str, Ran], near_tie: float) -> None:
        self.ran, self.near_tie = ran, near_tie
        self.rows: list[Row] = []
        self._check = ""

    def judge(self, check: str, rows_of: Callable[[Judge], None]) -> None:
        self._check = check
        rows_of(self)

    def row(self, what: str, verdict: str, note: str) -> None:
        self.rows.append(Row(self._check, what, verdict, note))

    def add(self, what: str, ok: bool, note: str) -> None:
        self.row(what, "PASS" if ok else "FAIL", note)

    def started(self, what: str, *names: str, stock: Iterable[str] = ()) -> bool:
        """Whether all engines gave a result. If not, a row: REFUSED if it is a stock engine, or one that fails without
        packinfer, too, or if a line of packinfer's own says why it does not start."""
        for name in [*stock, *names]:
            problem = self.ran[name].problem
            if problem:
                refused = name in stock or (problem.startswith("while starting") and "packinfer:" in problem)
                if name + STOCK in self.ran and (other := self.ran[name + STOCK].problem):
                    refused, problem = True, f"fails without packinfer, too: {other}"
                self.row(what, "REFUSED" if refused else "FAIL", f"{name} {problem}")
                return False
        return True

    def limit(self, stock: str = "") -> float:
        """How far apart log-probabilities of two correct kernels may be: twice as far as those of two stock backends,
        the engines ``stock`` + "triton" and ``stock`` + "fa3"."""
        return max(2 * compare(self.ran[f"{stock}triton"], self.ran[f"{stock}fa3"]).drift, self.near_tie)

    def same(
        self,
        what: str,
        name: str,
        reference: str,
        *,
        packed: bool = True,
        control: str = "",
        stock: str = "",
        rounds: tuple[str, ...] = (),
    ) -> None:
        """A row: ``name`` says what ``reference`` says, but for near ties. ``control`` is a stock engine that differs
        from ``reference`` in more than its kernels; then what it deviates is allowed, too. ``stock``: see ``limit``.
        ``rounds``: only these are compared.
        """
        ours, diff = self.ran[name], compare(self.ran[name], self.ran[reference], rounds)
        drift = self.limit(stock)
        gap = 2 * drift  # each of two tokens may have moved by the limit
        if control and self.ran[control] is not self.ran[reference]:
            other = compare(self.ran[control], self.ran[reference])
            drift, gap = max(drift, 2 * other.drift), max(gap, other.gap if other.gap < float("inf") else 0.0)
            self.add(f"{what}: stock", True, f"{control} against {reference}: {other}")
        ok = diff.of > 0 and diff.drift <= drift and diff.gap <= gap and (not packed or packs(ours))
        note = f"{name} against {reference}: {diff} (limits {drift:.3g}, {gap:.3g}); {account(ours)}"
        self.add(what, ok, note)

    def audited(self, name: str) -> None:
        """A row: each step's slots were compared with SGLang's table."""
        state = self.ran[name].state
        self.add(f"{name} steps", state["audited_steps"] == state["packed_steps"] > 0, account(self.ran[name]))


def report(rows: list[Row], gpus: int, out: Path) -> bool:
    """Print the rows and write ``out``/check_engine.json; whether one FAILs."""
    width = max(len(row.what) for row in rows)
    print()
    for row in rows:
        print(f"{row.verdict:9}{row.what:{width}}  {row.note}")
    environment = {
        "sglang": version("sglang"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if gpus else "CPU",
        "gpus": gpus,
        "date": time.strftime("%Y-%m-%d"),
    }
    result = {"environment": environment, "rows": [vars(row) for row in rows]}
    (out / "check_engine.json").write_text(json.dumps(result, indent=1) + "\n")
    return any(row.verdict == "FAIL" for row in rows)
