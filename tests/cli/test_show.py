from __future__ import annotations

import io

from rich.console import Console

from packinfer_sgl.tools.inspect_view import ratio, view

STATE = {
    "base_backend": "torch_native",
    "packed_steps": 1234,
    "packed_extends": 56,
    "fallback_steps": {"extend": 7, "no_batch": 2},
    "rows": 9,
    "rows_grouped": 8,
    "kv_tokens_logical": 60000,
    "kv_tokens_unique": 15000,
    "kv_tokens_read": 20000,
    "plan_us_p50": 87.4,
    "private_tokens": 512,
    "arena": None,
    "held": None,
    "tree": [
        {"parent": -1, "rows": 8, "start": 0, "end": 2048},
        {"parent": 0, "rows": 4, "start": 2048, "end": 2148},
        {"parent": 0, "rows": 2, "start": 2048, "end": 2100},
    ],
}
IDLE = {
    "packed_steps": 0,
    "packed_extends": 0,
    "rows": 0,
    "rows_grouped": 0,
    "tree": [],
    "private_tokens": 0,
    "plan_us_p50": None,
}
NOTHING_READ = dict.fromkeys(("kv_tokens_logical", "kv_tokens_unique", "kv_tokens_read"), 0)


def drawn(state: dict) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(view(state))
    return console.file.getvalue().splitlines()


def test_tree_shows_rows_tokens_and_nesting():
    tree = drawn(STATE)[:5]
    assert tree[0].strip() == "last packed step: 9 requests, 8 requests in groups"
    expected = [
        "8 requests · tokens 0..2,048 · 2,048 read once",
        "4 requests · tokens 2,048..2,148 · 100 read once",
        "2 requests · tokens 2,048..2,100 · 52 read once",
        "outside the groups · 512 KV tokens, each read for one request",
    ]
    assert [line[line.index(text[0]) :].strip() for line, text in zip(tree[1:], expected)] == expected
    indent = [line.index(text[0]) for line, text in zip(tree[1:], expected)]
    assert indent[1] == indent[2] > indent[0] == indent[3]


def shows(state, *rows):
    """Each of ``rows`` (what, value) is a line of what is drawn, and no other line says it."""
    text = "\n".join(drawn(state))
    for what, value in rows:
        (line,) = [line for line in text.splitlines() if what in line]
        assert line.rstrip().endswith(value)


def test_totals():
    shows(
        STATE,
        ("packed decode steps", "1,234"),
        ("packed extend batches", "56"),
        ("batches on torch_native: extend", "7"),
        ("batches on torch_native: no_batch", "2"),
        ("KV tokens read in decode", "20,000"),
        ("a prefix-unaware kernel reads", "60,000 (3.00x)"),
        ("the least possible", "15,000 (0.75x)"),
        ("planning, median", "87 us"),
    )


ARENA = {
    "tokens": 4000, "used_tokens": 2148, "spans": 2, "copied_bytes": 30_500_000, "copies": 7, "hits": 90, "refused": 3,
    "replaced": 5, "shared_tokens_read": 200_000, "contiguous_tokens_read": 190_000,
}  # fmt: skip


def test_the_arena():
    shows(
        {**STATE, "arena": ARENA},
        ("shared KV tokens read in one piece", "95.0%"),
        ("the arena now", "2,148 of 4,000 tokens, 2 spans"),
        ("copied to the arena", "7 spans, 30.5 MB"),
        ("spans found there by new plans", "90"),
        ("copies without room; replaced", "3; 5"),
    )
    nothing = {**ARENA, "shared_tokens_read": 0, "contiguous_tokens_read": 0}
    assert "in one piece" in "\n".join(drawn({**STATE, "arena": nothing}))
    assert "arena" not in "\n".join(drawn(STATE))


def test_held_requests():
    shows(
        {**STATE, "held": {"requests": 7, "passes": 14, "prefix_tokens": 14_336}},
        ("held until others had computed their prefix", "7 requests"),
        ("prompt tokens that they found cached then", "14,336"),
    )
    for held in (None, {"requests": 0, "passes": 0, "prefix_tokens": 0, "reason": None}):
        assert "held" not in "\n".join(drawn({**STATE, "held": held}))


def test_before_the_first_step():
    text = "\n".join(drawn({**STATE, **IDLE, **NOTHING_READ, "fallback_steps": {}}))
    assert "0 requests, 0 requests in groups" in text
    assert "outside" not in text and "planning" not in text
    assert ratio(0, 0) == "-"
