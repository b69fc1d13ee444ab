"""site -> gelu -> quantize   =   one kernel with a post-op and an integer output

What may follow a site inside its own kernel: an activation the kernel knows, then the quantization
to the next site's format.  Anything else is left to Inductor, which fuses it with its neighbors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.graph import value
from mpq_fx.passes.rewrite.float_op import CAST

aten, mpq = torch.ops.aten, torch.ops.mpq


@dataclass(frozen=True)
class Post:
    """An activation in oneDNN's words."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = "none"


@dataclass(frozen=True)
class Tail:
    """What a kernel takes over, and the node whose users read its result."""

    last: Node
    post: Post = Post()
    quantize: Node | None = None  # mpq.quantize of the next site


def clamp(node: Node) -> Post:
    low, high = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])[:2]
    return Post("hardtanh", (float(low), float(high)))  # type: ignore[arg-type]


def gelu(node: Node) -> Post:
    return Post("gelu", (), str(node.kwargs.get("approximate", "none")))


POSTS: Mapping[Any, Callable[[Node], Post]] = {
    aten.relu.default: lambda node: Post("relu"),
    aten.gelu.default: gelu,
    aten.hardtanh.default: clamp,
    aten.relu6.default: lambda node: Post("hardtanh", (0.0, 6.0)),
}


def tail_of(node: Node, posts: frozenset[str]) -> Tail:
    """Of an integer site: the activation and the static quantization that alone read its result."""
    post, last = Post(), node
    user = only_user(node)
    if user is not None and user.target in POSTS and POSTS[user.target](user).name in posts:
        post = POSTS[user.target](user)
        last, user = user, only_user(user)
    if user is not None and user.target is mpq.quantize.default and user.args[0] is last:
        return Tail(user, post, user)
    if user is not None and is_cast(user, torch.bfloat16):
        return Tail(user, post)
    return Tail(last, post)


def float_tail_of(node: Node, posts: frozenset[str]) -> Tail:
    """Of a float site: an activation behind it, through the casts that surround it.

    cast(gelu(cast(linear(x), float32)), bf16) is one kernel: it computes the activation on its own
    float32 sums, so nothing is lost.
    """
    wide = only_user(node)
    before = wide if wide is not None and is_cast(wide, torch.float32) else node
    act = only_user(before)
    if act is None or act.target not in POSTS or POSTS[act.target](act).name not in posts:
        return Tail(node)
    narrow = only_user(act)
    is_back = narrow is not None and is_cast(narrow, value(node).dtype)
    return Tail(narrow if is_back and narrow is not None else act, POSTS[act.target](act))


def is_cast(node: Node, dtype: torch.dtype) -> bool:
    return node.target is CAST and node.args[1] == dtype


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
