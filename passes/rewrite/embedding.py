"""embedding(w, indices)  ->  mpq::embedding(indices, quantize_weight(w))"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
from mpq_fx.graph import insert_call, value
from mpq_fx.passes.analyze.replay import Scales
from mpq_fx.passes.rewrite.quantized import quantize_weight


def rewrite_embedding(
    gm: GraphModule, node: Node, site: Site, choice: Choice, scales: Scales
) -> None:
    """Gather rows of codes and scale them; padding and sparse gradients play no part in eval."""
    w, indices = node.args[:2]
    weight = quantize_weight(node, w, choice.weight)
    args = (indices, *weight, choice.weight, value(node).dtype)
    node.replace_all_uses_with(insert_call(node, torch.ops.mpq.embedding.default, args))
    gm.graph.erase_node(node)
