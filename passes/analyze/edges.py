"""site u -> activation -> site v: the pairs whose formats decide if a conversion lies between them

Where u's kernel can hand its result to v in v's own format nothing is converted; else one more pass
over the tensor is.  Behind anything but another site the conversion is fused into the kernel that
makes the tensor anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from mpq_fx.facts import Site
from mpq_fx.graph import arguments
from mpq_fx.passes.analyze.sites import OPERANDS
from mpq_fx.passes.lower.fuse import POSTS

aten = torch.ops.aten
READERS = ("linear", "conv")
MAKERS = ("linear", "conv", "residual")
# What a kernel can do to its result by itself, or what moves no data.
FUSED = frozenset(POSTS) | {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
}


def find_edges(gm: GraphModule, sites: Sequence[Site]) -> dict[str, str]:
    """{reading site: the site whose result it reads}"""
    by_node = {site.node: site for site in sites}
    nodes = {node.name: node for node in gm.graph.nodes}
    found = {}
    for site in sites:
        if site.op in READERS:
            node = nodes[site.node]
            maker = _maker(arguments(node)[OPERANDS[str(node.target)].activation], by_node)
            if maker is not None:
                found[site.name] = maker.name
    return found


def _maker(x: Node, by_node: Mapping[str, Site]) -> Site | None:
    """The site behind x, through what its kernel takes over; None if others read it on the way."""
    while True:
        site = by_node.get(x.name)
        if site is not None and site.op in MAKERS:
            return site if len(x.users) == 1 or site.op == "residual" else None
        if x.target not in FUSED or len(x.users) > 1:
            return None
        x = arguments(x)[0]
