"""The architecture of the house: who may import whom, how long a file may be, what may lie where."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A room imports from the floors below its own. `__init__` offers the wrappers to users; nobody below floor 4 needs it.
FLOORS = {
    "__version__": 0, "config": 0, "reasons": 0,
    "prefix_tree": 1, "groups": 1, "plan": 1, "pieces": 1, "cut": 1, "siblings": 1,
    "extend_costs": 1, "slot_list": 1, "fitting": 1, "audit": 1,
    "kernels": 2,
    "paged_cpu": 3, "paged_cuda": 3, "paged": 3, "wrapper": 3, "regroup": 3, "metrics": 3,
    "backend": 4, "layers": 4, "planner": 4, "cpu_decode": 4, "cuda_decode": 4, "cpu_extend": 4, "cuda_extend": 4,
    "cuda_verify": 4, "radix": 4, "cpu_platform": 4, "__init__": 4,
    "plugin": 5, "cli": 5, "tiny_model": 5, "show": 5, "doctor": 5, "patches": 5,
}  # fmt: skip
# Within a floor only these may be imported; on the floors that touch SGLang everybody may import everybody.
NEIGHBOURS = {
    "groups": {"prefix_tree"}, "plan": {"prefix_tree"}, "cut": {"prefix_tree", "plan", "pieces", "slot_list"},
    "audit": {"prefix_tree", "plan"}, "fitting": {"prefix_tree", "plan", "groups", "cut"},
    "extend_costs": {"prefix_tree", "plan", "groups"},
    "paged": {"paged_cpu", "paged_cuda"}, "wrapper": {"paged"}, "metrics": {"regroup"},
}  # fmt: skip
# the CUDA kernels are one thing in six files; the reference stays by itself
CUDA_KERNELS = {"merge", "packed", "packed_cuda", "packed_extend", "packed_hopper", "tiles"}
OPEN_FLOORS = {4, 5}
THIRD_PARTY = {
    0: set(),
    1: {"numpy", "numba"},
    2: {"numpy", "numba", "torch", "triton"},
    3: {"numpy", "torch", "triton", "prometheus_client"},
}
MAX_LINES = 400
MAX_PATCHES = 8
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(?:home|root|Users|work)/[\w.]")


def imports(source: str, package: str) -> set[str]:
    """Everything that ``source`` imports anywhere, as absolute dotted names (``from a import b`` gives ``a.b``)."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def import_faults(room: str, source: str) -> list[str]:
    """What ``source`` may not import as ``room``: ``plan``, or ``kernels.reference`` in the two top-level folders."""
    top = room.split(".")[0]
    if top not in FLOORS:
        return [f"{room} has no floor: give it one in FLOORS of tests/house/test_house.py and in CONTRIBUTING.md"]
    floor = FLOORS[top]
    faults = []
    for name in sorted(imports(source, "packinfer_sgl" if room == top else f"packinfer_sgl.{top}")):
        first, *rest = name.split(".")
        if first == "packinfer_sgl":
            other = rest[0] if rest and rest[0] in FLOORS else "__init__"
            allowed = FLOORS[other] < floor or (
                FLOORS[other] == floor and (floor in OPEN_FLOORS or other in NEIGHBOURS.get(top, ()))
            )
            if top == other == "kernels":
                allowed = room.rpartition(".")[2] in CUDA_KERNELS and len(rest) > 1 and rest[1] in CUDA_KERNELS
        elif first in ("kernels", "patches"):
            faults.append(f"{room} imports {name}: write packinfer_sgl.{name}")
            continue
        else:
            allowed = first in sys.stdlib_module_names or floor not in THIRD_PARTY or first in THIRD_PARTY[floor]
        if not allowed:
            faults.append(f"{room} (floor {floor}) may not import {name}")
    return faults


def rooms(root: Path) -> dict[str, Path]:
    found = {
        ".".join(path.relative_to(root / "packinfer_sgl").with_suffix("").parts): path
        for path in (root / "packinfer_sgl").rglob("*.py")
    }
    for folder in ("kernels", "patches"):
        found |= {f"{folder}.{path.stem}": path for path in (root / folder).rglob("*.py")}
    return found


def folder_faults(root: Path) -> list[str]:
    faults = [
        f"{folder}/__init__.py shadows the PyPI package or breaks editable installs: remove it"
        for folder in ("kernels", "patches")
        if (root / folder / "__init__.py").exists()
    ]
    if (patches := len(list((root / "patches").rglob("*.py")))) > MAX_PATCHES:
        faults.append(f"patches/ has {patches} files, at most {MAX_PATCHES} are allowed")
    return faults


