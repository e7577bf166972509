"""What packinfer does in a running server, as tree, table and sentences: for ``packinfer-sgl inspect`` and the demo."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from packinfer_sgl.tools.explain import State, explain


def page(state: State) -> RenderableType:
    """``view``, and beneath it what ``packinfer-sgl explain`` says of an active state."""
    return Group(view(state), Text(), *(Text(f"- {sentence}") for sentence in explain(state)))


def view(state: State) -> RenderableType:
    return Group(group_tree(state), Text(), totals(state))


def group_tree(state: State) -> Tree:
    """The groups of the last packed step: each line is a span of KV that its requests read together."""
    groups, rows = state["tree"], state["rows"]
    root = Tree(f"last packed step: {_n(rows, 'request')}, {_n(state['rows_grouped'], 'request')} in groups")
    nodes: dict[int, Tree] = {-1: root}
    for i, group in enumerate(groups):  # a parent stands before its children
        tokens = group["end"] - group["start"]
        label = f"{_n(group['rows'], 'request')} · tokens {group['start']:,}..{group['end']:,} · {tokens:,} read once"
        nodes[i] = nodes[group["parent"]].add(label)
    if rows:
        root.add(f"outside the groups · {_n(state['private_tokens'], 'KV token')}, each read for one request")
    return root


def totals(state: State) -> Table:
    """Counters since the server started."""
    table = Table("since the start", "", show_edge=False)
    table.columns[1].justify = "right"
    table.add_row("packed decode steps", f"{state['packed_steps']:,}")
    table.add_row("packed extend batches", f"{state['packed_extends']:,}")
    for reason, steps in sorted(state["fallback_steps"].items()):
        table.add_row(f"batches on {state['base_backend']}: {reason}", f"{steps:,}")
    read, logical = state["kv_tokens_read"], state["kv_tokens_logical"]
    table.add_row("KV tokens read in decode", f"{read:,}")
    table.add_row("a prefix-unaware kernel reads", f"{logical:,} ({ratio(logical, read)})")
    table.add_row("the least possible", f"{state['kv_tokens_unique']:,} ({ratio(state['kv_tokens_unique'], read)})")
    if state["plan_us_p50"] is not None:
        table.add_row("planning, median", f"{state['plan_us_p50']:,.0f} us")
    if arena := state["arena"]:
        shared, contiguous = arena["shared_tokens_read"], arena["contiguous_tokens_read"]
        table.add_row("shared KV tokens read in one piece", f"{contiguous / shared:.1%}" if shared else "-")
        now = f"{arena['used_tokens']:,} of {arena['tokens']:,} tokens, {_n(arena['spans'], 'span')}"
        table.add_row("the arena now", now)
        table.add_row("copied to the arena", f"{_n(arena['copies'], 'span')}, {arena['copied_bytes'] / 1e6:,.1f} MB")
        table.add_row("spans found there by new plans", f"{arena['hits']:,}")
        table.add_row("copies without room; replaced", f"{arena['refused']:,}; {arena['replaced']:,}")
    if (held := state["held"]) and held["requests"]:
        table.add_row("held until others had computed their prefix", _n(held["requests"], "request"))
        table.add_row("prompt tokens that they found cached then", f"{held['prefix_tokens']:,}")
    return table


def ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base else "-"


def _n(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
