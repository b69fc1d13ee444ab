"""Facts of the compiled int8 linear and quantizations, per architecture, with no GPU at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("offline_int8.py")
SHARED = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}
LINEARS = ("linear 16", "linear 4096", "full linear 4096")
ON = pytest.mark.parametrize("architecture", SHARED)
Facts = dict[tuple[str, str], list[dict]]


def compiled(*arguments: str) -> Facts:
    """(case, architecture) -> its kernels."""
    without = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=without,
    )
    assert ran.returncode == 0, ran.stderr
    found: Facts = {}
    for fact in json.loads(ran.stdout):
        found.setdefault((fact["case"], fact["architecture"]), []).append(fact)
    return found


@pytest.fixture(scope="module")
def facts() -> Facts:
    return compiled()


def counted(fact: dict, *parts: str) -> int:
    """Instructions of PTX whose name has all of these parts."""
    return sum(n for name, n in fact["ptx"].items() if all(part in name for part in parts))


def assert_roomy(facts: Facts) -> None:
    """Nothing spills, and everything fits."""
    for (case, architecture), kernels in facts.items():
        for fact in kernels:
            assert fact["spilled"] == 0, (case, architecture, fact["kernel"])
            assert fact["registers"] <= 255
            assert fact["shared"] <= SHARED[architecture]


@pytest.mark.timeout(300)
def test_nothing_spills_and_everything_fits(facts):
    assert len(facts) == 5 * len(SHARED)
    assert_roomy(facts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_spills_in_any_other_tile():
    assert_roomy(compiled("others"))


@ON
@pytest.mark.parametrize("case", LINEARS)
def test_operands_come_sixteen_bytes_at_a_time(facts, case, architecture):
    (fact,) = facts[case, architecture]
    assert counted(fact, "cp.async.cg.shared.global") > 0
    assert counted(fact, "cp.async.ca.shared.global") == 0, "cg copies 16 bytes, ca fewer"


@ON
@pytest.mark.parametrize("case", LINEARS)
def test_tensor_cores_multiply_eight_bit_integers(facts, case, architecture):
    """By wgmma on sm_90, where there are rows enough; Triton has no tcgen05 of integers."""
    (fact,) = facts[case, architecture]
    products = sum(counted(fact, kind) for kind in ("mma.sync", "wgmma.mma", "tcgen05.mma"))
    is_wide = architecture == "sm_90" and case != "linear 16"
    kind = ("wgmma.mma_async", ".s32.s8.s8") if is_wide else ("mma.sync", "m16n8k32", ".s32.s8.s8")
    assert 0 < counted(fact, *kind) == products


@ON
def test_a_quantization_divides_and_rounds_as_the_specification_does(facts, architecture):
    kernels = facts["quantize 4096", architecture]
    names = [fact["kernel"] for fact in kernels]
    assert names == [*["dynamic_kernel"] * 3, "static_kernel", "norm_kernel"]
    for fact in kernels:
        assert counted(fact, "div.rn.f32") > 0
        rounds = fact["ptx"].get("add.f32", 0) + counted(fact, "add", "f32x2")
        assert rounds > 0, "the sum that rounds to a whole number was not folded away"


@ON
def test_packed_codes_are_stored_eight_bytes_at_a_time(facts, architecture):
    _, _, fact, *_ = facts["quantize 4096", architecture]
    assert counted(fact, "st.global.v2") > 0
    assert counted(fact, "st.global", ".b8") == 0


@ON
def test_a_row_is_read_once(facts, architecture):
    """64 rows of 4096 values of 16 bits: 4096 / (4 · 32) of them, 8 a load, in each thread."""
    fact, *_ = facts["quantize 4096", architecture]
    assert counted(fact, "ld.global", ".v4") == 4096 // (4 * 32) // 8
    assert counted(fact, "ld.global") == counted(fact, "ld.global", ".v4")


@ON
def test_a_relu_lets_nan_through(facts, architecture):
    """As torch's does.  A GPU's maximum of NaN and 0 is 0 unless told; the interpreter's is NaN."""
    (fact,) = facts["relu", architecture]
    assert counted(fact, "max.NaN.f32") > 0
