"""ms >= max(operations / peak, bytes / bandwidth): what a GPU can do by its datasheet, and the roof

Dense peaks with float32 (or int32) accumulation, without sparsity; the largest usual clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpq_fx.config import nearest
from mpq_fx.errors import ConfigError
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import FORMATS, Int, format_named
from mpq_fx.kernels.tile import Machine

KB = 1024
LAUNCH = 0.003  # ms from one kernel of a stream to the next
RESOLUTION = LAUNCH / 10  # ms that a roofline knows: no plan is worth an error for less


@dataclass(frozen=True)
class Device:
    """A GPU: what its tensor cores multiply, how fast, and how fast its memory is."""

    name: str  # as in the option `device`
    machine: Machine  # architecture, multiprocessors, bytes of shared memory of a block
    bandwidth: float = 0.0  # GB/s
    peak: Mapping[str, float] = field(default_factory=dict)  # 1e12 operations a second, by dtype


def peaks(
    float32: float, bfloat16: float, int8: float, float8: float | None = None
) -> dict[str, float]:
    """By the kind of tensor core; without float8 there is none."""
    found = {"float32": float32, "bfloat16": bfloat16, "int8": int8}
    return found if float8 is None else {**found, "float8": float8}


LARGE, SMALL = 227 * KB, 99 * KB  # shared memory that a block may have
# int8 on a B200: Triton has tcgen05 for floats only and multiplies integers by mma.sync, of which
# an A100's rate per processor and clock is assumed.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", Machine("sm_80", 108, 163 * KB), 2039.0, peaks(19.5, 312, 624)),
        Device("rtx3090", Machine("sm_86", 82, SMALL), 936.0, peaks(35.6, 71, 284)),
        Device("l4", Machine("sm_89", 58, SMALL), 300.0, peaks(30.3, 121, 242, 242)),
        Device("rtx4090", Machine("sm_89", 128, SMALL), 1008.0, peaks(82.6, 165, 660, 330)),
        Device("h100", Machine("sm_90", 132, LARGE), 3352.0, peaks(66.9, 989, 1979, 1979)),
        Device("h200", Machine("sm_90", 132, LARGE), 4800.0, peaks(66.9, 989, 1979, 1979)),
        Device("b200", Machine("sm_100", 148, LARGE), 8000.0, peaks(80.0, 2250, 1120, 4500)),
        Device("rtx5090", Machine("sm_120", 170, SMALL), 1792.0, peaks(104.8, 209, 838, 419)),
    )
}
ASSUMED = DEVICES["h100"]  # where kernels run in the interpreter and no device is named


def device_named(name: str) -> Device:
    if name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}", fix=nearest(name, list(DEVICES)))
    return DEVICES[name]


def device_called(words: str) -> Device | None:
    """By what CUDA calls it: "NVIDIA GeForce RTX 4090"; None where no datasheet is known."""
    names = words.lower().replace("rtx ", "rtx").replace("-", " ").split()
    return next((device for name, device in DEVICES.items() if name in names), None)


def roofline(site: Site, choice: Choice, device: Device) -> float:
    """ms of one site: all of its operations, and each of its operands read or written once."""
    computing = 2e-12 * operations(site) / device.peak[arithmetic(choice)]
    moved = activation_bits(site, choice) + weight_bits(site, choice) + result_bits(site)
    return resolved(max(1e3 * computing, moving(moved, device)) + LAUNCH)


def resolved(ms: float) -> float:
    """In whole steps of what is known."""
    return round(RESOLUTION * round(ms / RESOLUTION), 4)


def moving(bits: float, device: Device) -> float:
    """ms of so many bits between memory and a kernel."""
    return bits / 8e6 / device.bandwidth


def arithmetic(choice: Choice) -> str:
    """The kind of tensor core: that of integers if both operands are, else that of floats."""
    weight, activation = format_named(choice.weight), format_named(choice.activation)
    if isinstance(weight.element, Int) and isinstance(activation.element, Int):
        return "int8"
    bits = max(weight.element.bits, activation.element.bits)
    return {8: "float8", 16: "bfloat16"}.get(bits, "float32")


def operations(site: Site) -> float:
    """Multiply-accumulates at the sizes of `input_shape`."""
    if site.op == "linear":
        return numel(site.input_shape) * site.weight_shape[0]
    return site.macs


def activation_bits(site: Site, choice: Choice) -> float:
    """Of what is read; an embedding reads indices."""
    bits = 64 if site.op == "embedding" else format_named(choice.activation).element.bits
    return bits * numel(site.input_shape)


def weight_bits(site: Site, choice: Choice) -> float:
    """Of a weight as stored; an embedding reads the rows that it looks up."""
    if not site.weight_shape:
        return 0.0
    fmt = format_named(choice.weight)
    if site.op == "embedding":
        return fmt.storage_bits((1, *site.weight_shape[1:])) * numel(site.input_shape)
    return fmt.storage_bits(site.weight_shape)


def result_bits(site: Site) -> float:
    """In the user's precision."""
    bits = FORMATS[site.dtype].element.bits if site.dtype in FORMATS else 64
    if not site.weight_shape:
        return bits * numel(site.input_shape)
    if site.op == "embedding":
        return bits * numel(site.input_shape) * site.weight_shape[-1]
    return bits * operations(site) / max(1, numel(site.weight_shape[1:]))


def numel(shape: Sequence[object]) -> int:
    """Elements; a symbolic size counts as one."""
    return math.prod(size for size in shape if isinstance(size, int))
