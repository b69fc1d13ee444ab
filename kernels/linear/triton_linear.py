"""The contract of every Triton kernel of mpq::linear: when, how a weight is packed, how it runs

A kernel is a value of LinearKernel.  `define` makes it two ops of one signature for all kernels:
`mpq_triton::<name>_pack(w, scale, zero, fmt)`, which depends on weights alone and is folded into
constants, and `mpq_triton::<name>(x, …)`, the linear with all that may follow it (Epilogue).

The linear is a custom_op and not a triton_op: its tile is chosen at launch by the number of rows,
and tracing that choice would tie a compiled graph to the sizes that take the same tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpq_fx.formats import Format, format_named
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.quantize.triton import is_packed
from mpq_fx.kernels.tile import Machine, Tile, key, machine, roomy, save, tuned

NAMESPACE = "mpq_triton"
TUNED = Path(__file__).with_name("tuned.json")  # tiles that were searched, for every kernel here
PACK = "(Tensor w, Tensor scale, Tensor zero, str fmt) -> Tensor[]"
LINEAR = (
    "(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor[] packed, Tensor? bias, "
    "Tensor? addend, Tensor? addend_scale, Tensor? addend_zero, Tensor? out_scale, "
    "Tensor? out_zero, str x_fmt, str w_fmt, SymInt n, str activation, ScalarType dtype, "
    "str out_fmt) -> Tensor"
)


@dataclass(frozen=True)
class Shape:
    """What decides whether a kernel runs a linear, known before there are any tensors."""

    x_fmt: Format
    w_fmt: Format
    rows: int | None  # of the activation; None if any
    n: int
    k: int
    machine: Machine
    scaling: str = "none"  # of the activation: "none" for floats, "static", "dynamic"


@dataclass(frozen=True)
class Call:
    """One call: `x` is [rows, K] of any strides, `packed` what the kernel's own `pack` returned.

    Codes of 4 bits are two in a byte, [rows, 16 ceil(K / 32)]: K is then that of whole 16 bytes.
    """

    x: Tensor
    x_scale: Tensor | None  # [rows · groups] or [1]; None of a float format
    x_zero: Tensor | None  # likewise in int32; None if it is 0
    packed: tuple[Tensor, ...]
    x_fmt: Format
    w_fmt: Format
    n: int
    epilogue: Epilogue
    tile: Tile | None = None  # in place of the kernel's own choice

    @property
    def k(self) -> int:
        """Values that are summed."""
        return self.x.shape[1] * (2 if is_packed(self.x_fmt) else 1)

    def empty(self) -> Tensor:
        """The result, not yet computed: [rows, N]."""
        return self.x.new_empty((self.x.shape[0], self.n), dtype=self.epilogue.out_dtype)


@dataclass(frozen=True)
class LinearKernel:
    """One kernel of mpq::linear; plain functions."""

    name: str
    refuse_formats: Callable[[Format, Format], Iterator[str]]  # of x and w: what it is not for
    refuse_shape: Callable[[Shape], Iterator[str]]  # why not this linear, in formats that it is for
    # (codes [N, K], scale, zero, format) -> new tensors, whose layout is the kernel's own business
    pack: Callable[[Tensor, Tensor, Tensor, Format], tuple[Tensor, ...]]
    launch: Callable[[Call], Tensor]  # [rows, N], both above 0, in call.tile or a tile of its own
    # (M, N, K, machine) -> what a search tries
    configurations: Callable[[int, int, int, Machine], tuple[Tile, ...]]

    def refuse(self, shape: Shape) -> Iterator[str]:
        """Why not this linear."""
        reasons = tuple(self.refuse_formats(shape.x_fmt, shape.w_fmt))
        yield from reasons or self.refuse_shape(shape)


def in_tuned_tile(kernel: LinearKernel, call: Call) -> Call:
    """The call in the tile that a search found for its shape, if that leaves room for what follows
    the sums: a search has only a bias there.
    """
    at = key(machine(call.x.device), len(call.x), call.n, call.k)
    found = tuned(TUNED, f"{kernel.name} {call.w_fmt}", at)
    is_fit = found is not None and (call.epilogue.is_plain or roomy([found]))
    return replace(call, tile=found) if is_fit else call


def keep_tile(kernel: LinearKernel, call: Call, tile: Tile) -> None:
    """From now on what calls of this shape run in."""
    at = key(machine(call.x.device), len(call.x), call.n, call.k)
    save(TUNED, f"{kernel.name} {call.w_fmt}", {at: tile})


def define(kernel: LinearKernel) -> LinearKernel:
    """The kernel, whose ops torch knows from now on."""

    def pack(w: Tensor, scale: Tensor, zero: Tensor, fmt: str) -> list[Tensor]:
        return [*kernel.pack(w, scale, zero, format_named(fmt))]

    def linear(x: Tensor, *args: Any) -> Tensor:
        call = call_of(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), *args)
        if not call.x.shape[0] or not call.n:
            return call.empty().view(*x.shape[:-1], call.n)
        return kernel.launch(in_tuned_tile(kernel, call)).view(*x.shape[:-1], call.n)

    def fake(x: Tensor, *args: Any) -> Tensor:
        call = call_of(x, *args)
        return x.new_empty((*x.shape[:-1], call.n), dtype=call.epilogue.out_dtype)

    def register(name: str, function: Callable[..., Any], schema: str) -> Any:
        name = f"{NAMESPACE}::{name}"
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)

    register(f"{kernel.name}_pack", pack, PACK).register_fake(pack)
    register(kernel.name, linear, LINEAR).register_fake(fake)
    return kernel


def call_of(  # the arguments of the schema, in its order
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    packed: list[Tensor],
    bias: Tensor | None,
    addend: Tensor | None,
    addend_scale: Tensor | None,
    addend_zero: Tensor | None,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    x_fmt: str,
    w_fmt: str,
    n: int,
    activation: str,
    dtype: torch.dtype,
    out_fmt: str,
) -> Call:
    written = format_named(out_fmt) if out_fmt else None
    after = (addend, addend_scale, addend_zero, activation, written, out_scale, out_zero)
    epilogue = Epilogue(dtype, vector(bias), *after)
    formats = format_named(x_fmt), format_named(w_fmt)
    return Call(x, vector(x_scale), vector(x_zero), tuple(packed), *formats, n, epilogue)


def vector(x: Tensor | None) -> Tensor | None:
    """Its values one after the other, in memory too; a copy of few values where they are not."""
    return None if x is None else x.reshape(-1).contiguous()
