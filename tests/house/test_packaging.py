"""The wheel and the checkout offer the same package, and neither hides the PyPI package ``kernels``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from packinfer_sgl import __version__

ROOT = Path(__file__).parents[2]
WHERE = """
import importlib, json, sys
print(json.dumps({name: importlib.import_module(name).__file__ for name in sys.argv[1:]}))
"""


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": str(path or "")}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts) for path in found if path.parts[0] not in ("kernels", "patches"))


def shipped() -> list[Path]:
    """What a source distribution must hold, relative to the checkout."""
    files = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE", "packinfer_sgl/py.typed")]
    for folder in ("packinfer_sgl", "kernels", "patches"):
        files += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]
    return [path.relative_to(ROOT) for path in files if path.exists()]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that building leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    for path in shipped():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    return copy


@pytest.fixture(scope="module")
def site(checkout: Path) -> Path:
    """Stands in for site-packages: the installed wheel beside a package ``kernels`` of somebody else."""
    offline = ("--quiet", "--no-deps", "--no-index")
    wheels, site = checkout.with_name("wheels"), checkout.with_name("site")
    run("-m", "pip", "wheel", *offline, "--no-build-isolation", "--wheel-dir", wheels, ".", cwd=checkout)
    run("-m", "pip", "install", *offline, "--target", site, *wheels.glob("*.whl"), cwd=wheels)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").touch()
    (site / "probe.py").write_text("import kernels\nprint(kernels.__file__)")
    return site


@pytest.fixture(params=["elsewhere", "checkout"])
def cwd(request: pytest.FixtureRequest, checkout: Path, tmp_path: Path) -> Path:
    return checkout if request.param == "checkout" else tmp_path


def test_wheel_holds_every_module(site: Path) -> None:
    for source, installed in (("packinfer_sgl", ""), ("kernels", "kernels"), ("patches", "patches")):
        assert modules(site / "packinfer_sgl" / installed) == modules(ROOT / source)


def test_wheel_metadata(site: Path) -> None:
    (metadata,) = importlib.metadata.distributions(name="packinfer-sgl", path=[str(site)])
    assert {(e.group, e.name, e.value) for e in metadata.entry_points} == {
        ("console_scripts", "packinfer-sgl", "packinfer_sgl.cli:main"),
        ("sglang.srt.plugins", "packinfer", "packinfer_sgl.plugin:register"),
        ("sglang.srt.platforms", "packinfer_cpu", "packinfer_sgl.cpu_platform:activate"),
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [r for r in metadata.requires or [] if "extra" not in r] == project["dependencies"]
    assert metadata.metadata["Requires-Python"] == project["requires-python"]


def test_wheel_holds_nothing_else(checkout: Path, site: Path) -> None:
    """But the package, its licence and what wheels are made of."""
    (wheel,) = checkout.with_name("wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = PurePosixPath("packinfer_sgl")
    package = {path if path.parts[0] == top.name else top / path for path in shipped() if len(path.parts) > 1}
    about = f"packinfer_sgl-{__version__}.dist-info"
    files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    assert sorted(names) == sorted([*(path.as_posix() for path in package), *(f"{about}/{name}" for name in files)])


def test_imports(cwd: Path, checkout: Path, site: Path) -> None:
    """From anywhere the wheel answers; in a checkout its own source does, kernels and patches included."""
    names = ["packinfer_sgl", "packinfer_sgl.kernels.reference", "packinfer_sgl.patches.hook"]
    found = json.loads(run("-c", WHERE, *names, cwd=cwd, path=site))
    base, home = (checkout, checkout) if cwd == checkout else (site, site / "packinfer_sgl")
    for name, path in found.items():
        folder = base / "packinfer_sgl" if name == "packinfer_sgl" else home / name.split(".")[1]
        assert Path(path).parent == folder


def test_the_other_kernels_package_is_not_hidden(cwd: Path, site: Path) -> None:
    assert run("-m", "probe", cwd=cwd, path=site).strip() == str(site / "kernels" / "__init__.py")


def test_the_other_kernels_package_is_not_taken_for_ours(cwd: Path, checkout: Path, site: Path) -> None:
    code = "import packinfer_sgl.kernels as k; print(*k.__path__, sep='\\n')"
    ours = checkout / "kernels" if cwd == checkout else site / "packinfer_sgl" / "kernels"
    assert run("-c", code, cwd=cwd, path=site).splitlines() == [str(ours)]


def test_source_distribution(checkout: Path, tmp_path: Path) -> None:
    run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=checkout)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if name.startswith("packinfer_sgl.egg-info"))}
    folders = {path.as_posix() for file in shipped() for path in file.parents} | {""}
    assert names - made - folders == {path.as_posix() for path in shipped()}


def test_the_release_says_the_same_everywhere() -> None:
    """Version and date in the package, the changelog and the citation; tested Pythons among the classifiers."""
    head = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [0"))
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert head == f"## [{__version__}] - {citation['date-released']}" and citation["version"] == __version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = project["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {least}" in project["classifiers"]
    assert citation["license"] == project["license"]
