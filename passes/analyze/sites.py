"""canonical graph -> sites: every op that may run in another precision, in graph order"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from mpq_fx.facts import Site
from mpq_fx.graph import is_weight, module_path, source_line, value

aten = torch.ops.aten
SizesOf = Callable[[Any], Sequence[int]]  # of the value of a node


@dataclass(frozen=True)
class Operands:
    """Kind of a site, and where its activation and its weight stand among the arguments."""

    kind: str
    activation: int = 0
    weight: int = 1
    bias: int | None = None


CONV = Operands("conv", bias=2)
UP = Operands("conv_transpose", bias=2)
PRODUCT = Operands("matmul")
# By name: an op of another library must not have to be importable.
OPERANDS: dict[str, Operands] = {
    "aten.linear.default": Operands("linear", bias=2),
    "aten.conv1d.default": CONV,
    "aten.conv2d.default": CONV,
    "aten.conv3d.default": Operands("conv3d", bias=2),
    "aten.conv_transpose1d.default": UP,
    "aten.conv_transpose2d.input": UP,
    "aten.conv_transpose3d.input": UP,
    "aten.embedding.default": Operands("embedding", activation=1, weight=0),
    "aten.matmul.default": PRODUCT,
    "aten.mm.default": PRODUCT,
    "aten.bmm.default": PRODUCT,
    "aten.baddbmm.default": Operands("matmul", activation=1, weight=2),
    "aten.scaled_dot_product_attention.default": Operands("attention"),
    "aten._grouped_mm.default": PRODUCT,
    "transformers.grouped_mm_fallback.default": PRODUCT,
}
RECTIFIERS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default)
NEEDS_WEIGHT = ("conv", "conv3d", "conv_transpose", "embedding")


def find_sites(gm: GraphModule, parameters: Mapping[str, str]) -> list[Site]:
    """Sites of a graph; `parameters` maps placeholders of weights to their paths."""
    found = [
        (node, operands)
        for node in gm.graph.nodes
        if (operands := OPERANDS.get(str(node.target))) and is_site(node, operands)
    ]
    readers = Counter(n.args[o.activation] for n, o in found if kind_of(n, o) == "linear")
    names = _Names()
    sites = [_site(node, operands, parameters, names, readers) for node, operands in found]
    return sites + [_residual(node, names) for node in gm.graph.nodes if is_residual(node)]


def is_residual(node: Node) -> bool:
    """The sum of two feature maps: what it is stored in is a choice, since it is read twice.

    Only maps of four dimensions: the streams of token models are small beside their weights.  A
    result of the whole graph is not stored but handed over.
    """
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    maps = [value(n) for n in node.all_input_nodes if not is_weight(n)]
    result = value(node)
    is_kept = any(user.op != "output" for user in stored(node).users)
    return (
        len(maps) == 2
        and is_kept
        and all(m.dim() == 4 and m.is_floating_point() and m.shape == result.shape for m in maps)
    )


def stored(node: Node) -> Node:
    """The value of a residual that is kept: the activation behind the sum, if that alone reads
    it.
    """
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in RECTIFIERS else node


def _residual(node: Node, names: _Names) -> Site:
    kept = stored(node)
    return Site(
        name=names(f"{module_path(node)}.residual".strip(".")),
        op="residual",
        node=kept.name,
        input_shape=shape_of(node),
        output_shape=shape_of(node),
        dtype=str(value(node).dtype).removeprefix("torch."),
        path=module_path(node),
        source=source_line(node),
    )


def is_site(node: Node, operands: Operands) -> bool:
    """A float op that depends on more than weights; a convolution's weight must not be computed,
    and that of a linear has rows: for a vector there is no kernel.
    """
    result = value(node)
    if is_weight(node) or not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return False
    if operands.kind == "linear" and value(node.args[operands.weight]).dim() != 2:  # type: ignore[arg-type]
        return False
    return operands.kind not in NEEDS_WEIGHT or is_weight(node.args[operands.weight])


def kind_of(node: Node, operands: Operands) -> str:
    """A product with stacked weights is a grouped one, a linear of two activations a matmul."""
    weight = node.args[operands.weight]
    if operands.kind == "linear" and not is_weight(weight):
        return "matmul"
    if operands.kind == "matmul" and is_weight(weight) and value(weight).dim() == 3:  # type: ignore[arg-type]
        return "grouped_matmul"
    return operands.kind


class _Names:
    """Unique names: a repeated one gets a number."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, wanted: str) -> str:
        self.seen[wanted] += 1
        count = self.seen[wanted]
        return wanted if count == 1 else f"{wanted}#{count}"


