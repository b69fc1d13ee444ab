"""relu(add(conv(x), r))  ->  dequantize(quantize(relu(add(cast(conv(x), bf16), r))))

A residual that is read by the next block and by the next sum is stored once, in the format of its
choice, and every reader gets that.  The convolution in front of it hands over 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.graph import insert_call, insert_constant, value
from mpq_fx.passes.analyze.replay import Scales
from mpq_fx.passes.rewrite.float_op import CAST

aten, mpq = torch.ops.aten, torch.ops.mpq
CODES = "mpq_codes"  # meta key of a dequantized value: the codes it stands for


def rewrite_residual(
    gm: GraphModule, node: Node, site: Site, choice: Choice, scales: Scales
) -> None:
    """Store the result of `node` as its choice says; its users read the stored value."""
    _narrow_operands(node)
    readers = list(node.users)
    anchor = node.next
    if choice.scaling == "static":
        kept = _encoded(gm, anchor, node, choice, scales[site.name, choice.activation])
    else:
        kept = insert_call(anchor, CAST, (node, getattr(torch, choice.activation)))
        kept = insert_call(anchor, CAST, (kept, value(node).dtype))
    for reader in readers:
        reader.replace_input_with(node, kept)


def _encoded(gm: GraphModule, anchor: Node, node: Node, choice: Choice, fixed: Any) -> Node:
    """cast((codes - zero) * scale, dtype of `node`) of its codes; float32 needs no cast."""
    scale = insert_constant(gm, anchor, f"{node.name}_scale", fixed[0])
    zero = insert_constant(gm, anchor, f"{node.name}_zero", fixed[1])
    fmt = format_named(choice.activation)
    codes = insert_call(anchor, mpq.quantize.default, (node, scale, zero, fmt.name))
    steps = insert_call(anchor, CAST, (codes, torch.float32))
    steps = insert_call(anchor, aten.sub.Tensor, (steps, zero))
    kept = insert_call(anchor, aten.mul.Tensor, (steps, scale))
    if value(node).dtype != torch.float32:
        kept = insert_call(anchor, CAST, (kept, value(node).dtype))
    kept.meta[CODES] = codes
    return kept


def _narrow_operands(node: Node) -> None:
    """An integer convolution read by this sum alone gives 16 bits instead of 32."""
    total = node if node.target is aten.add.Tensor else node.args[0]
    for operand in total.all_input_nodes:  # type: ignore[union-attr]
        if operand.target is mpq.conv.default and len(operand.users) == 1:
            narrow = insert_call(operand.next, CAST, (operand, torch.bfloat16))
            wide = insert_call(narrow.next, CAST, (narrow, value(operand).dtype))
            total.replace_input_with(operand, wide)  # type: ignore[union-attr]
