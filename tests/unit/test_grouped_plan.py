"""One compiled call makes the plan that its stages make one by one, whatever stood in numba's cache."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import policies, radix_rows, tree_of

from packinfer_sgl.kernels import cpu_attention
from packinfer_sgl.planning import grouped_plan as grouped_plan_module
from packinfer_sgl.planning import items
from packinfer_sgl.planning.batch import causal
from packinfer_sgl.planning.costs import AttentionShape
from packinfer_sgl.planning.grouped_plan import grouped_plan
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.items import make_plan, sources
from packinfer_sgl.planning.plan import ARRAYS, Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import FIELDS, PrefixTree
from packinfer_sgl.planning.profiles import H200

SHAPE = AttentionShape(4, 2, 64, 2)
# small batches have groups where results cost little
COSTS = [H200.decode_cost, replace(H200.decode_cost, item_us=1e-4, partial_us=1e-4, least_saving=1.2)]
COSTS += [replace(cost.without_partials(), item_us=0, least_saving=1.0) for cost in COSTS[1:]]


def same(a: Plan | PrefixTree, b: Plan | PrefixTree, names: tuple[str, ...]) -> None:
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and np.array_equal(x, y), name
        else:
            assert x == y, name


PLAN = tuple(f.name for f in fields(Plan))


@given(st.data(), policies(), st.sampled_from(COSTS), st.sampled_from(["multi", "single", "off"]), st.booleans())
def test_equals_its_stages(data: st.DataObject, policy: TilePolicy, cost, mode: str, once: bool) -> None:
    rows = data.draw(radix_rows(min_own=1))
    lens = np.array([len(row) for row in rows], np.int32)
    q_lens = visible = saving = None
    if data.draw(st.booleans()):
        q_lens = np.array([data.draw(st.integers(1, len(row))) for row in rows], np.int32)
        visible = causal(q_lens, lens) if data.draw(st.booleans()) else None
    elif data.draw(st.booleans()):
        saving = lens
    room = 3 if q_lens is None else 0
    tree = tree_of(rows, (lens - 1).tolist())
    dearer = data.draw(st.sampled_from([None, 0.001, 1e9]))
    n_queries = len(rows) if q_lens is None else int(q_lens.sum())
    kept, plan, saves_little = grouped_plan(
        tree, lens, SHAPE, cost, policy, mode=mode, q_lens=q_lens, n_queries=n_queries, saving_lens=saving,
        partials_us=dearer, visible=visible, room_tokens=room, once=once, unique_tokens=None, needs_groups=False,
    )  # fmt: skip
    right = prune(tree, SHAPE, cost, mode, q_lens, saving, dearer)
    indptr = None if q_lens is None else np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    expected = make_plan(
        right, lens, policy, kv_tokens_unique=tree.unique_tokens(lens), qo_indptr=indptr, visible=visible,
        room_tokens=room, listed_once=tree if once else None,
    )  # fmt: skip
    same(kept, right, FIELDS)
    assert plan is not None
    same(plan, expected, PLAN)
    same(plan, expected, ("block", "header", "merged", "n_partials"))
    for name in set(ARRAYS) & set(PLAN):  # its block as it is made of the arrays
        assert np.shares_memory(getattr(plan, name), plan.block) or not getattr(plan, name).size
    least = prune(tree, SHAPE, cost, mode, q_lens, None, dearer)
    assert saves_little == (saving is not None and right.n_nodes < least.n_nodes and right.n_nodes == 0)


def test_no_plan_where_groups_are_needed() -> None:
    some, none = (tree_of([[1, 2, 3, i] for i in range(4)], [shared] * 4) for shared in (3, 0))
    more = {"q_lens": None, "n_queries": 4, "saving_lens": None, "partials_us": None, "visible": None, "room_tokens": 0}
    for tree, mode, has in ((some, "multi", True), (some, "off", False), (none, "multi", False)):
        plan = grouped_plan(
            tree, np.full(4, 4, np.int32), SHAPE, COSTS[-1], TilePolicy((4, 1), 8), mode=mode, once=False,
            unique_tokens=None, needs_groups=True, **more,  # type: ignore[arg-type]
        )[1]  # fmt: skip
        assert (plan is not None) is has


@pytest.mark.parametrize(
    ("module", "name", "below"), [(items, "plan_block", ()), (grouped_plan_module, "_grouped_plan", items.STAGES)]
)
def test_the_cache_knows_the_files_of_all_stages(module, name, below) -> None:
    compiled = getattr(module, name)
    called = {name for name in compiled.py_func.__code__.co_names if hasattr(getattr(module, name, None), "py_func")}
    assert called == {stage.__name__ for stage in module.STAGES}
    (key,) = (cell.cell_contents for cell in compiled.py_func.__closure__)
    assert key == sources((*module.STAGES, *below))
    keys = [f._cache._index_key((), f.targetctx.codegen()) for f in map(module._compiled, "aab")]
    assert keys[0] == keys[1] != keys[2]  # what numba looks up in its cache


def test_sources_change_with_any_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, hashes = SimpleNamespace(__module__="some_stage"), set()
    monkeypatch.setitem(items.sys.modules, "some_stage", SimpleNamespace(__file__=str(tmp_path / "some_stage.py")))
    for text in ("a = 1", "a = 2"):
        (tmp_path / "some_stage.py").write_text(text)
        hashes.add(sources((*items.STAGES, stage)))
    assert len(hashes) == 2


def names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_what_takes_from_other_files_is_not_cached_by_itself() -> None:
    """numba would go on with what the other file had been; ``items`` and ``grouped_plan`` have those in their keys."""
    n_cached = 0
    for path in (*Path(items.__file__).parent.glob("*.py"), Path(cpu_attention.__file__)):
        tree = ast.parse(path.read_text()).body
        imports = (
            node for node in tree if isinstance(node, ast.ImportFrom) and node.module.startswith("packinfer_sgl")
        )
        foreign = {alias.name for node in imports for alias in node.names}
        for node in tree:
            if isinstance(node, ast.Assign) and names(node.value) & foreign:
                foreign |= {name for target in node.targets for name in names(target)}
        functions = (node for node in tree if isinstance(node, ast.FunctionDef))
        compiled = [node for node in functions if any("njit" in names(by) for by in node.decorator_list)]
        if any("cache=True" in ast.unparse(by) for node in compiled for by in node.decorator_list):
            n_cached += 1
            assert [(node.name, names(node) & foreign) for node in compiled if names(node) & foreign] == [], path.name
    assert n_cached >= 6
