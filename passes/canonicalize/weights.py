"""Which values of a graph depend on weights alone."""

from __future__ import annotations

from torch.fx import GraphModule, Node


def weight_values(gm: GraphModule) -> set[Node]:
    """Parameters, buffers that nobody writes to, and all that is computed from nothing else."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if is_weight(node) or (node.op == "call_function" and inputs and found.issuperset(inputs)):
            found.add(node)
    return found


def is_weight(node: Node) -> bool:
    """A placeholder that capture marked with the path of a parameter, or a constant of the graph."""
    return node.op == "get_attr" or (node.op == "placeholder" and "parameter" in node.meta)
