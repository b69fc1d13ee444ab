"""mpq:: ops  ->  Triton kernels on an NVIDIA GPU, or in Triton's interpreter; the rest to Inductor

A target for one of three places: the GPU at hand, where milliseconds are measured; the interpreter
(TRITON_INTERPRET=1), which runs the same kernels on the CPU; another device by name, of which
milliseconds are a roofline.  There nothing is timed, and a plan says so.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.errors import UnsupportedError
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.graph import clone, is_weight, where
from mpq_fx.kernels.tile import Machine, machine
from mpq_fx.passes.lower.kernel import choose
from mpq_fx.passes.lower.reference import compile_eager
from mpq_fx.passes.lower.target import Compiled, Lowered, Target
from mpq_fx.passes.lower.triton_device import (
    ASSUMED,
    Device,
    device_called,
    device_named,
    roofline,
)

if TYPE_CHECKING:
    from mpq_fx.kernels.linear.triton_linear import LinearKernel, Shape

mpq = torch.ops.mpq
NAME = "triton"
BF16 = Choice("bfloat16", "bfloat16")
STATIC = Choice("int8", "uint8_tensor", "static")

CHOICES = {
    "linear": (
        BF16,
        STATIC,
        Choice("int8", "int8", "dynamic"),
        Choice("int8", "int8_tensor", "static"),
        Choice("int8", "int8_asym", "dynamic"),
        Choice("fp8_e4m3", "fp8_e4m3", "dynamic"),
        Choice("fp8_e4m3", "fp8_e4m3_tensor", "static"),
        Choice("int4_progressive", "int8", "dynamic"),
        Choice("int4", "int8", "dynamic"),
        Choice("int4", "int4_row", "dynamic"),
        Choice("int4", "int4", "dynamic"),
        Choice("int8", "bfloat16"),
        Choice("fp8_e4m3", "bfloat16"),
        Choice("int4", "bfloat16"),
        Choice("int4_g32", "bfloat16"),
        Choice("int4_asym", "bfloat16"),
    ),
    "conv": (BF16,),
    "embedding": (BF16, Choice("int8", "float32"), Choice("int4_g32", "float32")),
    "residual": (BF16, STATIC),
    "matmul": (BF16,),
    "attention": (BF16,),
    "grouped_matmul": (BF16,),
}
CODED = (
    mpq.linear.default,
    mpq.conv.default,
    mpq.embedding.default,
    mpq.quantize.default,
    mpq.quantize_dynamic.default,
)
RUN = "roofline, run in the interpreter"
LEAST = (8, 0)  # compute capability: int8 and bfloat16 in tensor cores
NO_TRITON = "the package triton is not installed: pip install triton"
NO_GPU = (
    'PyTorch sees no NVIDIA GPU; options={"device": "h100"} plans for one by its roofline, and '
    "with TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly"
)


def unavailable() -> str:
    if not has_triton():
        return NO_TRITON
    if is_interpreted():
        return ""
    if not torch.cuda.is_available():
        return NO_GPU
    if torch.version.hip:
        return "its kernels were never run on an AMD GPU"
    if torch.cuda.get_device_capability() < LEAST:
        return f"{torch.cuda.get_device_name()} is older than sm_80, which the kernels are for"
    return ""


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def is_interpreted() -> bool:
    """Was TRITON_INTERPRET set when the kernels were defined?"""
    if not has_triton():
        return False
    from mpq_fx.kernels.triton_math import INTERPRETED

    return bool(INTERPRETED.value)


def device_at_hand() -> Device | None:
    """The GPU here, with its datasheet if that is known; None in the interpreter."""
    if is_interpreted() or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    device = device_called(name) or Device(name, machine(torch.device("cuda")))
    return replace(device, machine=machine(torch.device("cuda")))


def on(name: str | None = None) -> Target:
    """The target on a device by name; with None, on the one at hand."""
    here = device_at_hand()
    if here is not None and name in (None, here.name):
        return _measuring(here)
    device = ASSUMED if name is None else device_named(name)
    target = replace(_predicting(device), unavailable=_unplannable if name else unavailable)
    if is_interpreted():
        return replace(target, lower=partial(lower, device), facts=partial(facts, device, RUN))
    return target


def _measuring(device: Device) -> Target:
    """On the GPU at hand."""
    from mpq_fx.passes.lower.triton_cost import measured, measured_conversion

    return replace(
        _predicting(device),
        measure=lambda site, choice: measured(site, choice, kernel_of(site, choice, device)),
        convert=measured_conversion,
        lower=partial(lower, device),
        compile=compile_inductor,
        facts=partial(facts, device, "measured"),
        is_timed=True,
        predicted="",
        tensors=("cuda",),
    )


def _predicting(device: Device) -> Target:
    """For a device that is not here: reference ops run, and kernels are chosen by name."""
    return Target(
        NAME,
        unavailable,
        CHOICES,
        partial(refuse, device),
        partial(roofline, device=device),
        partial(planned, device),
        compile_eager,
        convert=partial(_predicted_conversion, device),
        is_timed=False,
        predicted=f"a roofline of {device.name}",
        facts=partial(facts, device, "roofline"),
        on=on,
    )


def _predicted_conversion(
    device: Device, site: Site, before: Choice | None, after: Choice
) -> float:
    from mpq_fx.passes.lower.triton_cost import predicted_conversion

    return predicted_conversion(site, before, after, device)


def _unplannable() -> str:
    return "" if has_triton() else NO_TRITON


def facts(device: Device, latency: str) -> dict[str, Any]:
    """For a plan's provenance and for `mpq doctor`."""
    return {
        "device": device.name,
        "architecture": device.machine.architecture,
        "latency": latency,
        "triton": version("triton"),
    }


