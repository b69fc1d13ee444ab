"""op(x, pack(quantize(w)))  ->  op(x, constant)    constant = pack(quantize(w)), refreshed in place

Everything a lowered graph computes from weights alone becomes a buffer; how to compute it again
stays behind as a Recipe, so that an edited weight updates only its own constants, in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg

from mpq_fx.graph import PLAN, clone, placeholders

INLINED = 8  # Inductor writes vectors up to this size into its code, where no refresh reaches them
aten = torch.ops.aten
# A chain of nothing but these is a view of the live weight: free, and never stale.
VIEWS = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.detach.default,
        aten.alias.default,
        aten.unflatten.int,
        aten.flatten.using_ints,
        aten.numpy_T.default,
    }
)


@dataclass(frozen=True)
class Recipe:
    """constant = node(parameters): the calls, in order, that compute one owned constant."""

    name: str  # buffer of the lowered graph
    nodes: tuple[Node, ...]  # ancestors in order, the last one is the value
    parameters: tuple[str, ...]  # placeholders it depends on


@dataclass(frozen=True)
class Folded:
    """A lowered graph with its constants taken out."""

    gm: GraphModule  # buffers named by the recipes; placeholders: `live` only
    recipes: tuple[Recipe, ...]
    live: tuple[int, ...]  # positions, among the original placeholders, still read
    passed: tuple[str, ...]  # constants passed as arguments behind those, see INLINED


def fold_constants(gm: GraphModule, parameters: Mapping[str, Tensor]) -> Folded:
    """Take out what depends on weights alone, and compute it once."""
    merge_equal(gm.graph, constant_nodes(gm, parameters))
    constant = constant_nodes(gm, parameters)
    roots = [n for n in gm.graph.nodes if n in constant and _is_root(n, constant)]
    recipes = tuple(_recipe(f"constant_{k}", root) for k, root in enumerate(roots))
    values = evaluate(gm, recipes, parameters)
    folded, copies = clone(gm)
    for recipe in recipes:
        folded.register_buffer(recipe.name, values[recipe.name])
        node = copies[recipe.nodes[-1]]
        with folded.graph.inserting_before(node):
            buffer = folded.graph.get_attr(recipe.name)
        buffer.meta.update(node.meta)
        node.replace_all_uses_with(buffer)
    folded.graph.eliminate_dead_code()
    live = _drop_unused_inputs(folded)
    return Folded(folded, recipes, live, _pass_small(folded, recipes))


def evaluate(
    gm: GraphModule, recipes: Sequence[Recipe], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{constant: value} from the present parameters; calls shared by recipes run once.

    What lies between is let go after the last recipe that needs it.
    """
    last = {node: recipe.name for recipe in recipes for node in recipe.nodes}
    env: dict[Node, Any] = {}
    found: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be refreshed
        for recipe in recipes:
            for node in recipe.nodes:
                if node not in env:
                    env[node] = _value(gm, node, env, parameters)
            found[recipe.name] = _owned(env[recipe.nodes[-1]], parameters)
            for node in [n for n in recipe.nodes if last[n] == recipe.name]:
                del env[node]
    return found


def constant_nodes(gm: GraphModule, parameters: Mapping[str, Tensor]) -> set[Node]:
    """Nodes whose value depends on parameters (and buffers of the graph) alone."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if (
            (node.op == "placeholder" and node.name in parameters)
            or node.op == "get_attr"
            or (node.op == "call_function" and inputs and all(n in found for n in inputs))
        ):
            found.add(node)
    return found


def merge_equal(graph: Graph, constant: set[Node]) -> None:
    """Equal calls on equal constants become one, so that a shared weight is packed once."""
    seen: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node in constant and node.op == "call_function":
            key = f"{node.target}{node.args}{node.kwargs}"
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _is_root(node: Node, constant: set[Node]) -> bool:
    """Computed (not merely viewed) from weights, and read by something that is not constant."""
    if node.op != "call_function" or all(u in constant for u in node.users):
        return False
    return any(n.op == "call_function" and n.target not in VIEWS for n in _ancestors(node))


def _recipe(name: str, root: Node) -> Recipe:
    nodes = _ancestors(root)
    return Recipe(name, nodes, tuple(n.name for n in nodes if n.op == "placeholder"))


def _ancestors(root: Node) -> tuple[Node, ...]:
    """`root` and all it depends on, in graph order."""
    found, pending = {root}, [root]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                pending.append(node)
    return tuple(sorted(found))


def _value(
    gm: GraphModule, node: Node, env: Mapping[Node, Any], parameters: Mapping[str, Tensor]
) -> Any:
    if node.op == "placeholder":
        return parameters[node.name].detach()
    if node.op == "get_attr":
        return getattr(gm, str(node.target))
    args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _owned(tensor: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The tensor itself, or a copy where an op returned the weight's own memory (a no-op cast)."""
    if tensor.is_mkldnn:
        return tensor
    storages = {p.untyped_storage().data_ptr() for p in parameters.values()}
    return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor


def _pass_small(gm: GraphModule, recipes: Sequence[Recipe]) -> tuple[str, ...]:
    """Small constants become arguments, since Inductor would write their values into its code:
    where no refresh reaches them, and where equal layers with scales of their own would each be
    compiled.
    """
    refreshed = {r.name for r in recipes}
    nodes = [
        n
        for n in gm.graph.find_nodes(op="get_attr")
        if (n.target in refreshed or PLAN in n.meta)
        and 0 < getattr(gm, str(n.target)).numel() <= INLINED
    ]
    first = next(n for n in gm.graph.nodes if n.op != "placeholder" and n not in nodes)
    names = dict.fromkeys(str(node.target) for node in nodes)
    for name in names:
        with gm.graph.inserting_before(first):
            argument = gm.graph.placeholder(name)
        for node in [n for n in nodes if n.target == name]:
            argument.meta.update(node.meta)
            node.replace_all_uses_with(argument)
            gm.graph.erase_node(node)
    gm.recompile()
    return tuple(names)


def _drop_unused_inputs(gm: GraphModule) -> tuple[int, ...]:
    live = []
    for position, node in enumerate(placeholders(gm)):
        if node.users or "val" not in node.meta:
            live.append(position)
        else:
            gm.graph.erase_node(node)
    gm.recompile()
    return tuple(live)
