"""Quantization written out in ATen: the codes of the op, byte for byte, of integers and floats."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.formats import FORMATS, ROW, TENSOR, Format
from mpq_fx.graph import ops as calls_of
from mpq_fx.numerics import scale_and_zero
from mpq_fx.passes.lower.quantize_aten import decompose_quantize

mpq = torch.ops.mpq
CODED = [fmt for fmt in FORMATS.values() if not fmt.is_plain]
STATIC = pytest.mark.parametrize("fmt", [f for f in CODED if f.block == TENSOR], ids=str)
DYNAMIC = pytest.mark.parametrize(
    "fmt",
    [
        f
        for f in CODED
        if f.block == ROW and f.symmetric and not f.progressive and f.scale == torch.float32
    ],
    ids=str,
)


def graph_of(build) -> GraphModule:
    """A graph of one input with fake values where the pass reads them."""
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(6, 50, device="meta")
    root = torch.nn.Module()
    graph.output(build(graph, root, x))
    return GraphModule(root, graph)


def static_graph(fmt: Format, x: torch.Tensor) -> GraphModule:
    def build(graph, root, given):
        constants = []
        for name, part in zip(("scale", "zero"), scale_and_zero(x, fmt), strict=True):
            root.register_buffer(name, part)
            constants.append(graph.get_attr(name))
            constants[-1].meta["val"] = part
        node = graph.call_function(mpq.quantize.default, (given, *constants, fmt.name))
        node.meta["val"] = torch.empty(6, 50, dtype=fmt.dtype, device="meta")
        return node

    return graph_of(build)


def dynamic_graph(fmt: Format) -> GraphModule:
    def build(graph, root, given):
        node = graph.call_function(mpq.quantize_dynamic.default, (given, fmt.name))
        return [graph.call_function(operator.getitem, (node, k)) for k in range(2)]

    return graph_of(build)


def spoiled() -> torch.Tensor:
    """Values of many magnitudes, ties among them."""
    return torch.cat(
        [torch.randn(6, 25) * torch.logspace(-4, 2, 25), torch.arange(150).view(6, 25)], 1
    )


@STATIC
def test_static_codes_are_those_of_the_op_out_of_range_too(fmt):
    x = spoiled()
    gm = static_graph(fmt, x[:, :30])
    assert decompose_quantize(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert "quantize" not in calls_of(gm)
    want = mpq.quantize(x, gm.scale, gm.zero, fmt.name)
    assert torch.equal(gm(x).view(torch.uint8), want.view(torch.uint8))


@DYNAMIC
def test_dynamic_codes_and_scales_are_those_of_the_op(fmt):
    x, gm = spoiled(), dynamic_graph(fmt)
    x[0], x[1] = 0.0, 1e-42 * x[1]  # too small for a scale of their own
    assert decompose_quantize(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert "quantize" not in calls_of(gm)
    codes, scale = gm(x)
    want = mpq.quantize_dynamic(x, fmt.name)
    assert torch.equal(codes.view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(scale, want[1])
