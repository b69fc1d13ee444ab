"""What Triton's compiler makes of each kernel, for GPUs that are not here; prints JSON.

Run in a process of its own, without TRITON_INTERPRET.  An op is launched on tensors of the device
"meta", its launches are recorded instead of run, and each is compiled as the same call on a GPU
would be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mpq_fx.kernels.tile import Machine

LARGE, SMALL = 227 << 10, 99 << 10  # bytes of shared memory that a block may have
MACHINES = (
    Machine("sm_80", 108, 163 << 10),
    Machine("sm_86", 82, SMALL),
    Machine("sm_89", 128, SMALL),
    Machine("sm_90", 132, LARGE),
    Machine("sm_100", 148, LARGE),
    Machine("sm_120", 170, SMALL),
)
KINDS = ("sm_80", "sm_90", "sm_100")  # mma.sync, wgmma, tcgen05
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}
OPTIONS = ("num_warps", "num_stages", "debug", "sanitize_overflow")


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: tensors by their dtype, and everything else as it is."""

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """Facts of one launch on one architecture."""

    kernel: str
    registers: int
    spilled: int  # bytes of stack, which is where registers go when there are too few
    shared: int  # bytes
    instructions: Mapping[str, int]  # of the machine code
    ptx: Mapping[str, int]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches in the block, which do not happen."""
    launches: list[Launch] = []

    def with_grid(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
        def record(*args: Any, **named: Any) -> None:
            options = {key: named.pop(key) for key in OPTIONS if key in named}
            given = dict(zip(kernel.arg_names, args, strict=False)) | named
            launches.append(Launch(kernel, given, options))

        return record

    original = JITFunction.__getitem__
    JITFunction.__getitem__ = with_grid  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.__getitem__ = original  # type: ignore[method-assign]


def compiled(launch: Launch, architecture: int) -> Compiled:
    """As the just-in-time compiler would: sizes of 1 are constants, multiples of 16 are known."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        is_tensor = isinstance(value, torch.Tensor)
        is_constant = launch.kernel.params[index].is_constexpr or value is None
        is_constant = is_constant or (not is_tensor and value == 1)
        if is_constant:
            signature[name], constants[name] = "constexpr", value
        elif is_tensor:
            signature[name] = TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            attributes |= {(index,): [["tt.divisibility", 16]]} if value % 16 == 0 else {}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    built = triton.compile(source, target=target, options=dict(launch.options))
    return facts(launch.kernel.__name__, built)


def facts(name: str, built: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", "--dump-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", shown)}
    sass = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", shown)
    ptx = re.findall(r"^\s*(?:@%?!?\w+\s+)?([a-z][\w.:]*)", built.asm["ptx"], re.M)
    return Compiled(
        name,
        numbers["REG"],
        numbers["STACK"],
        built.metadata.shared,
        dict(Counter(sass)),
        dict(Counter(ptx)),
    )


Cases = Mapping[str, Callable[[Machine], object]]
Job = tuple[str, Machine, Launch]


def jobs_of(cases: Cases, machines: Sequence[Machine] = MACHINES) -> list[Job]:
    """Every launch of every case on every machine, but for those that were there before."""
    jobs: list[Job] = []
    seen = set()
    for name, call in cases.items():
        for machine in machines:
            with recorded() as launches:
                call(machine)
            for launch in launches:
                key = (machine, str(launch))
                jobs += [(name, machine, launch)] if key not in seen else []
                seen.add(key)
    return jobs


def done(job: Job) -> dict[str, Any]:
    name, machine, launch = job
    fact = compiled(launch, int(machine.architecture.removeprefix("sm_")))
    return {"case": name, "architecture": machine.architecture, **asdict(fact)}


def done_by_number(number: int) -> dict[str, Any]:
    return done(JOBS[number])


JOBS: list[Job] = []  # of this process and those it forks: a kernel cannot be sent to another one

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    from offline_cases import EVERYWHERE, ON_SOME

    some = [machine for machine in MACHINES if machine.architecture in KINDS]
    JOBS.extend([*jobs_of(EVERYWHERE, MACHINES), *jobs_of(ON_SOME, some)])
    with get_context("fork").Pool(2) as pool:
        json.dump(pool.map(done_by_number, range(len(JOBS)), chunksize=1), sys.stdout)
