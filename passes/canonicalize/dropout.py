"""dropout(x, p, train=False)  ->  x"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

aten = torch.ops.aten
DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)


def remove_dropout(gm: GraphModule) -> int:
    found = 0
    for target in DROPOUTS:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            x, p, train = node.args
            if train and p != 0:
                continue
            node.replace_all_uses_with(x)
            gm.graph.erase_node(node)
            found += 1
    return found
