"""What oneDNN runs on this CPU: the choices of target "cpu", and why not every one of them"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.passes.lower import cpu, weight_only
from mpq_fx.passes.lower.constants import INLINED
from mpq_fx.passes.lower.reference import FP8

BF16 = Choice("bfloat16", "bfloat16")
STATIC = Choice("int8", "uint8_tensor", "static")
STATIC7 = Choice("int8", "int7_tensor", "static")
DYNAMIC = Choice("int8", "int8", "dynamic")

# FP8 is refused with a reason, so that the ledger says why what a GPU offers is missing.
CHOICES = {
    "linear": (BF16, STATIC, DYNAMIC, STATIC7, *weight_only.CHOICES, *FP8),
    "conv": (BF16, STATIC, STATIC7),
    "embedding": (BF16, Choice("int8", "float32")),
    "residual": (BF16, STATIC),
    "matmul": (BF16,),
    "attention": (BF16,),
    "grouped_matmul": (BF16,),
}


def unavailable() -> str:
    return "" if torch.backends.mkldnn.is_available() else "this build of PyTorch has no oneDNN"


def refuse(site: Site, choice: Choice) -> Iterator[str]:
    """Why a choice cannot run, or cannot run exactly, on this CPU."""
    if site.dtype not in ("float32", "bfloat16"):
        yield f"a site in {site.dtype} stays as it is"
    if site.weight_shape and site.weight_shape[0] <= INLINED:
        yield f"{site.weight_shape[0]} outputs are too few to gain, and too few to refresh in place"
    if any(format_named(name).has_float_codes for name in (choice.weight, choice.activation)):
        yield "this CPU multiplies no 8-bit floats; int8 takes as many bytes"
        return
    yield from refuse_integers(choice)
    if choice.scaling != "none" and len(site.input_shape) == 1:
        yield "oneDNN multiplies rows of codes, and a call has one vector"
    if site.op == "linear" and choice in weight_only.CHOICES:
        yield from weight_only.refuse(site, choice)
    if choice.weight == "bfloat16" and not cpu.has("avx512"):
        yield "bfloat16 is emulated on a CPU without AVX-512"


def refuse_integers(choice: Choice) -> Iterator[str]:
    """Why integers by integers are not multiplied, or not exactly."""
    if choice.scaling == "dynamic" and choice != DYNAMIC:
        yield f"with dynamic scales there is a kernel for {DYNAMIC} only"
    integer = choice.scaling != "none"
    if integer and not cpu.has("vnni") and choice.activation != "int7_tensor":
        yield "int8 × int8 saturates silently on a CPU without VNNI; int7 activations do not"
    if choice.activation == "int7_tensor" and cpu.has("vnni"):
        yield "this CPU multiplies int8 exactly, so 7-bit codes only lose accuracy"
