"""site -> gelu -> quantize                   =   one kernel with a post-op and an integer output
site -> add(residual) -> relu -> quantize  =   one kernel that adds into the residual

What may follow a site inside its own kernel: an activation the kernel knows or the sum with a
residual, then the quantization to the next site's format.  Anything else is left to Inductor, which
fuses it with its neighbors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.graph import arguments, value
from mpq_fx.passes.rewrite.float_op import CAST

aten, mpq = torch.ops.aten, torch.ops.mpq


@dataclass(frozen=True)
class Post:
    """An activation in oneDNN's words."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = "none"


@dataclass(frozen=True)
class Addend:
    """The other operand of a sum: codes that the kernel adds into, or bfloat16 that it reads."""

    x: Node
    scale: Node | None = None  # of codes: constants
    zero: Node | None = None


@dataclass(frozen=True)
class Tail:
    """What a kernel takes over, and the node whose users read its result."""

    last: Node
    post: Post = Post()
    quantize: Node | None = None  # mpq.quantize of the next site
    addend: Addend | None = None  # added before `post`


def clamp(node: Node) -> Post:
    low, high = (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])[:2]
    return Post("hardtanh", (float(low), float(high)))  # type: ignore[arg-type]


def gelu(node: Node) -> Post:
    return Post("gelu", (), str(node.kwargs.get("approximate", "none")))


POSTS: Mapping[Any, Callable[[Node], Post]] = {
    aten.relu.default: lambda node: Post("relu"),
    aten.gelu.default: gelu,
    aten.silu.default: lambda node: Post("swish"),
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


def sum_tail_of(node: Node, posts: frozenset[str]) -> Tail | None:
    """Of an integer site: the sum with a residual that alone reads its result, and what that is
    stored as.  None where no sum follows, or where its other operand is not at hand in few bits.
    """
    last = narrowed(node)
    total, other = sum_of(last)
    if total is None or other is None or not other < node:
        return None
    tail = tail_of(total, posts)
    if value(tail.last).dtype == value(total).dtype:
        return None  # what stays this wide Inductor fuses with its readers
    addend = addend_of(node, other, total, value(tail.last).dtype)
    return replace(tail, addend=addend) if addend is not None else None


def any_sum_tail_of(node: Node, posts: frozenset[str]) -> Tail | None:
    """The same for a kernel that only reads its addend: of any width, and read by others as well.

    It takes the place of the last node, before which all operands stand.
    """
    total, other = sum_of(node)
    if total is None or other is None or value(total).dtype != value(node).dtype:
        return None
    is_float_cast = is_cast(other, value(total).dtype) and is_float(arguments(other)[0])
    source = arguments(other)[0] if is_float_cast else other
    addend = Addend(source)
    if chain := dequantization(source):
        codes, _, steps, wide = chain
        addend = Addend(codes, arguments(wide)[1], arguments(steps)[1])
    return replace(tail_of(total, posts), addend=addend)


def sum_of(last: Node) -> tuple[Node | None, Node | None]:
    """The sum that alone reads `last`, and its other operand where that has the same shape."""
    total = only_user(last)
    if total is None or total.target is not aten.add.Tensor or total.kwargs:
        return None, None
    others = [n for n in total.all_input_nodes if n is not last]
    is_like = others and value(others[0]).shape == value(total).shape == value(last).shape
    return total, others[0] if is_like else None


def narrowed(node: Node) -> Node:
    """The end of cast(cast(node, bfloat16), float32), which spares memory outside of a kernel."""
    narrow = only_user(node)
    if narrow is None or not is_cast(narrow, torch.bfloat16):
        return node
    wide = only_user(narrow)
    return wide if wide is not None and is_cast(wide, value(node).dtype) else node


def addend_of(node: Node, other: Node, total: Node, dtype: torch.dtype) -> Addend | None:
    """What `other` was widened from: bfloat16, or codes in the result's dtype to be overwritten."""
    if is_cast(other, value(total).dtype):
        narrow: Any = other.args[0]
        return Addend(narrow) if value(narrow).dtype == torch.bfloat16 else None
    chain = dequantization(other)
    if not chain or value(chain[0]).dtype != dtype:
        return None
    codes, _, steps, wide = chain
    addend = Addend(codes, arguments(wide)[1], arguments(steps)[1])
    return addend if is_last_reader(node, chain, total) else None


def dequantization(wide: Node) -> tuple[Node, ...]:
    """(codes, cast, cast - zero, · scale) of a residual kept as codes, or ().

    A model may have the like of its own, with a factor or with a scale of each column: a kernel
    takes one scale and one zero point, and codes of the shape of the sum.
    """
    if wide.target is not aten.mul.Tensor:
        return ()
    steps, scale = arguments(wide)
    if not isinstance(steps, Node) or steps.target is not aten.sub.Tensor or steps.kwargs:
        return ()
    cast, zero = arguments(steps)
    if not (is_number(scale) and is_number(zero) and is_cast(cast, torch.float32)):
        return ()
    codes = arguments(cast)[0]
    return (codes, cast, steps, wide) if value(codes).shape == value(wide).shape else ()


def is_number(node: Any) -> bool:
    """A constant of one element?"""
    return isinstance(node, Node) and node.op == "get_attr" and value(node).numel() == 1


def is_last_reader(node: Node, chain: Sequence[Node], total: Node) -> bool:
    """May `node` overwrite the codes that `total` reads at the end of `chain`: is every other
    reader needed for `node`, and none of them `node` itself?  A reader that merely stands before it
    is not enough, for Inductor moves nodes.
    """
    needed, pending = ancestors(node), [chain[0]]
    while pending:
        for user in pending.pop().users:
            if user in chain or (user in needed and may_alias(user)):
                pending.append(user)
            elif user not in needed and user is not total:
                return False
    return chain[0].op == "call_function"


def ancestors(node: Node) -> set[Node]:
    """What `node` needs, without itself."""
    found, pending = set[Node](), [node]
    while pending:
        new = [before for before in pending.pop().all_input_nodes if before not in found]
        found.update(new)
        pending += new
    return found


def may_alias(node: Node) -> bool:
    """Can a node be a view of what it reads?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    returns = node.target._schema.returns
    return node.target in COPIES_OR_VIEWS or any(r.alias_info is not None for r in returns)


COPIES_OR_VIEWS = {aten.reshape.default, aten.contiguous.default}


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


def is_cast(node: Any, dtype: torch.dtype) -> bool:
    return isinstance(node, Node) and node.target is CAST and node.args[1] == dtype


def is_float(node: Node) -> bool:
    return value(node).is_floating_point()


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
