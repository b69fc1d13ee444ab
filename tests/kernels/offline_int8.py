"""What Triton's compiler makes of the int8 linear and of quantizations, for absent GPUs; JSON.

Run as a script, in a process of its own, without TRITON_INTERPRET; with the argument "others" it
compiles what is not the main tile of a kernel.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from multiprocessing import get_context
from unittest import mock

import offline  # beside this file
import torch

from mpq_fx.formats import FORMATS
from mpq_fx.kernels.linear import triton_int8
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_linear import Call
from mpq_fx.kernels.quantize import triton as triton_quantize
from mpq_fx.kernels.quantize import triton_norm
from mpq_fx.kernels.tile import Machine

N, K = 4096, 4096
DYNAMIC, STATIC = FORMATS["int8"], FORMATS["uint8_tensor"]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(m: int, machine: Machine, *, is_full: bool = False) -> None:
    """As on `machine`, which its tile is chosen for; full: every part of the kernel is in use."""
    fmt = STATIC if is_full else DYNAMIC
    packed = meta(N, K, dtype=torch.int8), meta(N), meta(N, dtype=torch.int32)
    zero = meta(1, dtype=torch.int32) if is_full else None
    scale = meta(1 if is_full else m)
    epilogue = everything(m) if is_full else Epilogue(torch.bfloat16, meta(N))
    call = Call(meta(m, K, dtype=fmt.dtype), scale, zero, packed, fmt, DYNAMIC, N, epilogue)
    with mock.patch.object(triton_int8, "machine", return_value=machine):
        triton_int8.launch(call)


def everything(m: int) -> Epilogue:
    """A bias, a residual, an activation, and codes for the next site."""
    added = meta(m, N, dtype=torch.bfloat16), None, None
    after = (STATIC, meta(), meta(dtype=torch.int32))
    return Epilogue(torch.bfloat16, meta(N), *added, "gelu", *after)


def quantize(k: int, machine: Machine) -> None:
    """Every kernel of its kind, by itself and not as traced by torch."""
    x, scale, zero = meta(64, k, dtype=torch.bfloat16), meta(), meta(dtype=torch.int32)
    found = meta(64, k, dtype=torch.int8), meta(64, 1), meta(64, 1, dtype=torch.int32)
    unwrapped = {"wrap_triton": lambda kernel: kernel}
    with (
        mock.patch.multiple(triton_quantize, **unwrapped),
        mock.patch.multiple(triton_norm, **unwrapped),
    ):
        triton_quantize.launch_dynamic(x, None, DYNAMIC, "none")
        triton_quantize.launch_dynamic(x, x, FORMATS["int8_g128"], "silu")
        triton_quantize.launch_dynamic(x, None, FORMATS["int4"], "none")
        triton_quantize.launch_static(x, None, scale, zero, STATIC, "gelu_tanh")
        triton_norm.launch(x, (x[0], x[0]), found, 1e-5, True, FORMATS["int8_asym"], False)


def rectify(machine: Machine) -> None:
    """A ReLU in a kernel."""
    x, scale, zero = meta(64, N), meta(), meta(dtype=torch.int32)
    with mock.patch.object(triton_quantize, "wrap_triton", lambda kernel: kernel):
        triton_quantize.launch_static(x, None, scale, zero, STATIC, "relu")


MAIN = {
    **{f"linear {m}": partial(linear, m) for m in (16, 4096)},
    "full linear 4096": partial(linear, 4096, is_full=True),
    "quantize 4096": partial(quantize, 4096),
    "relu": rectify,
}
OTHERS = {  # some minutes
    **{f"linear {m}": partial(linear, m) for m in (32, 64, 256)},
    **{f"full linear {m}": partial(linear, m, is_full=True) for m in (16, 32, 64, 256)},
    **{f"quantize {k}": partial(quantize, k) for k in (768, 16384)},
}
JOBS: list[offline.Job] = []  # of this process and those it forks


def done_by_number(number: int) -> dict[str, object]:
    return offline.done(JOBS[number])


if __name__ == "__main__":
    jobs = offline.jobs_of(OTHERS if "others" in sys.argv else MAIN)
    JOBS.extend(job for job in jobs if job[1].architecture != "sm_86")  # compiles like sm_89
    with get_context("fork").Pool(2) as pool:
        json.dump(pool.map(done_by_number, range(len(JOBS)), chunksize=1), sys.stdout)
