"""value = (codes - zero) * scale: what an op sums, what its sum is multiplied by, and gradients.

Codes carry no gradient, only floats do; rounding is not smoothed here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq_fx.formats import Format
from mpq_fx.numerics import block_sums, spread


def steps(codes: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """codes - zero in float64, which sums products of codes exactly; a plain float is cast"""
    if fmt.is_plain:
        return codes.to(fmt.dtype).double()
    return codes.double() - spread(zero, fmt, codes.shape[-1])


def values(codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """(codes - zero) * scale in float64"""
    counted = steps(codes, zero, fmt)
    return counted if fmt.is_plain else counted * spread(scale, fmt, codes.shape[-1]).double()


def summand(codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(what goes into the sum over K, what multiplies the sum)

    One scale per tensor or row leaves the sum, which is then exact; scales of groups stay in it.
    """
    if not fmt.is_plain and fmt.block <= 0:
        return steps(codes, zero, fmt), scale.float()
    one = torch.ones((), dtype=torch.float32, device=codes.device)
    return values(codes, scale, zero, fmt), one


def gradients(
    grad: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format
) -> tuple[Tensor | None, Tensor | None]:
    """∂L/∂value -> (∂L/∂codes of a plain float, ∂L/∂scale of a scaled format)"""
    if fmt.is_plain:
        return grad.to(codes.dtype), None
    return None, block_sums(grad * steps(codes, zero, fmt), fmt, scale).to(scale.dtype)
