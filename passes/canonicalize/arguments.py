"""op(a, b, k=c)  ->  {"self": a, "other": b, "k": c, …}: every argument by its schema name."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def arguments_of(node: Node) -> dict[str, Any]:
    """Arguments of a call to an ATen op, its defaults included."""
    found: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if position < len(node.args):
            found[argument.name] = node.args[position]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def leaves_graph(node: Node) -> bool:
    """Is the value returned or written to an input, so that its identity can be seen outside?"""
    return any(
        user.op == "output" or user.target._schema.is_mutable  # type: ignore[union-attr]
        for user in node.users
        if user.op == "output" or hasattr(user.target, "_schema")
    )


def same_sizes(left: Any, right: Any) -> bool:
    """Equal as expressions: true for every value of the symbols, and asks for no guard."""
    return [str(size) for size in left] == [str(size) for size in right]
