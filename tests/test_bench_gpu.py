"""bench/gpu.py: wrong results end it, the page says what was measured, no GPU is said plainly."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mpq_fx.cli import main
from mpq_fx.passes.lower import triton
from mpq_fx.passes.lower.triton_device import DEVICES

BENCH = Path(__file__).parents[1] / "bench"
AT = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(bool(triton.unavailable()), reason=triton.unavailable())


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def gpu(bench, monkeypatch):
    module = bench("gpu")
    monkeypatch.setattr(module, "ROUNDS", 1)
    return module


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def test_each_kernel_is_compared_with_the_reference_and_stands_beside_what_torch_has(gpu):
    layer = gpu.Layer("tiny", "out", 48, 40)
    timed, left_out = gpu.compare(layer, 18, DEVICES["h100"], AT, seconds, packages=[])
    assert not left_out
    ours = [each for each in timed if each.limit]
    assert {each.variant for each in ours} >= {"int8/dynamic", "fp8_e4m3/dynamic", "int4*bfloat16"}
    assert all(each.error <= each.limit for each in ours)
    assert {"torch bfloat16", "torch._int_mm"} <= {each.variant for each in timed}
    codes = next(each for each in ours if each.variant == "int8/dynamic")
    assert codes.bytes == 18 * 40 + 48 * 40 + 48 * (4 + 4) + 2 * 18 * 48


def test_a_wrong_result_ends_the_run(gpu):
    layer = gpu.Layer("tiny", "out", 32, 32)
    floats = gpu.drawn(layer.n, layer.k, 4, AT)
    _, kernel, call, given = next(gpu.kernel_calls(layer, floats, DEVICES["h100"]))

    def broken(call):
        y = kernel.launch(call)
        y[-1, -1] *= 1.001
        return y

    assert gpu.checked(kernel, call, given, floats.checked)[0] < 1e-6
    with pytest.raises(SystemExit, match=r"is wrong: error .*at M, N, K = 4, 32, 32"):
        gpu.checked(replace(kernel, launch=broken), call, given, floats.checked)


def row(variant: str, microseconds: float, kernel: str = "k", **given) -> dict:
    about = {"model": "m", "layer": "up", "n": 4096, "k": 4096, "rows": 1, "bytes": 8e6}
    return {**about, "variant": variant, "microseconds": microseconds, "kernel": kernel, **given}


def test_the_page_tells_what_reaches_its_bar_and_what_is_least(bench):
    timed = [
        row("torch bfloat16", 20.0, kernel=""),
        row("torch._int_mm", 9.0, kernel=""),
        row("int8/dynamic", 10.0),
        row("int4*bfloat16", 5.0),
        row("torch bfloat16", 20.0, kernel="", rows=64),
        row("int4*bfloat16", 25.0, rows=64),
        row("int8", 4.0, model="quantize", rows=4096),
    ]
    facts = {"device": "a GPU", "architecture": "sm_90", "date": "today", "cuda": "13"}
    page = bench("gpu_table").page(
        {
            **facts,
            "versions": {"torch": "2"},
            "copy_gb_per_s": 2000.0,
            "timed": timed,
            "left_out": [],
        }
    )
    assert "rows and quantizations: 2 of 3 cases reach 0.8; the least is 0.40 (m up, 1 rows" in page
    assert "torch._int_mm: 1 of 1 cases reach 0.9; the least is 0.90" in page
    assert "4096: 1 of 1 cases reach 2.5; the least is 4.00" in page
    assert "torch._scaled_mm: no case" in page
    assert "bfloat16: 1 of 2 cases reach 1; the least is 0.80 (m up, 64 rows)" in page
    assert "| up | 4096 × 4096 | 1 | 20.0 | 9.0 | 10.0 | **5.0** |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(gpu):
    with pytest.raises(SystemExit, match="nothing to measure: PyTorch sees no NVIDIA GPU"):
        gpu.device_at_hand()
    assert CliRunner().invoke(main, ["bench", "gpu", "--json"]).exit_code == 1
