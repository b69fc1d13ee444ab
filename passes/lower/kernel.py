"""node of one op  ->  another callee, in front of what a target does with that op itself

A plug-in kernel is a Kernel behind an entry point of the group mpq_fx.kernels.  It says why it does
not take a node, which the ledger tells; then the target's own callee does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from mpq_fx.graph import SITE, remove_dead
from mpq_fx.passes.lower.target import Lowered, Target


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

    def lower(gm: GraphModule, mode: str) -> Lowered:
        taken: dict[str, str] = {}
        refusals: dict[str, dict[str, tuple[str, ...]]] = {}
        for name, kernel in mine.items():
            for node in gm.graph.find_nodes(op="call_function", target=kernel.op):
                sites = node.meta.get(SITE, ())
                if reasons := tuple(kernel.refuse(node)):
                    for site in sites:
                        refusals.setdefault(site, {})[name] = reasons
                else:
                    _take(gm, node, kernel)
                    taken |= dict.fromkeys(sites, name)
        remove_dead(gm)
        own = target.lower(gm, mode)
        return Lowered({**own.kernels, **taken}, {**own.refusals, **refusals})

    return replace(target, lower=lower)


def _take(gm: GraphModule, node: Node, kernel: Kernel) -> None:
    node.replace_all_uses_with(kernel.lower(gm, node))
    gm.graph.erase_node(node)
