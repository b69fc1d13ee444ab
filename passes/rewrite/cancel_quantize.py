"""quantize(dequantize(codes, s, z), s, z)  ->  codes"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.passes.rewrite.residual import CODES

mpq = torch.ops.mpq


def cancel_quantize(gm: GraphModule) -> int:
    """A site that reads a stored residual in the residual's own format reads its codes."""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target is not mpq.quantize.default or CODES not in node.args[0].meta:
            continue
        x, scale, zero, fmt = node.args
        codes = x.meta[CODES]
        _, known_scale, known_zero, known_fmt = codes.args
        if fmt == known_fmt and all(
            torch.equal(getattr(gm, a.target), getattr(gm, b.target))
            for a, b in ((scale, known_scale), (zero, known_zero))
        ):
            node.replace_all_uses_with(codes)
            gm.graph.erase_node(node)
            found += 1
    return found
