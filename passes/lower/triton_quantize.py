"""quantize(x), quantize_dynamic(x)              ->  mpq_triton::quantize…(x)
quantize…(gelu(x)), …(silu(x) · y), …(x · y)  ->  mpq_triton::activation_quantize…(x, y)
quantize…(layer_norm(x)), …(rms_norm(x))        ->  mpq_triton::norm_quantize…(x)

What makes x is fused in front where the quantization alone reads it, and all of it has one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.formats import format_named
from mpq_fx.graph import arguments, insert_call, value
from mpq_fx.kernels.quantize import triton_norm
from mpq_fx.kernels.quantize.triton import refuse_dynamic, refuse_static
from mpq_fx.passes.lower.kernel import Kernel
from mpq_fx.passes.lower.triton_norm import norm_of

aten, mpq, mpq_triton = torch.ops.aten, torch.ops.mpq, torch.ops.mpq_triton
NORM, ACTIVATION = "norm", "activation"


@dataclass(frozen=True)
class Producer:
    """f in quantize(f(…)): its operands and constants, as the op `<name>_quantize` takes them."""

    name: str
    operands: tuple[Any, ...]
    constants: tuple[Any, ...]


Find = Callable[[Node], Producer | None]


def quantize_kernels(target: str) -> dict[str, Kernel]:
    """Both quantizations, with each producer in front, and then by themselves."""
    return {
        f"{name}_{kind}".strip("_"): _kernel(target, find, is_static=is_static)
        for name, find in PRODUCERS.items()
        for kind, is_static in (("quantize", True), ("quantize_dynamic", False))
    }


def _kernel(target: str, find: Find | None, *, is_static: bool) -> Kernel:
    quantization = mpq.quantize.default if is_static else mpq.quantize_dynamic.default
    refuse_format = refuse_static if is_static else refuse_dynamic

    def refuse(node: Node) -> Iterator[str]:
        fmt = format_named(arguments(node)[-1])
        yield from refuse_format(fmt)
        made = find and produced(node, find)
        if find is not None and made is None:
            yield "nothing that it knows makes x for this quantization alone"
        if made and made.name == NORM:
            yield from triton_norm.refuse(
                fmt, value(arguments(node)[0]).shape[-1], is_static=is_static
            )

    def lower(gm: GraphModule, node: Node) -> Node:
        x, *scales, fmt = arguments(node)
        made = Producer("", (x,), ()) if find is None else produced(node, find)
        assert made is not None, f"{node} was refused"
        name = f"{made.name}_quantize".strip("_") + ("" if is_static else "_dynamic")
        args = (*made.operands, *scales, *made.constants, fmt)
        return insert_call(node, getattr(mpq_triton, name).default, args)

    return Kernel(target, quantization, refuse, lower)


def produced(node: Node, find: Find) -> Producer | None:
    x = arguments(node)[0]
    return find(x) if isinstance(x, Node) and len(x.users) == 1 else None


def activation_of(node: Node) -> Producer | None:
    """gelu(x), silu(x) · up, x · up"""
    if node.target is aten.gelu.default:
        is_tanh = node.kwargs.get("approximate", "none") == "tanh"
        return Producer(ACTIVATION, (node.args[0], None), ("gelu_tanh" if is_tanh else "gelu",))
    if node.target is not aten.mul.Tensor or not is_like(node, *node.args):
        return None
    gate, up = sorted(arguments(node), key=is_silu, reverse=True)
    if is_silu(gate):
        return Producer(ACTIVATION, (arguments(gate)[0], up), ("silu",))
    return Producer(ACTIVATION, (gate, up), ("none",))


def is_silu(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.silu.default and len(node.users) == 1


def is_like(node: Node, *operands: Any) -> bool:
    """Are the operands tensors of the result's shape and dtype?"""
    wanted = value(node)
    found = [value(n) if isinstance(n, Node) else None for n in operands]
    return all(
        isinstance(v, torch.Tensor) and v.shape == wanted.shape and v.dtype == wanted.dtype
        for v in found
    )


def norm_producer(node: Node) -> Producer | None:
    """layer_norm(x), rms_norm(x), over the last dimension"""
    found = norm_of(node)
    if found is None or not is_like(node, found.x):
        return None
    constants = (found.eps, found.is_centered)
    return Producer(NORM, (found.x, found.weight, found.bias), constants)


PRODUCERS: dict[str, Find | None] = {
    NORM: norm_producer,
    ACTIVATION: activation_of,
    "": None,  # by itself
}
