"""What became of an engine, and how what two of them said differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Ran:
    """What became of a scenario: its result, or the line that says why there is none.

    Attributes:
        said: answers of each round, by "<nth>-<round>".
        after: state of the first rank after each round, by the round's name (of its last time).
        states: of each rank at the end.
        ranks: packed steps by rank.
    """

    said: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    after: dict[str, dict[str, Any]] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @property
    def state(self) -> dict[str, Any]:
        return (self.states or [{}])[0]

    def answers(self, name: str) -> list[dict[str, Any]]:
        """Of the only round of this name."""
        (found,) = (said for key, said in self.said.items() if key.partition("-")[2] == name)
        return found

    def counted(self, name: str, counter: str) -> int:
        """How much ``counter`` grew in a round, the only one of this name and of the one before it."""
        names = [key.partition("-")[2] for key in self.said]
        at = names.index(name)
        return self.after[name][counter] - (self.after[names[at - 1]][counter] if at else 0)


@dataclass
class Diff:
    """How the outputs of two engines differ in all rounds that both ran.

    Attributes:
        equal, of: equal outputs, and all.
        common: tokens before the first difference, all outputs together.
        drift: largest difference of a log-probability among those tokens.
        gaps: per output that differs, how much less likely the reference holds the other's token than its own; infinite
            if that token is not among the likeliest.
    """

    equal: int = 0
    of: int = 0
    common: int = 0
    drift: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def gap(self) -> float:
        return max(self.gaps, default=0.0)

    def __str__(self) -> str:
        text = f"{self.equal}/{self.of} outputs equal, {self.common} tokens before the first differences"
        text += f", log-probabilities there within {self.drift:.3g}" if self.drift else ""
        return text + (f", largest gap at a first difference {self.gap:.3g}" if self.gaps else "")


def compare(ours: Ran, theirs: Ran, rounds: tuple[str, ...] = ()) -> Diff:
    """``rounds``: only these, by their names."""
    diff = Diff()
    for name in sorted(set(ours.said) & set(theirs.said)):
        if rounds and name.partition("-")[2] not in rounds:
            continue
        for a, b in zip(ours.said[name], theirs.said[name], strict=True):
            diff.of += 1
            at = next((i for i, (x, y) in enumerate(zip(a["ids"], b["ids"])) if x != y), None)
            same = min(len(a["ids"]), len(b["ids"])) if at is None else at
            diff.common += same
            for i in range(same if a["top"] and b["top"] else 0):
                token = str(a["ids"][i])
                if token in a["top"][i] and token in b["top"][i]:
                    diff.drift = max(diff.drift, abs(a["top"][i][token] - b["top"][i][token]))
            if at is None:
                diff.equal += len(a["ids"]) == len(b["ids"])
            else:
                top = b["top"][at] if b["top"] else {}
                mine, own = top.get(str(a["ids"][at])), top.get(str(b["ids"][at]))
                diff.gaps.append(float("inf") if mine is None or own is None else own - mine)
    return diff
