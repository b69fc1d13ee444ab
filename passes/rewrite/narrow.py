"""y = op(x) in float32  ->  y = op(x) in bfloat16, between sites too, as `model.bfloat16()` does

The last step of a rewrite, and only on request: what lies between sites then takes half the bytes.
Weights stay float32 until an op that is no site reads them, since codes are rounded from the float
weight; casts that the user wrote stay, and what they widen is computed wide.  Inputs and outputs of
the graph keep their dtypes.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from mpq_fx.graph import (
    PLAN,
    arguments,
    fake_mode_of,
    insert_call,
    is_weight,
    output_of,
    placeholders,
    remove_dead,
    value,
)
from mpq_fx.passes.analyze.replay import refuses_mixed
from mpq_fx.passes.rewrite.float_op import CAST, cast_to

WIDE = torch.float32
WRITE = torch.ops.aten.copy_.default  # to an input, whose dtype is the caller's


def narrow(gm: GraphModule, dtype: torch.dtype, own: Collection[str]) -> int:
    """Every float32 value between sites in `dtype`; the number of ops that changed theirs.

    `own` are the names of the nodes that were there before the rewrite: casts among them stay.
    """
    output = output_of(gm)
    before = [value(n).dtype if _is_float(n) else None for n in arguments(output)[0]]
    inside = [node for node in gm.graph.nodes if node.op == "call_function" and not is_weight(node)]
    for node in placeholders(gm):
        if _is_wide(node) and not is_weight(node):
            _narrow_input(node, dtype)
    changed = sum(_narrow_op(node, dtype, own) for node in inside)
    results = zip(arguments(output)[0], before, strict=True)
    output.args = (tuple(cast_to(output, n, d) if d else n for n, d in results),)
    remove_dead(gm)
    return changed


def _narrow_input(node: Node, dtype: torch.dtype) -> None:
    """Every reader of an input reads it in `dtype`; a write to it, and an output, take itself."""
    readers = [n for n in node.users if n.op != "output" and n.target is not WRITE]
    anchor = next((n for n in node.graph.nodes if n.op == "call_function"), None)
    if readers and anchor is not None:
        cast = insert_call(anchor, CAST, (node, dtype))
        for reader in readers:
            reader.replace_input_with(node, cast)


def _narrow_op(node: Node, dtype: torch.dtype, own: Collection[str]) -> int:
    """Compute one op on what its operands have become; 1 if its result changed."""
    if node.target is WRITE:
        return 0
    if node.target is CAST and value(arguments(node)[0]).dtype == dtype:
        wanted = arguments(node)[1]
        if wanted == dtype or (wanted == WIDE and node.name not in own):
            node.replace_all_uses_with(arguments(node)[0])
            node.graph.erase_node(node)
            return 1
    was = _is_wide(node)
    if str(node.target).startswith("mpq."):
        node.args = tuple(dtype if arg is WIDE else arg for arg in node.args)
    else:
        _cast_operands(node, dtype)
    node.meta["val"] = _value(node)
    return int(was and not _is_wide(node))


def _cast_operands(node: Node, dtype: torch.dtype) -> None:
    """Weights in `dtype`, and all operands of an op that refuses two float types at once."""
    is_strict = refuses_mixed(node)

    def fitting(n: Node) -> Node:
        is_own = is_weight(n) and _is_wide(n) and not n.meta.get(PLAN, False) and value(n).dim()
        return cast_to(node, n, dtype) if is_strict or is_own else n

    node.args = map_arg(node.args, fitting)
    node.kwargs = map_arg(dict(node.kwargs), fitting)


def _value(node: Node) -> Any:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
    with fake_mode_of(node.graph) or nullcontext(), torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_wide(node: Node) -> bool:
    return _is_float(node) and value(node).dtype == WIDE


def _is_float(node: Any) -> bool:
    found = value(node) if isinstance(node, Node) else None
    return isinstance(found, Tensor) and found.is_floating_point()
