"""cpu.json: machine facts, and the cells of the table that were measured so far.

{"machine": …, "cells": {model: {batch: {variant: Row}}}, "overhead": …, "tuning": …}
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mpq_fx.passes.lower.cpu import cpuinfo, processor

FILE = Path(__file__).parents[1] / "docs" / "benchmarks" / "cpu.json"
PACKAGES = (
    "mpq-fx",
    "torch",
    "torchao",
    "onnxruntime",
    "openvino",
    "nncf",
    "transformers",
)


@dataclass(frozen=True)
class Row:
    """One variant of one cell; a row without times says why in `reason`.

    `base_ms` is the best Inductor variant measured in the same run, by turns with this one.
    """

    ms: float | None = None
    low: float | None = None  # 10 % of the calls are faster
    high: float | None = None  # 10 % are slower
    error: float | None = None
    base_ms: float | None = None
    prepare_s: float | None = None
    detail: str = ""
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Time as a share of the best Inductor variant's."""
        return self.ms / self.base_ms if self.ms and self.base_ms else None


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that every script has which measures."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--save", action="store_true", help="merge into docs/benchmarks/cpu.json")
    return made


def machine(threads: int) -> dict[str, Any]:
    """What a time depends on, and the versions of everything that was compared."""
    import torch

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "extensions": _extensions(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def load(path: Path = FILE) -> dict[str, Any]:
    """The file, or an empty one."""
    if path.exists():
        return json.loads(path.read_text())
    return {"machine": {}, "cells": {}, "overhead": {}, "tuning": {}}


def rows(results: Mapping[str, Any], model: str, batch: int) -> dict[str, Row]:
    """{variant: Row} of one cell, as far as it was measured."""
    found = results["cells"].get(model, {}).get(str(batch), {})
    return {name: Row(**values) for name, values in found.items()}


def add_rows(
    model: str, batch: int, new: Mapping[str, Row], *, threads: int, path: Path = FILE
) -> None:
    """Merge the rows of one run; a row that was measured before is replaced."""
    results = _opened(threads, path)
    cell = results["cells"].setdefault(model, {}).setdefault(str(batch), {})
    cell.update({name: asdict(row) for name, row in new.items()})
    _write(results, path)


def add_section(name: str, values: Mapping[str, Any], *, threads: int, path: Path = FILE) -> None:
    """Replace what overhead.py or tuning.py found."""
    results = _opened(threads, path)
    results[name] = dict(values)
    _write(results, path)


def check_machine(threads: int, path: Path = FILE) -> dict[str, Any]:
    """The facts of this machine; SystemExit if the file was measured on another one."""
    known, here = load(path)["machine"], machine(threads)
    changed = [fact for fact in here if known and known.get(fact) != here[fact]]
    if changed:
        raise SystemExit(
            f"{path.name} was measured with another {', '.join(changed)}: "
            f"{[known.get(fact) for fact in changed]}, here {[here[fact] for fact in changed]}\n"
            f"  at   {path}\n"
            "  fix  move that file away, and measure everything on this machine"
        )
    return here


def _opened(threads: int, path: Path) -> dict[str, Any]:
    here = check_machine(threads, path)
    return {**load(path), "machine": {**here, "date": datetime.date.today().isoformat()}}


def _write(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def _extensions() -> list[str]:
    """The instructions that low precision is about, as far as this CPU has them."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    flags = cpuinfo().get("flags", "").split()
    return [name for name in wanted if name in flags]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
