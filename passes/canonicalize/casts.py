"""_to_copy(x, dtype=d), type_as(x, y), to(x, device, d), …  ->  to.dtype(x, d)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, value

aten = torch.ops.aten
CAST = aten.to.dtype


def spell_casts(gm: GraphModule) -> int:
    """Only casts that keep device, layout and strides; others stay as they are."""
    found = 0
    for node in list(gm.graph.nodes):
        spelled = SPELLINGS.get(node.target)
        if spelled is None or (node.target is CAST and _is_plain(node)):
            continue
        dtype = spelled(node)
        if dtype is None or _moves(node):
            continue
        node.replace_all_uses_with(insert_call(node, CAST, (node.args[0], dtype)))
        gm.graph.erase_node(node)
        found += 1
    return found


def _is_plain(node: Node) -> bool:
    return len(node.args) == 2 and not node.kwargs


def _moves(node: Node) -> bool:
    """Does the op change the device, or the memory format, besides the dtype?"""
    wanted = node.kwargs.get("memory_format")
    formats = (None, torch.preserve_format)
    return wanted not in formats or value(node).device != value(node.args[0]).device


def _named(node: Node) -> Any:
    return node.kwargs.get("dtype")


def _like_other(node: Node) -> Any:
    return value(node.args[1]).dtype


def _second(node: Node) -> Any:
    return _forced_copy(node, 3) or node.args[1]


def _third(node: Node) -> Any:
    return _forced_copy(node, 4) or node.args[2]


def _forced_copy(node: Node, position: int) -> None:
    """Further positional arguments are (…, copy, memory_format); their defaults change nothing."""
    return None


SPELLINGS: dict[Any, Callable[[Node], Any]] = {
    aten._to_copy.default: _named,
    aten.to.dtype: _second,
    aten.to.device: _third,
    aten.to.dtype_layout: _named,
    aten.type_as.default: _like_other,
    aten.to.other: _like_other,
}
