"""node of one op  ->  another callee: the first kernel, best first, that does not refuse it

A kernel says why it does not take a node, which the ledger tells; then the next one is asked.  One
that is for other formats is not asked at all.  The kernels of a target stand in its files under
passes/lower.  A plug-in kernel is a Kernel behind an entry point of the group mpq_fx.kernels, and
goes in front of them; what it offers is planned with, also in formats that the target has none for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
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
class Offer:
    """What a kernel can run, as a plan is made: before there is a graph with nodes to refuse."""

    choices: Mapping[str, tuple[Choice, ...]]  # op of a site -> what it may run in
    refuse: Callable[[Site, Choice], Iterator[str]]  # why not this site; the same as of its node
    measure: Callable[[Site, Choice], float]  # ms of one call, at the sizes of the site


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
    offer: Offer | None = None  # None: it runs choices of the target, planned with its milliseconds


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
    offers = {name: kernel.offer for name, kernel in mine.items() if kernel.offer is not None}
    return replace(
        _offering(target, offers) if offers else target, lower=partial(_lower, target, mine)
    )


def _lower(target: Target, mine: Mapping[str, Kernel], gm: GraphModule, mode: str) -> Lowered:
    """What plug-ins take, and then the target of the rest."""
    first = choose(gm, mine)
    own = target.lower(gm, mode)
    refusals = {
        site: {**first.refusals.get(site, {}), **own.refusals.get(site, {})}
        for site in (*first.refusals, *own.refusals)
    }
    return Lowered({**own.kernels, **first.kernels}, refusals)


def _offering(target: Target, offers: Mapping[str, Offer]) -> Target:
    """The target with the choices of plug-ins; where nothing is timed, its own word for their cost.

    Their milliseconds are not kept on disk: code that is being written would be judged by its past.
    """

    added = [offer.choices for offer in offers.values()]
    return replace(
        target,
        choices=_merged((target.choices, *added)),
        refuse=partial(_refuse, target, offers),
        measure=partial(_measure, target, offers),
        unkept=_merged((target.unkept, *added)),
    )


def _refuse(
    target: Target, offers: Mapping[str, Offer], site: Site, choice: Choice
) -> Iterator[str]:
    """The reasons of all that may run a choice, if each has some."""
    asked = _asked(offers, site, choice)
    found = [[f"{name}: {r}" for r in o.refuse(site, choice)] for name, o in asked.items()]
    if choice in target.choices.get(site.op, ()) or not asked:
        found.append([*target.refuse(site, choice)])
    if all(found):
        yield from itertools.chain(*found)


def _measure(target: Target, offers: Mapping[str, Offer], site: Site, choice: Choice) -> float:
    """Of the first offer that stands; the target's own word where there is none."""
    asked = _asked(offers, site, choice).values() if target.is_timed else ()
    offer = next((o for o in asked if not any(o.refuse(site, choice))), target)
    return offer.measure(site, choice)


def _asked(offers: Mapping[str, Offer], site: Site, choice: Choice) -> dict[str, Offer]:
    return {name: o for name, o in offers.items() if choice in o.choices.get(site.op, ())}


def _merged(found: Sequence[Mapping[str, tuple[Choice, ...]]]) -> dict[str, tuple[Choice, ...]]:
    """op -> choices of all, each once, in their order"""
    ops = dict.fromkeys(op for each in found for op in each)
    return {op: tuple(dict.fromkeys(c for each in found for c in each.get(op, ()))) for op in ops}


def _take(gm: GraphModule, node: Node, kernel: Kernel) -> None:
    last = kernel.last(node)
    last.replace_all_uses_with(kernel.lower(gm, node))
    erase_unread(last)
