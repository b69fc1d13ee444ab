"""conv -> relu -> quantize   =   one kernel with a post-op and an integer output

What may follow a site inside its own kernel: an activation the kernel knows, then the quantization
to the next site's format.  Anything else is left to Inductor, which fuses it with its neighbors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq

aten, mpq = torch.ops.aten, torch.ops.mpq


@dataclass(frozen=True)
class Tail:
    """The nodes that a kernel takes over, last one first to be replaced."""

    post: str = "none"  # oneDNN's name of the activation
    scalars: tuple[float, ...] = ()
    quantize: Node | None = None  # mpq.quantize of the next site
    last: Node | None = None  # the node whose users read the kernel's result


def relu(node: Node) -> tuple[str, tuple[float, ...]]:
    return "relu", ()


def clamp(node: Node) -> tuple[str, tuple[float, ...]]:
    low, high = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])[:2]
    return "hardtanh", (float(low), float(high))  # type: ignore[arg-type]


POSTS: Mapping[Any, Any] = {
    aten.relu.default: relu,
    aten.hardtanh.default: clamp,
    aten.relu6.default: lambda node: ("hardtanh", (0.0, 6.0)),
}


def tail_of(node: Node) -> Tail:
    """The activation and the static quantization that alone read a site's result."""
    post, scalars, last = "none", (), node
    user = only_user(node)
    if user is not None and user.target in POSTS:
        post, scalars = POSTS[user.target](user)
        last, user = user, only_user(user)
    if user is not None and user.target is mpq.quantize.default and user.args[0] is last:
        return Tail(post, scalars, user, user)
    return Tail(post, scalars, None, last)


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
