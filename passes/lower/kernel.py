"""node of one op  ->  another callee, in front of what a target does with that op itself

A plug-in kernel is a Kernel behind an entry point of the group mpq_fx.kernels.  It says why it does
not take a node; then the target's own callee does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from mpq_fx.graph import SITE, remove_dead, where
from mpq_fx.passes.lower.target import Kernels, Target

log = logging.getLogger("mpq_fx")


@dataclass(frozen=True)
class Kernel:
    """One callee for one op on one target."""

    target: str  # name of the target it runs on
    op: Callable[..., object]  # what it takes the place of: torch.ops.mpq.linear.default, …
    refuse: Callable[[Node], Iterator[str]]  # why not this node
    lower: Callable[[GraphModule, Node], Node]  # inserts the callee, returns its result


def with_kernels(target: Target, kernels: Mapping[str, Kernel]) -> Target:
    """The target with plug-in kernels in front of its own, in the order of their names."""
    mine = {name: kernel for name, kernel in kernels.items() if kernel.target == target.name}
    if not mine:
        return target

    def lower(gm: GraphModule, mode: str) -> Kernels:
        taken: Kernels = {}
        for name, kernel in mine.items():
            for node in gm.graph.find_nodes(op="call_function", target=kernel.op):
                taken |= _take(gm, node, name, kernel)
        remove_dead(gm)
        return {**target.lower(gm, mode), **taken}

    return replace(target, lower=lower)


def _take(gm: GraphModule, node: Node, name: str, kernel: Kernel) -> Kernels:
    """Replace a node unless the kernel refuses it: {its sites: the kernel's name}."""
    if reasons := [*kernel.refuse(node)]:
        log.info("kernel %s refuses %s: %s", name, where(node), "; ".join(reasons))
        return {}
    node.replace_all_uses_with(kernel.lower(gm, node))
    gm.graph.erase_node(node)
    return dict.fromkeys(node.meta.get(SITE, ()), name)
