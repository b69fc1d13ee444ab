"""convolution(x, w, b, …), conv2d(x, w, padding="same")  ->  conv2d(x, w, b, [s], [p], [d], groups)

One spelling per number of dimensions, all seven arguments present, every list as long as the number
of dimensions.  Another padding mode is already a pad in front of the convolution and stays one; so
does the odd half of an uneven "same".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, value
from mpq_fx.passes.canonicalize.arguments import arguments_of

aten = torch.ops.aten
CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
SPELLINGS = (
    *CONVOLUTIONS.values(),
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)


def spell_convolutions(gm: GraphModule) -> int:
    found = 0
    for node in list(gm.graph.nodes):
        if node.target not in SPELLINGS:
            continue
        facts = arguments_of(node)
        target, args = canonical(node, facts)
        if facts.get("transposed") or (node.target is target and _same(node, args)):
            continue
        node.replace_all_uses_with(insert_call(node, target, args))
        gm.graph.erase_node(node)
        found += 1
    return found


def canonical(node: Node, facts: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The op and its seven arguments."""
    kernel = [int(size) for size in value(facts["weight"]).shape[2:]]
    count = len(kernel)
    stride, dilation = (spread(facts[key], count) for key in ("stride", "dilation"))
    x, padding = facts["input"], facts["padding"]
    if isinstance(padding, str):
        x, padding = resolve(node, x, padding, kernel, dilation)
    else:
        padding = spread(padding, count)
    args = (x, facts["weight"], facts["bias"], stride, padding, dilation, facts["groups"])
    return CONVOLUTIONS[count], args


def spread(given: int | Sequence[int], count: int) -> list[int]:
    listed = [given] if isinstance(given, int) else list(given)
    return listed * count if len(listed) == 1 else listed


def resolve(
    node: Node, x: Any, padding: str, kernel: Sequence[int], dilation: Sequence[int]
) -> tuple[Any, list[int]]:
    """ "same": (k - 1)·d zeros in all, the odd one at the end, by a pad of its own."""
    if padding == "valid":
        return x, [0] * len(kernel)
    totals = [(size - 1) * step for size, step in zip(kernel, dilation, strict=True)]
    if any(total % 2 for total in totals):
        ends = [end for total in reversed(totals) for end in (0, total % 2)]
        x = insert_call(node, aten.constant_pad_nd.default, (x, ends, 0))
    return x, [total // 2 for total in totals]


def _same(node: Node, args: tuple[Any, ...]) -> bool:
    return not node.kwargs and len(node.args) == 7 and [*map(str, node.args)] == [*map(str, args)]