def refuse(device: Device, site: Site, choice: Choice) -> Iterator[str]:
    """Why a choice cannot run on a device."""
    if site.dtype not in ("float32", "bfloat16", "float16"):
        yield f"a site in {site.dtype} stays as it is"
    if choice not in CHOICES.get(site.op, ()):
        yield f"{NAME} has no kernel for {site.op} in {choice}"
    elif is_for_kernels(site, choice) and kernel_of(site, choice, device) is None:
        yield from nearest_refusals(shape_of_site(site, choice, device.machine))


def nearest_refusals(shape: Shape) -> list[str]:
    """Of the kernels that have least against a linear: what the others lack is no news."""
    found = {kernel.name: [*kernel.refuse(shape)] for kernel in linear_kernels()}
    least = min(map(len, found.values()))
    return [f"{name}: {'; '.join(own)}" for name, own in found.items() if len(own) == least]


def is_for_kernels(site: Site, choice: Choice) -> bool:
    """A linear of codes; one of plain floats is Inductor's."""
    return site.op == "linear" and format_named(choice.weight).scale is not None


def kernel_of(site: Site, choice: Choice, device: Device) -> LinearKernel | None:
    """The first kernel that does not refuse a linear."""
    if not is_for_kernels(site, choice):
        return None
    shape = shape_of_site(site, choice, device.machine)
    return next((k for k in linear_kernels() if not any(k.refuse(shape))), None)


def linear_kernels() -> tuple[LinearKernel, ...]:
    """Imported late: they need the package triton."""
    from mpq_fx.passes.lower.triton_kernels import LINEAR

    return LINEAR


def shape_of_site(site: Site, choice: Choice, at: Machine) -> Shape:
    """What kernels decide by, before there is a graph."""
    from mpq_fx.kernels.linear.triton_linear import Shape

    sizes, (n, k) = site.input_shape[:-1], site.weight_shape
    rows = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
    formats = format_named(choice.activation), format_named(choice.weight)
    return Shape(*formats, rows, n, k, at, choice.scaling)


def lower(device: Device, gm: GraphModule, mode: str) -> Lowered:
    """Every op on codes becomes a kernel; one that none takes is an error, not slow code."""
    from mpq_fx.passes.lower.triton_kernels import kernels

    lowered = choose(gm, kernels(device.machine))
    for node in gm.graph.nodes:
        if node.target in CODED and not is_weight(node):
            raise UnsupportedError(
                f"no kernel of {NAME} runs {node.target}: {'; '.join(reasons(node, device))}",
                at=where(node),
                fix="another format for this layer: formats={...}",
            )
    return lowered


def reasons(node: Node, device: Device) -> list[str]:
    """Why no kernel takes it, of the linear ones those that have least against it."""
    from mpq_fx.passes.lower.triton_kernels import kernels
    from mpq_fx.passes.lower.triton_linear import shape_of

    if node.target is mpq.linear.default:
        return nearest_refusals(shape_of(node, device.machine))
    able = {name: k for name, k in kernels(device.machine).items() if k.op is node.target}
    found = [f"{name}: {'; '.join(kernel.refuse(node))}" for name, kernel in able.items()]
    return found or ["it has none for this op"]


def planned(device: Device, gm: GraphModule, mode: str) -> Lowered:
    """The kernels that the device would run; the graph stays as it is, and runs anywhere."""
    return lower(device, clone(gm)[0], mode)


def compile_inductor(gm: GraphModule, example_inputs: Sequence[Any], mode: str) -> Compiled:
    """Inductor compiles what is around the kernels; it reads constants where they are."""
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad():
        run: Callable[..., Any] = compile_fx(gm, list(example_inputs))  # type: ignore[assignment]
    return Compiled(run)


TRITON = replace(_predicting(ASSUMED), tensors=("cuda",))  # what "auto" may take
