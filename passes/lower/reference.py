"""mpq:: ops as they are, node by node in plain PyTorch: the oracle that every other target must
equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import FORMATS
from mpq_fx.graph import SITE
from mpq_fx.passes.lower.target import Compiled, Lowered, Target

mpq = torch.ops.mpq
BF16 = Choice("bfloat16", "bfloat16")
FP16 = Choice("float16", "float16")
STATIC = Choice("int8", "uint8_tensor", "static")
DYNAMIC = Choice("int8", "int8", "dynamic")
FP8 = (
    Choice("fp8_e4m3", "fp8_e4m3", "dynamic"),
    Choice("fp8_e4m3", "fp8_e4m3_tensor", "static"),
    Choice("fp8_e4m3", "bfloat16"),
)

CHOICES = {
    "linear": (
        BF16,
        FP16,
        STATIC,
        DYNAMIC,
        Choice("int8", "int8_tensor", "static"),
        Choice("int8", "int8_asym", "dynamic"),
        Choice("int8", "bfloat16"),
        Choice("int4", "bfloat16"),
        Choice("int4_g32", "bfloat16"),
        Choice("int4_asym", "bfloat16"),
        Choice("int4_progressive", "int8", "dynamic"),
        Choice("int4", "int8", "dynamic"),
        Choice("int4", "int4_row", "dynamic"),
        Choice("int4", "int4", "dynamic"),
        *FP8,
    ),
    "conv": (
        BF16,
        FP16,
        STATIC,
        Choice("int8", "int8_tensor", "static"),
        Choice("int8", "bfloat16"),
    ),
    "embedding": (BF16, Choice("int8", "float32"), Choice("int4_g32", "float32")),
    "residual": (BF16, STATIC),
    "matmul": (BF16, FP16),
    "attention": (BF16, FP16),
    "grouped_matmul": (BF16,),
}


def refuse(site: Site, choice: Choice) -> Iterator[str]:
    """The reference runs every choice on float32 and 16-bit float models."""
    if site.dtype not in FORMATS:
        yield f"a site in {site.dtype} stays as it is"


def measure(site: Site, choice: Choice) -> float:
    """The oracle has no speed; its cost is the bits that one call multiplies (MAC · bits)."""
    return site.macs * _bits(choice.weight) * _bits(choice.activation) / 1e12


def _bits(name: str) -> int:
    """Of one value; a site's own dtype need not be a format."""
    return FORMATS[name].element.bits if name in FORMATS else getattr(torch, name).itemsize * 8


def lower(gm: GraphModule, mode: str) -> Lowered:
    """Nothing to replace: the reference implementation is the op's default."""
    callees = [mpq.linear.default, mpq.conv.default, mpq.embedding.default]
    return Lowered(
        {
            name: str(node.target)
            for node in gm.graph.nodes
            if node.target in callees
            for name in node.meta[SITE]
        }
    )


def compile_eager(gm: GraphModule, example_inputs: Sequence[Any], mode: str) -> Compiled:
    """Node by node, outside of the user's autocast: its casts are in the graph already."""
    gm.recompile()

    def run(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return gm.forward(*args)

    return Compiled(run)


REFERENCE = Target(
    "reference", lambda: "", CHOICES, refuse, measure, lower, compile_eager, is_timed=False
)
