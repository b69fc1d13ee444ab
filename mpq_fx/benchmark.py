"""mpq bench: hand over to bench/compare.py of the repository checkout, or to its bench/gpu.py.

The benchmarks start a process per variant and import the peers; neither belongs into the package.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from mpq_fx.errors import UnsupportedError

FOLDER = Path(__file__).parents[1] / "bench"
GPU = "gpu"  # in place of a model: the kernels by themselves


def main(model: str | None, batch: int, variants: str | None, as_json: bool) -> None:
    """Time one model (None: all) in every variant, or in those named; print a table or JSON."""
    if not FOLDER.is_dir():
        raise UnsupportedError(
            "the benchmarks are part of the repository, not of the installed package",
            fix="in a checkout of mpq-fx: make bench ARGS=bert-base",
        )
    if model == GPU:
        run([str(FOLDER / "gpu.py")], as_json)
        return
    if find_spec("transformers") is None:
        raise UnsupportedError(
            "the benchmarks build their models with transformers, which is not installed",
            fix="pip install --editable '.[bench]'",
        )
    named = [model] if model else []
    chosen = ["--variants", variants] if variants else []
    run([str(FOLDER / "compare.py"), "--batch", str(batch), *named, *chosen], as_json)


def run(script: list[str], as_json: bool) -> None:
    """A script with its arguments; what it ends with, this process ends with."""
    command = [sys.executable, *script, *(["--json"] if as_json else [])]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
