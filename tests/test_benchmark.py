"""`mpq bench` hands over to the script of the checkout, and says where that is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpq_fx import benchmark
from mpq_fx.errors import UnsupportedError

BENCH = Path(__file__).parents[1] / "bench"


def test_mpq_bench_hands_its_options_to_the_script(monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    benchmark.main("bert-base", 8, "mpq,eager", True)
    benchmark.main(None, 1, None, False)
    script = [sys.executable, str(BENCH / "compare.py")]
    assert commands == [
        [*script, "--batch", "8", "bert-base", "--variants", "mpq,eager", "--json"],
        [*script, "--batch", "1"],
    ]


def test_mpq_bench_without_a_checkout_says_where_to_find_the_benchmarks(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path / "bench")
    with pytest.raises(UnsupportedError, match="part of the repository") as caught:
        benchmark.main("bert-base", 1, None, False)
    assert "make bench" in caught.value.fix


def test_a_failure_of_the_script_is_the_exit_code():
    with pytest.raises(SystemExit) as caught:
        benchmark.main("no-such-model", 1, None, True)
    assert caught.value.code == 2


def test_gpu_in_place_of_a_model_times_the_kernels(monkeypatch):
    commands: list[list[str]] = []

    def run(command, check):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    benchmark.main("gpu", 1, None, True)
    assert commands == [[sys.executable, str(BENCH / "gpu.py"), "--json"]]
