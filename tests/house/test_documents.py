"""What documents and metadata say is what the code has: flags, hooks, dependencies, versions, where checks run."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from test_house import FLOORS, ROOT, imports, rooms

from packinfer_sgl.config import Config, flag

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"matplotlib"}  # imported where it is needed, and only there
LEFT_TO_SGLANG = {"torch", "triton"}  # their builds depend on the machine; SGLang requires one, and that the other


def table(path: str, first: str) -> list[list[str]]:
    """Cells of the table in ``path`` whose head begins with the cell ``first``, without code marks."""
    rows: list[list[str]] = []
    for line in (ROOT / path).read_text().splitlines():
        cells = [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
        if rows and not cells:
            break
        if rows or (cells and cells[0] == first):
            rows.append(cells)
    assert rows, f"{path} has no table that begins with {first}"
    return rows[2:]  # without head and rule


def test_flags_of_the_readme() -> None:
    defaults = {flag(f.name): str(f.default).lower() for f in dataclasses.fields(Config)}
    assert {row[0]: row[1] for row in table("README.md", "flag")} == defaults


def test_hooks_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt import platforms

    from packinfer_sgl import plugin
    from packinfer_sgl.cpu_platform import PackInferCpuPlatform
    from packinfer_sgl.patches import hold

    # one hook is for this platform only; SGLang makes it when it is first asked for, so that it must not be there
    # afterwards if it was not before
    monkeypatch.setitem(vars(platforms), "current_platform", object.__new__(PackInferCpuPlatform))
    said, file = set(), ""
    for row in table("patches/README.md", "file"):
        file = row[0] or file
        said.add((file, f"sglang.srt.{row[1]}", row[2]))
    hooks = [*plugin.hooks(), *hold.hooks()]
    done = {(f"{hook.function.__module__.rpartition('.')[2]}.py", hook.target, hook.type.value) for hook in hooks}
    assert said == done and len(hooks) == len(done)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    found = (re.match(r"[\w.-]+", text) for text in requirements if "extra ==" not in text)
    return {canonical(name[0]) for name in found if name}


def test_every_import_is_a_declared_dependency() -> None:
    names = {
        canonical(name.split(".")[0]) for path in rooms(ROOT).values() for name in imports(path.read_text(), "ours.x")
    }
    others = names - {canonical(name) for name in sys.stdlib_module_names} - {"ours", "packinfer-sgl"}
    assert others - LEFT_TO_SGLANG - EXTRAS == declared(PROJECT["project"]["dependencies"])
    assert EXTRAS == declared(PROJECT["project"]["optional-dependencies"]["bench"])
    assert "torch" in declared(requires("sglang") or []) and "triton" in declared(requires("torch") or [])


def test_every_package_is_in_the_wheel() -> None:
    folders = {f"packinfer_sgl.{name.rpartition('.')[0]}".rstrip(".") for name in rooms(ROOT)}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "scripts/env.sh", "scripts/demo.sh"])
def test_the_same_python_everywhere(path: str) -> None:
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    text = (ROOT / path).read_text()
    assert set(re.findall(r"Python\W{1,4}(3\.\d+)", text)) == {least}
    assert set(re.findall(r"version_info < \((\d+), (\d+)\)", text)) <= {tuple(least.split("."))}


def test_mypy_is_strict_on_the_floors_below_torchs_users() -> None:
    mypy = PROJECT["tool"]["mypy"]
    wanted = {name for name, floor in FLOORS.items() if floor <= 2 and name != "__version__"}
    assert mypy["strict"] is True
    assert {Path(name).stem for name in mypy["files"]} == wanted


def test_nobody_looks_anything_up_in_the_metrics() -> None:
    """STATS counts; whoever needs the arena or the hold's state is given it."""
    found = [
        f"{room}: STATS.{node.attr}"
        for room, path in rooms(ROOT).items() if not room.endswith("metrics")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "STATS"
        and node.attr in ("arena", "held")
    ]  # fmt: skip
    assert found == []


def test_no_listener_and_no_pickle() -> None:
    """SECURITY.md says so."""
    found = [
        f"{room}: {name}"
        for room, path in rooms(ROOT).items()
        for name in imports(path.read_text(), "ours.x")
        if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve", "socket", "http")
    ]
    loads = [room for room, path in rooms(ROOT).items() if re.search(r"torch\.load|allow_pickle", path.read_text())]
    assert found == loads == []


def test_the_workflow_runs_what_ci_runs() -> None:
    newest = re.search(r"^PACKINFER_SGLANG=(\S+)", (ROOT / "scripts/env.sh").read_text(), re.M)[1]
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    (command,) = [step["run"] for step in job["steps"] if "scripts/test.sh" in step.get("run", "")]
    runs = set()
    for cell in job["strategy"]["matrix"]["include"]:
        filled = re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda name, cell=cell: cell.get(name[1], ""), command)
        runs.add(filled.replace(f" --sglang {newest}", "").strip())
    assert runs == set(re.findall(r"^(bash scripts/test\.sh.*?) \|\|", (ROOT / ".ci/run").read_text(), re.M))


def test_a_bug_report_asks_for_the_doctor() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    for name in ("bug", "request"):
        fields = {field["attributes"]["label"]: field for field in forms[name]["body"]}
        assert fields["packinfer-sgl doctor --json"]["validations"] == {"required": True}
