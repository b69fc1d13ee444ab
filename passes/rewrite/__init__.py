"""float op  ->  target-neutral quantized form, one function per op; weights stay values in the
graph.

plain floats      y = op(cast(x), cast(w), cast(b)), cast back to the user's dtype
scaled formats    y = mpq::op(quantize(x), quantize_weight(w), b)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.graph import SITE, check, remove_dead, run_passes, signature_of
from mpq_fx.passes.analyze.replay import Scales
from mpq_fx.passes.rewrite.cancel_casts import cancel_casts, sink_casts
from mpq_fx.passes.rewrite.cancel_quantize import cancel_quantize
from mpq_fx.passes.rewrite.embedding import rewrite_embedding
from mpq_fx.passes.rewrite.float_op import rewrite_float
from mpq_fx.passes.rewrite.hoist import hoist_narrowing
from mpq_fx.passes.rewrite.merge_linear import merge_linear
from mpq_fx.passes.rewrite.merge_quantize import merge_quantize
from mpq_fx.passes.rewrite.quantized import rewrite_quantized
from mpq_fx.passes.rewrite.residual import rewrite_residual

SCALED = {"linear": rewrite_quantized, "conv": rewrite_quantized, "embedding": rewrite_embedding}

CLEANUP = (
    cancel_quantize,  # before merge_quantize, which would compare quantizations it removes
    merge_quantize,  # q/k/v quantize the tensor they share once
    sink_casts,  # before cancel_casts: brings an upcast next to the downcast behind a view
    cancel_casts,
    hoist_narrowing,  # after merge_quantize: a pooling with one reader left
    merge_quantize,  # the casts of q, k and v, now in front of the slices of their joined linear
    cancel_casts,
)


def rewrite(
    gm: GraphModule, sites: Sequence[Site], choices: Mapping[str, Choice], scales: Scales
) -> int:
    """Every site with a choice into its quantized form; the number of sites changed."""
    nodes = {node.name: node for node in gm.graph.nodes}
    for site in sites:
        nodes[site.node].meta[SITE] = (site.name,)
    signature, changed = signature_of(gm), 0
    merge_linear(gm, sites, choices)
    by_name = {site.name: site for site in sites}
    for node in [n for n in gm.graph.nodes if SITE in n.meta and n.op == "call_function"]:
        site = by_name[node.meta[SITE][0]]
        choice = choices.get(site.name)
        if choice is None or choice.weight == site.dtype or not is_site(node, site):
            continue
        if site.op == "residual":
            rewrite_residual(gm, node, site, choice, scales)
        elif format_named(choice.weight).is_plain:
            rewrite_float(node, choice)
        else:
            SCALED[site.op](gm, node, site, choice, scales)
        changed += 1
    remove_dead(gm)
    check(gm, signature, "rewrite")
    run_passes(gm, CLEANUP)
    return changed


def is_site(node: Node, site: Site) -> bool:
    """The op of the site itself, not a slice or a constant that was inserted on its behalf."""
    return node.name == site.node or node.target is torch.ops.aten.linear.default
