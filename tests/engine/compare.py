"""Whether an engine said what the stock backend says."""

from __future__ import annotations

import warnings
from itertools import zip_longest

NEAR_TIE = 1e-4  # log-probability: the order of float32 sums may decide between tokens as close as this


def differences(said: list[dict], stock: list[dict]) -> tuple[list[int], int]:
    """Indices of outputs that differ, and how many differ only in a near-tie of the stock backend."""
    wrong, near = [], 0
    assert len(said) == len(stock)
    for i, (ours, theirs) in enumerate(zip(said, stock, strict=True)):
        for at, (a, b) in enumerate(zip_longest(ours["ids"], theirs["ids"])):
            if a != b:
                top = theirs["top"][at] if b is not None and at < len(theirs["top"]) else {}
                if str(a) in top and abs(top[str(a)] - top[str(b)]) <= NEAR_TIE:
                    near += 1
                else:
                    wrong.append(i)
                break
    return wrong, near


def check(said: dict[str, list[dict]], stock: dict[str, list[dict]]) -> None:
    for name, outputs in said.items():
        kind = name.split("-", 1)[1]
        if outputs is None:  # flush
            continue
        wrong, near = differences(outputs, stock[kind])
        assert not wrong, f"round {name}: outputs {wrong} differ from the stock backend's"
        if near:
            warnings.warn(f"round {name}: {near} outputs differ in a near-tie", stacklevel=2)
