"""What Triton's compiler makes of the kernels on each architecture: facts of the machine code."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.offline import MACHINES

pytestmark = pytest.mark.timeout(600)
SHARED = {machine.architecture: machine.shared for machine in MACHINES}
FLOAT, INT8 = r"mma\.sync.*(f16|bf16)", r"mma\.sync.*m16n8k32.*s32\.s8\.s8"
# What multiplies tiles of at least 64 rows: tcgen05 has no integers.
LARGE = {
    "weight_only_linear": {
        "sm_90": r"wgmma\.mma_async.*f32\.(f16|bf16)",
        "sm_100": r"tcgen05\.mma.*kind::f16",
    },
    "int4_linear": {"sm_90": r"wgmma\.mma_async.*s32\.s8\.s8"},
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> list[dict]:
    """Of every launch, compiled in one process that has a compiler in place of the interpreter."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first process that gets here does it for all
        folder = folder.parent
    found = folder / "offline.json"
    with (folder / "offline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(compile_all(folder / "triton"))
    return json.loads(found.read_text())


def compile_all(cache: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("offline.py"))],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def linears(facts: list[dict]) -> Iterator[tuple[dict, str, str, str]]:
    """(fact, kernel, formats, rows) of the linears themselves."""
    for fact in facts:
        if "linear" in fact["case"] and fact["kernel"] != "reduce_kernel":
            kernel, formats, rows, _ = fact["case"].split()
            yield fact, kernel, formats, rows


def has(fact: dict, pattern: str) -> bool:
    return any(re.search(pattern, name) for name in fact["ptx"])


def test_every_kernel_is_compiled_for_every_kind_of_tensor_core(facts):
    found = {(fact["kernel"], fact["architecture"]) for fact in facts}
    for kernel in (
        "gemv_kernel",
        "gemm_kernel",
        "int4_kernel",
        "reduce_kernel",
        "embedding_kernel",
    ):
        assert {(kernel, name) for name in ("sm_80", "sm_90", "sm_100")} <= found
    assert {name for kernel, name in found if kernel == "gemm_kernel"} == set(SHARED)
    assert {name for kernel, name in found if kernel == "int4_kernel"} == set(SHARED)


def test_nothing_spills_and_everything_fits(facts):
    for fact in facts:
        assert fact["spilled"] == 0, fact
        assert fact["registers"] <= 255, fact
        assert fact["shared"] <= SHARED[fact["architecture"]], fact


def test_tensor_cores_multiply_where_there_are_rows_for_them(facts):
    for fact, kernel, _, rows in linears(facts):
        if rows in ("1", "2", "4") and kernel == "weight_only_linear":
            assert not has(fact, "mma"), fact
            continue
        usual = FLOAT if kernel == "weight_only_linear" else INT8
        large = LARGE[kernel].get(fact["architecture"], usual)
        assert has(fact, large if rows in ("64", "more") else usual), fact


def test_weights_are_read_by_sixteen_bytes(facts):
    for fact in facts:
        if "ragged" in fact["case"]:  # a row of such an x begins anywhere
            continue
        loads = [name for name in fact["instructions"] if name.startswith(("LDG.", "LDGSTS."))]
        if "int4_g32*float16 more" in fact["case"]:  # 32 codes of a row are all that a step has
            assert any(name.endswith(".64") for name in loads), fact
        assert any(name.endswith("128") for name in loads), fact


def test_codes_are_widened_without_conversions(facts):
    for fact, kernel, formats, rows in linears(facts):
        if formats.startswith(("int4*", "int8*", "fp8")) and rows != "more":
            slow = r"I2F\.(S8|U8|S16)|F2FP?\..*E4M3"
            assert not any(re.match(slow, name) for name in fact["instructions"]), fact
        if kernel == "int4_linear" and rows == "16" and formats.endswith("*int8"):
            assert "PRMT" not in fact["instructions"], "bytes of a word are codes as they are"


def test_offsets_of_rows_have_64_bits(facts):
    for fact, kernel, _, _ in linears(facts):
        assert has(fact, r"mul\.wide|mad\.wide|mul\.lo\.s64|mad\.lo\.s64"), (kernel, fact)


def test_an_index_out_of_range_is_seen_on_the_device(facts):
    checked = [fact for fact in facts if fact["kernel"] == "embedding_kernel"]
    assert len(checked) == 6
    for fact in checked:
        assert has(fact, r"^call\.uni|^trap"), fact
