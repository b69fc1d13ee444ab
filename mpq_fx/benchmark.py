"""mpq bench: hand over to bench/compare.py of the repository checkout.

The benchmarks start a process per variant and import the peers; neither belongs into the package.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from mpq_fx.errors import UnsupportedError

SCRIPT = Path(__file__).parents[1] / "bench" / "compare.py"


def main(model: str | None, batch: int, variants: str | None, as_json: bool) -> None:
    """Time one model (None: all) in every variant, or in those named; print a table or JSON."""
    if not SCRIPT.is_file():
        raise UnsupportedError(
            "the benchmarks are part of the repository, not of the installed package",
            fix="in a checkout of mpq-fx: make bench ARGS=bert-base",
        )
    if find_spec("transformers") is None:
        raise UnsupportedError(
            "the benchmarks build their models with transformers, which is not installed",
            fix="pip install --editable '.[bench]'",
        )
    command = [sys.executable, str(SCRIPT), "--batch", str(batch)]
    command += [model] if model else []
    command += ["--variants", variants] if variants else []
    command += ["--json"] if as_json else []
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
