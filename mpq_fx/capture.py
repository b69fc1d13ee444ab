"""Dynamo graph  ->  functional ATen graph, or the reason why it has to stay Dynamo's own.

    retrace.py    torch functions -> ATen ops, still whole (linear, conv2d, sdpa); vmap expanded
    explicit.py   autocast -> casts; in-place -> out-of-place, each mutated input written once
These three and dynamo.py are the only files that touch PyTorch's private API.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from mpq_fx.explicit import make_explicit, mutated_inputs, mutates
from mpq_fx.graph import placeholders, qualified
from mpq_fx.retrace import RefusedError, is_lost, retrace, user_line

ASSERT = torch.ops.aten._assert_tensor_metadata.default


@dataclass(frozen=True)
class Captured:
    """A graph to optimize, or Dynamo's own graph with the reason why it cannot be."""

    gm: GraphModule
    parameters: Mapping[str, str] = field(default_factory=dict)  # placeholder -> "encoder.0.weight"
    mutated: tuple[str, ...] = ()  # placeholders that the graph writes to (KV caches, buffers)
    refusal: str = ""


def capture(gm: GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Dynamo graph -> functional ATen graph with the same placeholders, values and sources."""
    sources = parameters_of(gm, example_inputs)
    try:
        _refuse_inputs(gm, example_inputs)
        fakes = [node.meta["example_value"] for node in placeholders(gm)]
        traced = retrace(gm, fakes)
        mutated = mutated_inputs(traced, example_inputs)
        traced = make_explicit(traced, fakes, functional=mutates(traced))
        _refuse_leftovers(traced)
    except RefusedError as refused:
        return Captured(gm, sources, refusal=str(refused))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        first = str(error).strip().splitlines() or [""]
        return Captured(gm, sources, refusal=f"tracing to ATen failed: {first[0]}")
    names = [node.name for node in placeholders(gm)]
    for node, name in zip(placeholders(traced), names, strict=True):
        node._rename(name)
        node.target = node.name
    _remove_markers(traced)
    return Captured(traced, sources, tuple(names[index] for index in mutated))


def _remove_markers(gm: GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=ASSERT):
        gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        node.meta.get("custom", {}).pop("autocast", None)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def parameters_of(gm: GraphModule, example_inputs: Sequence[Any]) -> dict[str, str]:
    """Which placeholders hold parameters or buffers, and their dotted path in the frame."""
    found = {}
    for node, example in zip(placeholders(gm), example_inputs, strict=True):
        source = _source_name(node)
        owned = "_parameters['" in source or "_buffers['" in source
        if owned or isinstance(example, torch.nn.Parameter):
            found[node.name] = qualified(source) or node.name
    return found


def _source_name(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    if source is None and "grapharg" in node.meta:
        source = node.meta["grapharg"].source
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _refuse_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    for node, example in zip(placeholders(gm), example_inputs, strict=True):
        if "example_value" not in node.meta:
            raise RefusedError(f"input {node.name} is not a tensor or a size")
        if not isinstance(example, Tensor):
            continue
        name = qualified(_source_name(node)) or node.name
        for bad, what in (
            (example.layout != torch.strided, f"{example.layout} layout"),
            (example.is_complex(), "complex values"),
            (example.is_quantized, "torch.quantize values"),
            (type(example) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor),
             f"the tensor subclass {type(example).__name__}"),
        ):  # fmt: skip
            if bad:
                raise RefusedError(f"input {name} has {what}")


def _refuse_leftovers(gm: GraphModule) -> None:
    """Only ATen ops, custom ops and size arithmetic may be left, and only real constants."""
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method") or not _is_known(node):
            raise RefusedError(f"{node.target} is not an ATen op ({user_line(node)})")
    for node in gm.graph.find_nodes(op="get_attr"):
        if is_lost(getattr(gm, str(node.target), None)):
            raise RefusedError(f"tracing lost the value of {node.name} ({user_line(node)})")


def _is_known(node: Node) -> bool:
    """An ATen or custom op, or arithmetic on sizes."""
    target: Any = node.target
    if node.op != "call_function" or isinstance(target, torch._ops.OpOverload):
        return True
    is_arithmetic = getattr(target, "__module__", "") in (operator.__name__, "_operator", "math")
    return is_arithmetic or getattr(target, "__name__", "").startswith("sym_")
