"""The few FX facts and edits that every pass shares."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from mpq_fx.errors import ConfigError

SITE = "mpq_site"  # meta key: the site that a node computes, kept through rewrite and lowering
PLAN = "mpq_plan"  # meta key of a constant: it came with the plan, as a scale does
WEIGHT = "mpq_weight"  # meta key: does the node depend on parameters and constants alone?
Pass = Callable[[GraphModule], int]


def value(node: Node) -> Any:
    """The fake value of a node: a FakeTensor, a SymInt, or a container of them."""
    return node.meta.get("val")


def kind_of(values: Iterable[Any]) -> str:
    """The kind of device that tensors are on: "cuda" if any is, else "cpu"."""
    kinds = {x.device.type for x in values if isinstance(x, torch.Tensor)}
    return "cuda" if "cuda" in kinds else "cpu"


def placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def mark_weights(gm: GraphModule, parameters: Collection[str]) -> None:
    """Note on each node whether it depends on `parameters` (placeholders) and constants alone."""
    for node in gm.graph.nodes:
        node.meta[WEIGHT] = (
            node.name in parameters if node.op == "placeholder" else _from_weights(node)
        )


def is_weight(node: Any) -> bool:
    """Is a node's value known before any call: computed from parameters, buffers and constants?"""
    return isinstance(node, Node) and node.meta.get(WEIGHT, False)


def _from_weights(node: Node) -> bool:
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (bool(inputs) and all(map(is_weight, inputs)))


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a call; torch.fx types them as a union too wide to use."""
    return node.args


def output_of(gm: GraphModule) -> Node:
    return next(iter(reversed(gm.graph.nodes)))


def ops(gm: GraphModule) -> str:
    """The calls of a graph as one line of text, for golden tests: "linear relu linear"."""
    return " ".join(name_of(node) for node in gm.graph.nodes if node.op == "call_function")


def name_of(node: Node) -> str:
    """Short name of the op a node calls: "linear", "conv2d", "mpq.quantize"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace = target.namespace
        packet = target._schema.name.split("::")[1]
        return packet if namespace == "aten" else f"{namespace}.{packet}"
    return getattr(target, "__name__", str(target))


def where(node: Node) -> str:
    """The node and the user's source line that made it, for error messages."""
    line = source_line(node)
    return f"{node.format_node()}" + (f"      {line}" if line else "")


def source_line(node: Node) -> str:
    """ "model.py:31": the innermost user line of a node's stack trace, or ""."""
    frames = [
        line for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line
    ]
    if not frames:
        return ""
    file, line = frames[-1].split('"')[1], frames[-1].split("line ")[1].split(",")[0]
    return f"{file.rsplit('/', 1)[-1]}:{line}"


def module_path(node: Node) -> str:
    """The innermost module that owns a node, as its path in the frame: "encoder.layer.0.query"."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = [*stack.values()][-1][0]
    return qualified(path)


def qualified(source: str) -> str:
    """L['self']._modules['encoder']._modules['0']._parameters['weight'] -> encoder.0.weight"""
    source = re.sub(r"^[LG]\['(self|fn)'\]", "", source)
    source = re.sub(r"^[LG](?=\[)", "", source)
    source = re.sub(r"\._(modules|parameters|buffers)(?=\[)", "", source)
    return re.sub(r"\['?([^]']*)'?\]", r".\1", source).strip(".")


def insert_call(
    anchor: Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> Node:
    """A new call before `anchor`, with its provenance and with its own fake value."""
    graph, kwargs = anchor.graph, kwargs or {}
    with graph.inserting_before(anchor):
        node = graph.call_function(target, args, kwargs)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", SITE):
        if key in anchor.meta:
            node.meta[key] = anchor.meta[key]
    fake_args, fake_kwargs = map_arg((args, kwargs), value)
    with fake_mode_of(graph) or nullcontext(), torch.no_grad():
        node.meta["val"] = target(*fake_args, **fake_kwargs)
    node.meta[WEIGHT] = _from_weights(node)
    return node


def insert_constant(gm: GraphModule, anchor: Node, name: str, tensor: torch.Tensor) -> Node:
    """A get_attr of a new buffer before `anchor`; an equal name gets a number."""
    unique, count = name, 0
    while hasattr(gm, unique):
        count += 1
        unique = f"{name}_{count}"
    gm.register_buffer(unique, tensor)
    with gm.graph.inserting_before(anchor):
        node = gm.graph.get_attr(unique)
    mode = fake_mode_of(gm.graph)
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True) if mode else tensor
    node.meta |= {WEIGHT: True, PLAN: True}
    return node


def fake_mode_of(graph: Graph) -> Any:
    """The fake mode that the graph's values live in, or None for a graph of real values."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def clone(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy that shares buffers and values, and the copy of each node.

    The copy is a fresh module: without the bookkeeping attributes of Dynamo, which later passes
    would have to keep true.
    """
    graph, copies = Graph(), {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return GraphModule(gm, graph), copies


def run_passes(gm: GraphModule, passes: Sequence[Pass]) -> list[tuple[str, int]]:
    """Apply passes in order; clean up and check after each that changed something.

    `MPQ_SKIP=name,…` leaves passes out; `MPQ_FUEL=n` lets only the first n passes that change the
    graph do so, to bisect a wrong answer.  Returns (pass name, number of changes) for the report.
    """
    skipped = set(filter(None, os.environ.get("MPQ_SKIP", "").split(",")))
    fuel = _fuel(os.environ.get("MPQ_FUEL", "-1"))
    log: list[tuple[str, int]] = []
    for apply in passes:
        name = getattr(apply, "__name__", type(apply).__name__)
        if name in skipped or fuel == 0:
            continue
        signature = signature_of(gm)
        changed = apply(gm)
        if changed:
            fuel -= 1
            remove_dead(gm)
            check(gm, signature, name)
        log.append((name, changed))
    return log


def _fuel(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f"MPQ_FUEL={text!r} is not a number of passes", fix="MPQ_FUEL=3"
        ) from error


def remove_dead(gm: GraphModule) -> None:
    """Drop what nobody reads, and check that every value still stands before its readers."""
    gm.graph.eliminate_dead_code()
    gm.recompile()


def erase_unread(node: Node) -> None:
    """Remove a call, and of what it read the calls and constants that nothing else reads."""
    read = node.all_input_nodes
    node.graph.erase_node(node)
    for before in read:
        if not before.users and before.op != "placeholder":
            erase_unread(before)


def signature_of(gm: GraphModule) -> tuple[tuple[str, ...], int]:
    """Names of the placeholders and the number of outputs; no pass may change them."""
    results = output_of(gm).args[0]
    count = len(results) if isinstance(results, (tuple, list)) else 1
    return tuple(node.name for node in placeholders(gm)), count


def check(gm: GraphModule, signature: object, blame: str) -> None:
    """The graph is well formed, its signature survived, and every call knows its fake value."""
    gm.graph.lint()
    assert signature_of(gm) == signature, f"pass {blame} changed the signature of the graph"
    for node in gm.graph.nodes:
        assert node.op != "call_function" or "val" in node.meta, (
            f"pass {blame}: {node} has no value"
        )
