"""Facts of the compiled kernels of 8-bit floats, per architecture, with no GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("offline_float8.py")
SHARED = {"sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
LINEARS = ("linear 16", "linear 64", "linear 4096", "linear 4096, everything")
E4M3 = ".e4m3.e4m3"
ON = pytest.mark.parametrize("architecture", SHARED)


@pytest.fixture(scope="module")
def facts() -> dict[tuple[str, str], list[dict]]:
    """(case, architecture) -> its kernels."""
    without = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=without
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[tuple[str, str], list[dict]] = {}
    for fact in json.loads(ran.stdout):
        found.setdefault((fact["case"], fact["architecture"]), []).append(fact)
    return found


def counted(fact: dict, *parts: str) -> int:
    """Instructions of PTX whose name has all of these parts."""
    return sum(n for name, n in fact["ptx"].items() if all(part in name for part in parts))


@pytest.mark.timeout(180)
@ON
@pytest.mark.parametrize("case", [*LINEARS, "quantize"])
def test_nothing_spills_and_everything_fits(facts, case, architecture):
    for fact in facts[case, architecture]:
        assert fact["spilled"] == 0
        assert fact["registers"] <= 255
        assert fact["shared"] <= SHARED[architecture]


@ON
@pytest.mark.parametrize("case", LINEARS)
def test_operands_come_sixteen_bytes_at_a_time(facts, case, architecture):
    (fact,) = facts[case, architecture]
    assert counted(fact, "cp.async.cg.shared.global") > 0
    assert counted(fact, "cp.async.ca.shared.global") == 0, "cg copies 16 bytes, ca fewer"


@pytest.mark.parametrize(
    ("architecture", "instruction"),
    [
        ("sm_89", ("mma.sync", "m16n8k32", E4M3)),
        ("sm_90", ("wgmma.mma_async", E4M3)),
        ("sm_100", ("tcgen05.mma", "f8f6f4")),
        ("sm_120", ("mma.sync", "m16n8k32", E4M3)),
    ],
)
@pytest.mark.parametrize("case", LINEARS[1:])
def test_tensor_cores_multiply_eight_bit_floats(facts, case, architecture, instruction):
    (fact,) = facts[case, architecture]
    products = sum(counted(fact, kind) for kind in ("mma.sync", "wgmma.mma", "tcgen05.mma"))
    assert 0 < counted(fact, *instruction) == products


@ON
def test_few_rows_are_multiplied_in_eight_bits_where_the_instruction_is_that_small(
    facts, architecture
):
    (fact,) = facts["linear 16", architecture]
    kind = E4M3 if architecture in ("sm_89", "sm_120") else ".f16.f16"
    assert 0 < counted(fact, "mma.sync", kind) == counted(fact, "mma.sync")


@ON
def test_sums_leave_a_tensor_core_that_keeps_few_bits_of_them(facts, architecture):
    (fact,) = facts["linear 4096", architecture]
    added = counted(fact, "add", "f32x2") * 2 + fact["ptx"].get("add.f32", 0)
    results = 128 * 128 // (8 * 32)  # of a thread
    assert added == (0 if architecture == "sm_100" else results)


@pytest.mark.parametrize("case", [*LINEARS, "quantize"])
def test_what_is_refused_on_an_a100_would_not_compile_there(facts, case):
    for fact in facts[case, "sm_80"]:
        assert "type fp8e4nv not supported in this architecture" in fact["error"]


@ON
def test_codes_are_rounded_without_flushing_small_numbers_to_zero(facts, architecture):
    kernels = facts["quantize", architecture]
    assert [fact["kernel"] for fact in kernels] == ["dynamic_kernel", "static_kernel"]
    for fact in kernels:
        assert counted(fact, "div.rn.f32") > 0, "as the specification divides"
        assert counted(fact, ".ftz") == 0
