"""The `mpq::` ops: one folder per op, its contract here, one file per implementation.

A contract is an equation, a schema, a reference in plain PyTorch that serves any device, strides
and size, a fake and an exact derivative.  Importing this package makes `torch.ops.mpq` complete.
Codes have one element each, int4 too: packing belongs to kernels and plan files.
"""

from __future__ import annotations

from mpq_fx.kernels import conv, embedding, linear, quantize

__all__ = ["conv", "embedding", "linear", "quantize"]
