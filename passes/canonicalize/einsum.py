"""einsum("bsd,hd->bsh", x, w)  ->  linear(x, w)      w a weight, the summed labels last in x

Several summed labels (bshe,hed->bsd) are flattened into one, several new ones (bsd,dhe->bshe) are
split again behind the linear; the weight is permuted to [new…, summed…], which is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """x[kept…, summed…] · w[new…, summed…] over the summed labels."""

    x: Node
    w: Node
    labels: str  # of w, as the equation names its dimensions
    new: str
    summed: str


def spell_einsum(gm: GraphModule) -> int:
    found = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.einsum.default):
        projection = match(node)
        if projection is None:
            continue
        node.replace_all_uses_with(as_linear(node, projection))
        gm.graph.erase_node(node)
        found += 1
    return found


def match(node: Node) -> Projection | None:
    """The equation as a projection, or None where it is another product."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or len(operands) != 2 or len(terms) != 2:
        return None
    if is_weight(operands[0]):
        operands, terms = operands[::-1], terms[::-1]
    (x, w), (left, right) = operands, terms
    summed = "".join(label for label in left if label in right)
    new = "".join(label for label in result if label in right)
    kept = left.removesuffix(summed)
    distinct = len({*right}) == len(right) and len({*left}) == len(left.replace("...", "."))
    fits = summed and new and not {*new} & {*left} and {*right} == {*new, *summed}
    if is_weight(x) or not is_weight(w) or not distinct or not fits or "." in right:
        return None
    if kept + summed != left or result != kept + new:
        return None
    return Projection(x, w, right, new, summed)


def as_linear(anchor: Node, found: Projection) -> Node:
    """linear on flattened labels, and views around it where there are several."""
    order = [found.labels.index(label) for label in found.new + found.summed]
    x, w = found.x, found.w
    sizes: list[Any] = [value(w).shape[index] for index in order]
    if order != sorted(order):
        w = insert_call(anchor, aten.permute.default, (w, order))
    if len(found.new) > 1:
        w = insert_call(anchor, aten.flatten.using_ints, (w, 0, len(found.new) - 1))
    if len(found.summed) > 1:
        w = insert_call(anchor, aten.flatten.using_ints, (w, 1, -1))
        x = insert_call(anchor, aten.flatten.using_ints, (x, -len(found.summed), -1))
    y = insert_call(anchor, aten.linear.default, (x, w))
    if len(found.new) > 1:
        y = insert_call(anchor, aten.unflatten.int, (y, -1, sizes[: len(found.new)]))
    return y