def file_faults(name: str, text: str) -> list[str]:
    faults = []
    if Path(name).name == "uv.lock":
        faults.append(f"{name} must not be tracked")
    if (lines := len(text.splitlines())) > MAX_LINES and not name.endswith(".svg"):
        faults.append(f"{name} has {lines} lines, at most {MAX_LINES} are allowed")
    if found := MACHINE_PATH.search(text):
        faults.append(f"{name} names a path of one machine: {text[found.start() :].split()[0]}")
    return faults


def test_rooms_import_only_from_floors_below() -> None:
    assert [fault for room, path in rooms(ROOT).items() for fault in import_faults(room, path.read_text())] == []


def test_folders() -> None:
    assert folder_faults(ROOT) == []


def test_files() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    listed = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    present = [name for name in names if name and (ROOT / name).is_file()]
    assert "pyproject.toml" in present
    faults = [fault for name in present for fault in file_faults(name, (ROOT / name).read_text(errors="replace"))]
    assert faults == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("config", "import numpy"),
        ("config", "def f():\n    import torch.nn"),
        ("groups", "from packinfer_sgl.plan import Plan"),
        ("prefix_tree", "from . import groups"),
        ("prefix_tree", "from .groups import prune"),
        ("plan", "import triton"),
        ("plan", "from packinfer_sgl import kernels"),
        ("plan", "from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper"),
        ("plan", "import packinfer_sgl"),
        ("kernels.decode", "import sglang"),
        ("kernels.decode", "from packinfer_sgl.kernels import reference"),
        ("kernels.decode", "from .reference import merge"),
        ("kernels.decode", "from ..metrics import Totals"),
        ("wrapper", "from sglang.srt.layers import radix_attention"),
        ("wrapper", "from packinfer_sgl import metrics"),
        ("wrapper", "from packinfer_sgl.radix import paths"),
        ("backend", "from packinfer_sgl.plugin import register"),
        ("backend", "if TYPE_CHECKING:\n    from packinfer_sgl.patches.batch import current"),
        ("cli", "from kernels.reference import merge"),
        ("patches.batch", "import patches.flags"),
        ("helpers", ""),
        ("utils.strings", ""),
    ],
)
def test_a_forbidden_import_is_found(room: str, source: str) -> None:
    assert len(import_faults(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("config", "from __future__ import annotations\nimport json, os.path\nfrom dataclasses import dataclass"),
        ("cut", "import numpy as np\nfrom .plan import Plan\nfrom packinfer_sgl import prefix_tree, __version__"),
        ("kernels.reference", "import torch\nfrom packinfer_sgl.plan import Plan\nfrom ..config import Config"),
        ("wrapper", "from packinfer_sgl.kernels import reference\nfrom packinfer_sgl.plan import Plan"),
        ("backend", "import sglang, packinfer_sgl\nfrom .radix import paths\nfrom packinfer_sgl.wrapper import W"),
        ("__init__", "from packinfer_sgl.wrapper import BatchDecodeWithPagedKVCacheWrapper"),
        ("patches.batch", "import sglang\nfrom . import flags\nfrom packinfer_sgl.plugin import register"),
        ("cli", "import rich\nfrom packinfer_sgl import doctor, show"),
    ],
)
def test_an_allowed_import_is_allowed(room: str, source: str) -> None:
    assert import_faults(room, source) == []


def test_a_wrong_folder_is_found(tmp_path: Path) -> None:
    for folder in ("kernels", "patches", "packinfer_sgl/utils"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("kernels/decode.py", "packinfer_sgl/plan.py", "packinfer_sgl/utils/strings.py"):
        (tmp_path / path).touch()
    assert sorted(rooms(tmp_path)) == ["kernels.decode", "plan", "utils.strings"]
    for i in range(MAX_PATCHES):
        (tmp_path / "patches" / f"p{i}.py").touch()
    assert folder_faults(tmp_path) == []
    (tmp_path / "patches" / "one_more.py").touch()
    assert len(folder_faults(tmp_path)) == 1
    (tmp_path / "kernels" / "__init__.py").touch()
    assert len(folder_faults(tmp_path)) == 2
    (tmp_path / "patches" / "__init__.py").touch()
    assert len(folder_faults(tmp_path)) == 3


@pytest.mark.parametrize("place", ["home/me", "root/.cache", "Users/me", "work/checkout"])
def test_a_wrong_file_is_found(place: str) -> None:
    assert file_faults("README.md", f"see https://host/{place} and ~/{place} and $X/{place}\n" * MAX_LINES) == []
    assert len(file_faults("README.md", f'"/{place}"')) == 1
    assert len(file_faults("README.md", "\n" * (MAX_LINES + 1))) == 1
    assert len(file_faults("uv.lock", "")) == 1
