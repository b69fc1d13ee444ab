"""canonical graph -> sites: every op that may run in another precision, in graph order"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.facts import Site
from mpq_fx.graph import is_weight, module_path, source_line, value

aten = torch.ops.aten
KINDS: dict[Any, str] = {
    aten.linear.default: "linear",
    aten.conv1d.default: "conv",
    aten.conv2d.default: "conv",
    aten.embedding.default: "embedding",
    aten.matmul.default: "matmul",
    aten.bmm.default: "matmul",
    aten.baddbmm.default: "matmul",
    aten.scaled_dot_product_attention.default: "attention",
    aten._grouped_mm.default: "grouped_matmul",
}
WEIGHT_AT = {"linear": 1, "conv": 1, "embedding": 0}
INPUT_AT = {"embedding": 1}


def find_sites(gm: GraphModule, parameters: Mapping[str, str]) -> list[Site]:
    """Sites of a graph; `parameters` maps placeholders of weights to their paths."""
    readers = Counter(node.args[0] for node in gm.graph.nodes if node.target is aten.linear.default)
    names = _Names()
    return [_site(node, kind, parameters, names, readers) for node, kind in _candidates(gm)]


class _Names:
    """Unique names: a repeated one gets a number."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, wanted: str) -> str:
        self.seen[wanted] += 1
        count = self.seen[wanted]
        return wanted if count == 1 else f"{wanted}#{count}"


def _candidates(gm: GraphModule) -> Iterator[tuple[Node, str]]:
    for node in gm.graph.nodes:
        kind = KINDS.get(node.target)
        if kind is None or not _is_float(node) or is_weight(node):
            continue
        if kind in WEIGHT_AT:
            if is_weight(node.args[WEIGHT_AT[kind]]):
                yield node, kind
        else:
            yield node, "grouped_matmul" if _has_expert_weight(node) else kind


def _has_expert_weight(node: Node) -> bool:
    return any(isinstance(a, Node) and is_weight(a) and value(a).dim() == 3 for a in node.args)


def _is_float(node: Node) -> bool:
    found = value(node)
    return isinstance(found, torch.Tensor) and found.is_floating_point()


def _site(
    node: Node, kind: str, parameters: Mapping[str, str], names: _Names, readers: Counter[Node]
) -> Site:
    weight = node.args[WEIGHT_AT[kind]] if kind in WEIGHT_AT else None
    x = node.args[INPUT_AT.get(kind, 0)]
    if node.target is aten.baddbmm.default:
        x = node.args[1]
    root = _root(weight) if weight is not None else None
    path = module_path(node)
    owner = parameters[root].rpartition(".")[0] if root in parameters else ""
    bias = node.args[2] if kind in ("linear", "conv") and len(node.args) > 2 else None
    return Site(
        name=names(owner or f"{path}.{kind}".strip(".")),
        op=kind,
        node=node.name,
        weight=root,
        bias=_root(bias) if isinstance(bias, Node) else None,
        input_shape=_shape(x),
        weight_shape=tuple(map(int, value(weight).shape)) if weight is not None else (),
        output_shape=_shape(node),
        attributes=_attributes(node, kind),
        dtype=str(value(node).dtype).removeprefix("torch."),
        macs=_macs(node, kind, weight),
        group=x.name if kind == "linear" and readers[x] > 1 else None,
        path=path or owner,
        source=source_line(node),
    )


def _root(weight: Node) -> str | None:
    """The parameter a weight is computed from: of several (batch norm folded) the one with its rank."""
    pending, found = [weight], []
    while pending:
        node = pending.pop(0)
        if node.op == "placeholder":
            found.append(node)
        pending += [n for n in node.all_input_nodes if n not in pending]
    rank = value(weight).dim()
    return next((n.name for n in found if value(n).dim() == rank), found[0].name if found else None)


def _attributes(node: Node, kind: str) -> tuple[Any, ...]:
    return tuple(node.args[3:7]) if kind == "conv" else ()


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in value(node).shape)


def _macs(node: Node, kind: str, weight: Node | None) -> int:
    """Multiply-accumulates at the sizes seen so far."""
    numel = math.prod(_hint(s) for s in value(node).shape)
    if kind in ("linear", "conv"):
        assert weight is not None
        return numel * math.prod(map(int, value(weight).shape[1:]))
    if kind == "attention":
        q, k = value(node.args[0]), value(node.args[1])
        scores = math.prod(_hint(s) for s in (*q.shape[:-1], k.shape[-2]))
        return scores * (_hint(q.shape[-1]) + _hint(value(node.args[2]).shape[-1]))
    if kind in ("matmul", "grouped_matmul"):
        left = node.args[1] if node.target is aten.baddbmm.default else node.args[0]
        return numel * _hint(value(left).shape[-1])
    return 0


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)
