"""What Triton's compiler makes of the kernels of 8-bit floats, for GPUs that are not here; JSON.

Run as a script, in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest import mock

import offline  # beside this file
import torch
from triton.compiler import CompilationError

from mpq_fx.formats import FORMATS
from mpq_fx.kernels.linear import triton_float8
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_linear import Call
from mpq_fx.kernels.quantize import triton as triton_quantize
from mpq_fx.kernels.tile import Machine

N, K = 4096, 4096
ROW, TENSOR = FORMATS["fp8_e4m3"], FORMATS["fp8_e4m3_tensor"]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(m: int, epilogue: Epilogue, machine: Machine) -> None:
    """As on `machine`, whose tile and way to sum are chosen at launch."""
    packed = meta(N, K, dtype=ROW.dtype), meta(N)
    call = Call(meta(m, K, dtype=ROW.dtype), meta(m), None, packed, ROW, ROW, N, epilogue)
    with mock.patch.object(triton_float8, "machine", return_value=machine):
        triton_float8.launch(call)


def everything(m: int) -> Epilogue:
    """A bias, a residual, an activation, and codes for the next site."""
    scale, zero = meta(), meta(dtype=torch.int32)
    added = meta(m, N, dtype=torch.bfloat16), None, None
    return Epilogue(torch.bfloat16, meta(N), *added, "gelu", TENSOR, scale, zero)


def quantize(machine: Machine) -> None:
    """Both ways, by their own kernels and not as traced by torch."""
    x, scale, zero = meta(64, K, dtype=torch.bfloat16), meta(), meta(dtype=torch.int32)
    with mock.patch.object(triton_quantize, "wrap_triton", lambda kernel: kernel):
        triton_quantize.launch_dynamic(x, None, ROW, "none")
        triton_quantize.launch_static(x, None, scale, zero, TENSOR, "none")


BIAS = Epilogue(torch.bfloat16, meta(N))
CASES = {
    **{f"linear {m}": partial(linear, m, BIAS) for m in (16, 64, 4096)},
    "linear 4096, everything": partial(linear, 4096, everything(4096)),
    "quantize": quantize,
}


def done(job: offline.Job) -> dict[str, Any]:
    """Facts of a launch, or what the compiler says to it."""
    try:
        return offline.done(job)
    except CompilationError as error:
        return {"case": job[0], "architecture": job[1].architecture, "error": str(error)}


def done_by_number(number: int) -> dict[str, Any]:
    return done(JOBS[number])


JOBS: list[offline.Job] = []  # of this process and those it forks

if __name__ == "__main__":
    machines = [at for at in offline.MACHINES if at.architecture != "sm_86"]  # as on sm_80
    JOBS.extend(offline.jobs_of(CASES, machines))
    with get_context("fork").Pool(2) as pool:
        json.dump(pool.map(done_by_number, range(len(JOBS)), chunksize=1), sys.stdout)