def _site(
    node: Node,
    operands: Operands,
    parameters: Mapping[str, str],
    names: _Names,
    readers: Mapping[Any, int],
) -> Site:
    kind = kind_of(node, operands)
    x, weight = _argument(node, operands.activation), _argument(node, operands.weight)
    assert x is not None
    weight = weight if weight is not None and is_weight(weight) else None
    root, path = root_of(weight), module_path(node)
    owner = parameters.get(root or "", "").removesuffix(".weight")
    return Site(
        name=names(owner or f"{path}.{kind}".strip(".")),
        op=kind,
        node=node.name,
        weight=root,
        bias=root_of(_argument(node, operands.bias)),
        input_shape=shape_of(x),
        weight_shape=tuple(map(int, value(weight).shape)) if weight is not None else (),
        output_shape=shape_of(node),
        attributes=_window(node) if kind in ("conv", "conv3d", "conv_transpose") else (),
        dtype=str(value(node).dtype).removeprefix("torch."),
        macs=macs_of(node, kind, operands),
        group=x.name if kind == "linear" and readers[x] > 1 else None,
        path=path or owner,
        source=source_line(node),
    )


def _window(node: Node) -> tuple[Any, ...]:
    """Stride, padding, … of a convolution; () where one is computed, as by a given output size."""
    given = node.args[3:]
    return () if any(isinstance(x, Node) for x in tree_leaves(given)) else tuple(given)


def _argument(node: Node, position: int | None) -> Node | None:
    found = node.args[position] if position is not None and position < len(node.args) else None
    return found if isinstance(found, Node) else None


def root_of(weight: Node | None) -> str | None:
    """The parameter that a weight is computed from; of several the one with as many dimensions.

    A folded batch norm makes a weight out of five parameters, four of them vectors.
    """
    if weight is None:
        return None
    pending, found = [weight], []
    for node in pending:
        if node.op == "placeholder":
            found.append(node)
        pending += [n for n in node.all_input_nodes if n not in pending]
    rank = value(weight).dim()
    found.sort(key=lambda node: value(node).dim() != rank)
    return found[0].name if found else None


def shared_weights(gm: GraphModule, sites: Sequence[Site]) -> tuple[tuple[str, ...], ...]:
    """Sites that read one weight, as tied embeddings and repeated blocks do; those of one op stand
    behind each other.

    One value of the graph: two batch norms folded into one convolution make two weights of it.
    """
    by_node = {site.node: site for site in sites if site.weight_shape}
    found: dict[Node, list[Site]] = {}
    for node in gm.graph.nodes:
        if site := by_node.get(node.name):
            weight: Any = node.args[OPERANDS[str(node.target)].weight]
            found.setdefault(weight, []).append(site)
    several = [sorted(each, key=lambda site: site.op) for each in found.values() if len(each) > 1]
    return tuple(tuple(site.name for site in each) for each in several)


def shape_of(node: Node) -> tuple[Any, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in value(node).shape)


def sizes_seen(node: Any) -> Sequence[int]:
    """Of a node's value; of a symbol the one that it was made at."""
    return [s if isinstance(s, int) else int(s.node.hint or 1) for s in value(node).shape]


def macs_of(node: Node, kind: str, operands: Operands, sizes: SizesOf = sizes_seen) -> int:
    """Multiply-accumulates at the sizes seen so far, or at those of one call."""
    result, x = sizes(node), sizes(node.args[operands.activation])
    if kind in ("embedding", "residual"):
        return 0
    weight = sizes(node.args[operands.weight])
    if kind in ("conv", "conv3d"):
        return math.prod(result) * math.prod(weight[1:])
    if kind == "conv_transpose":
        return math.prod(x) * math.prod(weight[1:])
    if kind == "attention":
        scores = math.prod(x[:-1]) * weight[-2]
        return scores * (x[-1] + sizes(node.args[2])[-1])
    return math.prod(result) * x[-1]
