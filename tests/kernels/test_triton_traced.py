"""Inductor sees into a quantization: the kernel is in its graph, with what it writes to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("traced.py")


def test_the_kernels_themselves_are_in_the_graph_that_inductor_compiles():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "codes_ptr",
        "codes_ptr scale_ptr zero_ptr",
        "codes_ptr scale_ptr zero_ptr",
        "codes_ptr scale_ptr zero_ptr",
    ]
