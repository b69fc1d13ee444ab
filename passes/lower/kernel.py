"""node of one op  ->  another callee: the first kernel, best first, that does not refuse it

A kernel says why it does not take a node, which the ledger tells; then the next one is asked.  One
that is for other formats is not asked at all.  The kernels of a target stand in its files under
passes/lower.  A plug-in kernel is a Kernel behind an entry point of the group mpq_fx.kernels, and
goes in front of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.graph import SITE, erase_unread, remove_dead
from mpq_fx.passes.lower.target import Lowered, Target

mpq = torch.ops.mpq
# They serve the site that reads their codes: its own kernel stands in the ledger, theirs does not.
SERVING = (mpq.quantize.default, mpq.quantize_dynamic.default)


def itself(node: Node) -> Node:
    return node


def always(node: Node) -> bool:
    return True


@dataclass(frozen=True)
class Kernel:
    """One callee for one op on one target."""

    target: str  # name of the target it runs on
    op: Callable[..., object]  # what it takes the place of: torch.ops.mpq.linear.default, …
    refuse: Callable[[Node], Iterator[str]]  # why not this node
    lower: Callable[[GraphModule, Node], Node]  # inserts the callee, returns its result
    # The node whose readers get the result: of what the kernel also computes, the last
    last: Callable[[Node], Node] = itself
    is_for: Callable[[Node], bool] = always  # a node of such formats: others are not worth a word


def choose(gm: GraphModule, kernels: Mapping[str, Kernel]) -> Lowered:
    """Replace what a kernel takes by its callee, best kernel first; refusals before it are kept."""
    taken: dict[str, str] = {}
    refusals: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, kernel in kernels.items():
        found = gm.graph.find_nodes(op="call_function", target=kernel.op)
        for node in filter(kernel.is_for, found):
            sites = () if kernel.op in SERVING else node.meta.get(SITE, ())
            if reasons := tuple(kernel.refuse(node)):
                for site in sites:
                    refusals.setdefault(site, {})[name] = reasons
            else:
                _take(gm, node, kernel)
                taken |= dict.fromkeys(sites, name)
    remove_dead(gm)
    return Lowered(taken, refusals)


def with_kernels(target: Target, kernels: Mapping[str, Kernel]) -> Target:
    """The target with plug-in kernels in front of its own, in the order of their names."""
    mine = {name: kernel for name, kernel in kernels.items() if kernel.target == target.name}
    if not mine:
        return target

    def lower(gm: GraphModule, mode: str) -> Lowered:
        first = choose(gm, mine)
        own = target.lower(gm, mode)
        refusals = {
            site: {**first.refusals.get(site, {}), **own.refusals.get(site, {})}
            for site in (*first.refusals, *own.refusals)
        }
        return Lowered({**own.kernels, **first.kernels}, refusals)

    return replace(target, lower=lower)


def _take(gm: GraphModule, node: Node, kernel: Kernel) -> None:
    last = kernel.last(node)
    last.replace_all_uses_with(kernel.lower(gm, node))
    erase_unread(last)
