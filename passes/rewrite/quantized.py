"""linear(x, w, b)  ->  mpq::linear(quantize(x), quantize_weight(w), b); a convolution likewise"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.graph import arguments, insert_call, insert_constant, value
from mpq_fx.passes.analyze.replay import Scales
from mpq_fx.passes.rewrite.float_op import cast_to

mpq = torch.ops.mpq


def rewrite_quantized(
    gm: GraphModule, node: Node, site: Site, choice: Choice, scales: Scales
) -> None:
    """One linear or convolution on codes of both operands, or of the weight alone."""
    x, w, bias = (*arguments(node)[:3], None)[:3]
    codes = quantize_activation(gm, node, x, choice, scales.get((site.name, choice.activation)))
    weight = quantize_weight(node, w, choice.weight)
    if bias is not None:
        bias = cast_to(node, bias, torch.float32)
    formats = (choice.activation, choice.weight)
    target, extra = _callee(node)
    y = insert_call(node, target, (*codes, *weight, bias, *extra, *formats, value(node).dtype))
    node.replace_all_uses_with(y)
    gm.graph.erase_node(node)


def quantize_activation(
    gm: GraphModule,
    node: Node,
    x: Any,
    choice: Choice,
    fixed: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[Any, Any, Any]:
    """(codes, scale, zero) of the activation; of a plain float the cast value and empty scales."""
    fmt = format_named(choice.activation)
    if fmt.is_plain:
        x = cast_to(node, x, getattr(torch, fmt.name))
        return x, empty(gm, node, torch.float32), empty(gm, node, torch.int32)
    if choice.scaling == "dynamic":
        found = insert_call(node, mpq.quantize_dynamic.default, (x, fmt.name))
        return items(node, found)
    assert fixed is not None, f"{node} has no static scale for {fmt}"
    name = f"{node.name}_input"
    scale = insert_constant(gm, node, f"{name}_scale", fixed[0])
    zero = insert_constant(gm, node, f"{name}_zero", fixed[1])
    return insert_call(node, mpq.quantize.default, (x, scale, zero, fmt.name)), scale, zero


def quantize_weight(node: Node, w: Any, fmt: str) -> tuple[Node, Node, Node]:
    """(codes, scale, zero) of the weight, as values of the graph."""
    return items(node, insert_call(node, mpq.quantize_weight.default, (w, fmt)))


def items(anchor: Node, found: Node) -> tuple[Node, Node, Node]:
    first, second, third = (insert_call(anchor, operator.getitem, (found, k)) for k in range(3))
    return first, second, third


def empty(gm: GraphModule, anchor: Node, dtype: torch.dtype) -> Node:
    """The scale of a format that has none."""
    return insert_constant(gm, anchor, "no_scale", torch.empty(0, dtype=dtype))


def _callee(node: Node) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The quantized op for a float one, and its arguments besides the operands."""
    if node.target is torch.ops.aten.linear.default:
        return mpq.linear.default, ()
    dims = value(node).dim() - 2
    defaults: tuple[Any, ...] = ([1] * dims, [0] * dims, [1] * dims, 1)
    given = tuple(node.args[3:])
    return mpq.conv.default, (*given, *defaults[len(given) :])
