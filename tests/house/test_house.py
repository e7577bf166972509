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
    "planning": 1,
    "kernels": 2,
    "runners": 3, "paged": 3,
    "serving": 4, "cpu_platform": 4, "__init__": 4,
    "plugin": 5, "cli": 5, "tools": 5, "patches": 5,
}  # fmt: skip
# Folders that a folder of its own floor may import.
NEIGHBOURS = {"paged": {"runners"}}
# Within a folder a room imports those that stand before it. Folders that are not here are on the floors that touch
# SGLang, where rooms of one floor may import each other.
ORDER = {
    "planning": [
        "prefix_tree", "batch", "costs", "groups", "plan", "policy", "units", "schedule", "device_profile", "profiles",
        "cpu_profile", "query_tiles", "item_arrays", "items", "grouped_plan", "fitting", "planners", "audit",
        "prefix_hold",
    ],
    "kernels": [
        "copy_slots", "reference", "cpu_attention", "tiles", "columns", "slot_list_triton", "attention_triton", "merge",
        "hopper_common", "hopper_decode_fp8", "hopper_decode_tile", "attention_hopper_decode", "hopper_extend_pipeline",
        "hopper_extend_fp8", "hopper_extend_producer", "hopper_extend_consumer", "attention_hopper_extend",
        "device_plan",
    ],
    "runners": ["base", "cpu", "cuda", "slots", "arena"],
    "paged": ["checks", "graph_buffers", "kernels", "batch", "wrapper", "prefill_wrapper", "sink_wrapper"],
    "serving": [
        "metrics", "radix_paths", "batch_rows", "batch_reasons", "layers", "packed_path", "router", "build", "backend",
    ],
}  # fmt: skip
OPEN_FLOORS = {4, 5}
THIRD_PARTY = {
    0: set(),
    1: {"numpy", "numba", "torch"},  # torch for annotations only
    2: {"numpy", "numba", "torch", "triton"},
    3: {"numpy", "torch"},
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
    """What ``source`` may not import as ``room``: ``config``, or ``planning.plan`` in a folder."""
    top, _, name = room.partition(".")
    if top not in FLOORS:
        return [f"{room} has no floor: give it one in FLOORS of tests/house/test_house.py and in CONTRIBUTING.md"]
    if top in ORDER and name != "__init__" and name not in ORDER[top]:
        return [f"{room} has no place: give it one in ORDER of tests/house/test_house.py"]
    floor, faults = FLOORS[top], []
    for imported in sorted(imports(source, f"packinfer_sgl.{top}" if name else "packinfer_sgl")):
        first, *rest = imported.split(".")
        if first in ("kernels", "patches"):
            faults.append(f"{room} imports {imported}: write packinfer_sgl.{imported}")
        elif first == "packinfer_sgl" and not _may_use(top, name, rest):
            faults.append(f"{room} (floor {floor}) may not import {imported}")
        elif first not in {"packinfer_sgl", *sys.stdlib_module_names, *THIRD_PARTY.get(floor, {first})}:
            faults.append(f"{room} (floor {floor}) may not import {imported}")
    return faults


def _may_use(top: str, name: str, path: list[str]) -> bool:
    """Whether a room may import ``packinfer_sgl.<path>``."""
    other = path[0] if path and path[0] in FLOORS else "__init__"
    if top == other and top in ORDER:
        order = ORDER[top]
        return len(path) > 1 and path[1] in order and order.index(path[1]) < order.index(name)
    if FLOORS[top] == FLOORS[other]:
        return FLOORS[top] in OPEN_FLOORS or other in NEIGHBOURS.get(top, ())
    return FLOORS[other] < FLOORS[top]


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
    if (lines := len(text.splitlines())) > MAX_LINES and not name.endswith((".svg", ".png")):
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
        ("planning.groups", "from packinfer_sgl.planning.plan import Plan"),
        ("planning.prefix_tree", "from . import groups"),
        ("planning.prefix_tree", "from .groups import prune"),
        ("planning.plan", "import triton"),
        ("planning.plan", "from packinfer_sgl import kernels"),
        ("planning.plan", "from packinfer_sgl import BatchDecodeWithPagedKVCacheWrapper"),
        ("planning.plan", "import packinfer_sgl"),
        ("kernels.merge", "import sglang"),
        ("kernels.copy_slots", "from packinfer_sgl.kernels import reference"),
        ("kernels.reference", "from .merge import merge_kernel"),
        ("kernels.merge", "from ..serving.router import Router"),
        ("runners.arena", "from packinfer_sgl.paged.wrapper import BatchDecodeWithPagedKVCacheWrapper"),
        ("paged.wrapper", "from sglang.srt.layers import radix_attention"),
        ("paged.batch", "from .wrapper import BatchDecodeWithPagedKVCacheWrapper"),
        ("paged.wrapper", "from packinfer_sgl.serving.batch_rows import BatchRows"),
        ("serving.backend", "from packinfer_sgl.plugin import register"),
        ("serving.metrics", "from packinfer_sgl.serving.router import Router"),
        ("serving.backend", "if TYPE_CHECKING:\n    from packinfer_sgl.patches.hook import Hook"),
        ("cli", "from kernels.reference import merge"),
        ("patches.hook", "import patches.flags"),
        ("helpers", ""),
        ("utils.strings", ""),
        ("planning.helpers", ""),
    ],
)
def test_a_forbidden_import_is_found(room: str, source: str) -> None:
    assert len(import_faults(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("config", "from __future__ import annotations\nimport json, os.path\nfrom dataclasses import dataclass"),
        ("planning.items", "import numpy as np\nfrom .plan import Plan\nfrom packinfer_sgl import __version__"),
        (
            "kernels.reference",
            "import torch\nfrom ..planning.plan import Plan\nfrom ..config import Config",
        ),
        ("paged.wrapper", "from packinfer_sgl.kernels import reference\nfrom packinfer_sgl.runners import arena"),
        (
            "serving.backend",
            "import sglang, packinfer_sgl\nfrom .layers import heads_of\nfrom ..paged import wrapper",
        ),
        ("__init__", "from packinfer_sgl.paged.wrapper import BatchDecodeWithPagedKVCacheWrapper"),
        ("patches.hold", "import sglang\nfrom . import hook\nfrom packinfer_sgl.plugin import register"),
        ("cli", "import rich\nfrom packinfer_sgl.tools import doctor, inspect_view"),
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
