"""() -> a call of PyTorch's own kernel for a site, on random data of its shapes: for its time

Where tensors are made is the caller's: `with torch.device(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpq_fx.facts import Choice, Site

aten = torch.ops.aten


def handed_over(site: Site, choice: Choice) -> torch.dtype:
    """What a site in a choice reads, and can write if the next one is in it too."""
    if choice.scaling == "static":
        return torch.uint8
    name = site.dtype if choice.scaling == "dynamic" else choice.activation
    return getattr(torch, name)


def float_only(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    """A convolution of three dimensions, or a transposed one: PyTorch's own kernel."""
    name = site.op if site.op == "conv3d" else f"conv_transpose{x.dim() - 2}d"
    kernel, dtype = getattr(torch.nn.functional, name), getattr(torch, choice.activation)
    x, w = x.to(dtype), torch.randn(site.weight_shape, dtype=dtype)
    return lambda: kernel(x, w, None, *site.attributes)


def residual(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    """Bound by memory: one sum written and read again in the width it is stored in."""
    kept = x.to(handed_over(site, choice))
    return lambda: torch.empty_like(kept).copy_(kept)


def matmul(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    """The second operand is rebuilt from the number of multiply-accumulates."""
    n = max(1, site.macs // max(1, x.numel()))
    x = x.to(getattr(torch, choice.activation))
    y = torch.randn(*x.shape[:-2], x.shape[-1], n, dtype=x.dtype) if x.dim() > 1 else x
    return lambda: x @ y


def attention(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    """Keys and values as wide as queries; how many there are follows from the work."""
    q = x.to(getattr(torch, choice.activation))
    count = site.macs // max(1, 2 * q.numel()) or q.shape[-2]
    k = torch.randn(*q.shape[:-2], count, q.shape[-1]).to(q.dtype)
    return lambda: aten.scaled_dot_product_attention(q, k, k)


def embedding(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    w = torch.zeros(site.weight_shape, dtype=getattr(torch, choice.weight))
    rows = torch.randint(0, w.shape[0], [int(size) for size in site.input_shape])
    return lambda: aten.embedding(w, rows)


def float_conv(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    """A convolution of one or two dimensions."""
    kernel, dtype = getattr(torch.nn.functional, f"conv{x.dim() - 2}d"), choice.activation
    w = torch.randn(site.weight_shape, dtype=getattr(torch, dtype))
    x = x.to(w.dtype)
    return lambda: kernel(x, w, None, *site.attributes)


def float_linear(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    w = torch.randn(site.weight_shape, dtype=getattr(torch, choice.activation))
    x = x.to(w.dtype)
    return lambda: aten.linear(x, w)


FLOATS = {
    "linear": float_linear,
    "conv": float_conv,
    "conv3d": float_only,
    "conv_transpose": float_only,
    "residual": residual,
    "matmul": matmul,
    "grouped_matmul": matmul,
    "attention": attention,
    "embedding": embedding,
}
