"""graph  ->  the op that makes two calls with the same inputs differ, if an output depends on it

Errors of plans are differences between replays.  Under dropout that was left on, or noise that
forward draws, they are differences between draws, and every choice looks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from mpq_fx.errors import CalibrationError
from mpq_fx.graph import arguments, is_weight, name_of, output_of, source_line
from mpq_fx.passes.analyze.replay import Replayer, is_measurable

SWITCHES = ("train", "training")  # arguments of an op that is random only where they are true
CHANCES = ("p", "dropout", "dropout_p")  # …and where these are not 0
FIX = (
    "dropout: model.eval(), and functional.dropout(x, p, training=self.training); "
    "noise: draw it outside and pass it in"
)


def check_repeatable(replay: Replayer, record: Sequence[Any], excluded: frozenset[int]) -> None:
    """CalibrationError where an output, `excluded` ones aside, is not a function of the inputs.

    ATen's own ops say whether they draw; custom ones, which need not, are called twice.
    """
    for node in _behind_outputs(replay.gm, excluded):
        if is_random(node):
            raise _error(node)
    if (node := _unlike_itself(replay, record, excluded)) is not None:
        raise _error(node)


def is_random(node: Node) -> bool:
    """Does this call draw random numbers: by its tag, unless its arguments switch that off?"""
    target: Any = node.target
    tags = getattr(target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    given = _named(node)
    return not any(name in given and not given[name] for name in (*SWITCHES, *CHANCES))


def _named(node: Node) -> dict[str, Any]:
    """The arguments of a call by the names of its schema, with its defaults."""
    target: Any = node.target
    schema = target._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named |= {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return {**named, **node.kwargs}


def _behind_outputs(gm: GraphModule, excluded: frozenset[int]) -> list[Node]:
    """What the measured outputs depend on, in order."""
    results = enumerate(arguments(output_of(gm))[0])
    wanted = {n for k, n in results if isinstance(n, Node) and k not in excluded}
    needed = {n for n in wanted if is_measurable(n.meta.get("val"))}
    for node in reversed(gm.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in gm.graph.nodes if node in needed]


def _unlike_itself(
    replay: Replayer, record: Sequence[Any], excluded: frozenset[int]
) -> Node | None:
    """The first custom op whose results differ on the same inputs; nothing is run without one."""
    suspects = {node for node in _behind_outputs(replay.gm, excluded) if _is_custom(node)}
    if not suspects:
        return None
    env = replay.start(record)
    for node in replay.gm.graph.nodes:
        if node.op == "output":
            break
        if node not in suspects:
            replay.step(env, node, {})
            continue
        again = dict(env)
        replay.step(env, node, {})
        replay.step(again, node, {})
        if not _alike(env.get(node), again.get(node)):
            return node
    return None


def _is_custom(node: Node) -> bool:
    namespace = getattr(node.target, "namespace", "aten")
    return node.op == "call_function" and namespace not in ("aten", "prims") and not is_weight(node)


def _alike(one: Any, other: Any) -> bool:
    """The same tensors up to rounding, NaN like NaN."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(
        torch.allclose(a, b, rtol=1e-3, equal_nan=True) if isinstance(a, Tensor) else a == b
        for a, b in pairs
    )


def _error(node: Node) -> CalibrationError:
    return CalibrationError(
        f"the model is not deterministic: {name_of(node)} has another result on each call with the "
        "same inputs",
        at=source_line(node),
        fix=FIX,
    )
