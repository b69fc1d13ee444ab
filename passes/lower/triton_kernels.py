"""Every Triton kernel that the target `triton` has, best first: the only place that knows order

Imported when a graph is lowered or a choice is judged, since it needs the package triton.
"""

from __future__ import annotations

from mpq_fx.kernels.linear.triton_float8 import FLOAT8
from mpq_fx.kernels.linear.triton_int4 import INT4
from mpq_fx.kernels.linear.triton_int8 import INT8
from mpq_fx.kernels.linear.triton_linear import LinearKernel
from mpq_fx.kernels.linear.triton_weight_only import WEIGHT_ONLY
from mpq_fx.kernels.tile import Machine
from mpq_fx.passes.lower.kernel import Kernel
from mpq_fx.passes.lower.triton import NAME
from mpq_fx.passes.lower.triton_embedding import embedding_kernel
from mpq_fx.passes.lower.triton_linear import linear_kernel
from mpq_fx.passes.lower.triton_quantize import quantize_kernels

# Before int8, which runs 4-bit codes of two levels as well, but reads a byte for each
LINEAR: tuple[LinearKernel, ...] = (INT4, INT8, FLOAT8, WEIGHT_ONLY)


def kernels(machine: Machine) -> dict[str, Kernel]:
    """What the target asks in turn.  A linear takes the quantization behind it over, and so comes
    before those by themselves.
    """
    return {
        **{f"mpq_triton.{k.name}": linear_kernel(k, machine, NAME) for k in LINEAR},
        "mpq_triton.embedding": embedding_kernel(NAME),
        **quantize_kernels(NAME),
    }
