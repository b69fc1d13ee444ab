"""ms of a site on oneDNN: the matmul on packed weights; and of a pass that converts its input; and
what they say about how to compile a plan
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mpq_fx.facts import Choice, Site
from mpq_fx.passes.lower import cpu, weight_only
from mpq_fx.passes.lower.aten_cost import FLOATS, handed_over
from mpq_fx.passes.lower.inductor import ALL, INT8
from mpq_fx.passes.lower.microbenchmark import milliseconds
from mpq_fx.passes.lower.signal import image_window
from mpq_fx.passes.lower.target import Planned

onednn, mkldnn, aten = torch.ops.onednn, torch.ops.mkldnn, torch.ops.aten


# Share of their time that calling small matmuls takes, from which on templates are tried first.
INTEGER_CALLS, FLOAT_CALLS = 0.2, 0.4


def modes(planned: Planned) -> tuple[str, ...]:
    """Ways to compile a plan, the most promising first.

    A template saves a matmul the fixed cost of a call into oneDNN, and an integer one also gains by
    what is fused behind it; a large matmul is faster in oneDNN.
    """
    matmuls = [(choice.scaling, ms) for site, choice, ms in planned if is_matmul(site)]
    integers = [ms for scaling, ms in matmuls if scaling == "static"]
    floats = [ms for scaling, ms in matmuls if scaling == "none"]
    found = {"": 1.0}
    if any(choice.scaling == "static" for _, choice, _ in planned):
        found[INT8] = calling(integers) / INTEGER_CALLS
    if any(choice.activation == "bfloat16" for _, choice, _ in planned):
        # Templates for all are templates for integers, too: where those do not pay, they come last.
        found[ALL] = min(calling(floats) / FLOAT_CALLS, found.get(INT8, float("inf")))
    return tuple(sorted(found, key=found.__getitem__, reverse=True))


def calling(ms: Sequence[float]) -> float:
    """Share of the time of some matmuls that is the fixed cost of calling them."""
    return call_overhead() * len(ms) / sum(ms) if sum(ms) else 0.0


def measure(site: Site, choice: Choice) -> float:
    """Measured on random data of the site's shapes: latency does not depend on values."""
    with torch.inference_mode(False), torch.no_grad():
        x = (
            torch.randn([int(size) for size in site.input_shape])
            if site.op != "embedding"
            else None
        )
        kernel = kernel_of(site, choice)(site, choice, x)
        saved = call_overhead() if is_matmul(site) and choice.scaling == "static" else 0.0
        return max(milliseconds(kernel) - saved, 0.0)


def kernel_of(site: Site, choice: Choice) -> Callable[[Site, Choice, Any], Callable[[], Any]]:
    """What is timed: oneDNN's ops where it packs weights of these floats."""
    if choice.scaling == "none" and not cpu.packs(getattr(torch, choice.activation)):
        return FLOATS[site.op]
    return linear if is_matmul(site) else KERNELS[site.op]


def is_matmul(site: Site) -> bool:
    """Does it run as a linear?"""
    return site.op == "linear" or is_pointwise(site)


def is_pointwise(site: Site) -> bool:
    """Is it a 1x1 convolution, which runs as a matmul over pixels?"""
    if site.op != "conv" or any(size != 1 for size in site.weight_shape[2:]):
        return False
    _, padding, _, groups = site.attributes
    return len(site.weight_shape) == 4 and groups == 1 and not any(padding)


def convert(site: Site, before: Choice | None, after: Choice) -> float:
    """Between two sites one pass that reads one format and writes the other, unless they agree.

    Behind any other op Inductor fuses a cast and a static quantization into the kernel that makes
    x, which leaves what they write.  A dynamic scale needs every value before it codes the first.
    """
    if site.op not in ("linear", "conv"):
        return 0.0
    shape = [int(size) for size in site.input_shape]
    with torch.inference_mode(False), torch.no_grad():
        if after.scaling == "dynamic":
            x = torch.randn(shape)
            return milliseconds(lambda: (torch.aminmax(x), x.to(torch.int8)))
        codes = torch.empty(shape, dtype=handed_over(site, after))
        if before is None:
            return 0.0 if after.activation == site.dtype else milliseconds(codes.zero_)
        made = torch.empty(shape, dtype=handed_over(site, before))
        if made.dtype == codes.dtype:
            return 0.0
        return milliseconds(lambda: codes.copy_(made))


@cache
def call_overhead() -> float:
    """ms of a quantized matmul that is all overhead, which a template in its place has not."""
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    return milliseconds(_integer_linear(codes, torch.zeros(16, 16)))


def linear(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    n, k = site.weight_shape[:2]
    x = _pixels(site, x) if site.op == "conv" else x.reshape(-1, k)
    w, bias = torch.randn(n, k), torch.randn(n)
    if choice.scaling == "none":
        dtype = getattr(torch, choice.activation)
        if choice.weight != choice.activation:
            return weight_only.kernel(x, w, choice.weight)
        packed = mkldnn._reorder_linear_weight(w.to(dtype), x.shape[0])
        args = (x.to(dtype), packed, bias.to(dtype), "none", [], "")
        return lambda: mkldnn._linear_pointwise(*args)
    codes = torch.randint(0, 127, x.shape, dtype=torch.uint8)
    kernel = _integer_linear(codes, w)
    if choice.scaling == "static":
        return kernel
    scale, y = torch.rand(x.shape[0], 1), torch.randn(x.shape[0], n)
    return lambda: (kernel(), torch.addcmul(bias, y, scale))  # row scales stay outside of oneDNN


def _integer_linear(codes: Tensor, w: Tensor) -> Callable[[], Any]:
    n = w.shape[0]
    packed = onednn.qlinear_prepack(w.clamp(-1, 1).mul(127).to(torch.int8), None)
    weight = (packed, torch.ones(n), torch.zeros(n, dtype=torch.int32), torch.randn(n))
    args = (codes, 0.1, 0, *weight, 1.0, 0, torch.float32, "none", [], "none")
    return lambda: onednn.qlinear_pointwise.default(*args)


def _pixels(site: Site, x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B·H'·W', C]: the rows that a 1x1 convolution of some stride multiplies."""
    down, across = site.attributes[0]
    return x[:, :, ::down, ::across].movedim(1, -1).reshape(-1, x.shape[1]).contiguous()


def conv(site: Site, choice: Choice, x: Any) -> Callable[[], Any]:
    w, bias = torch.randn(site.weight_shape), torch.randn(site.weight_shape[0])
    # A signal is an image of one row.
    x, w = (t.unsqueeze(2) if t.dim() == 3 else t for t in (x, w))
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    *window, groups = site.attributes
    make = float_conv if choice.scaling == "none" else integer_conv
    return make((*image_window(*window), groups), choice, x, w, bias)


def float_conv(
    window: Sequence[Any], choice: Choice, x: Tensor, w: Tensor, bias: Tensor
) -> Callable[[], Any]:
    stride, padding, dilation, groups = window
    x, w, bias = (t.to(getattr(torch, choice.activation)) for t in (x, w, bias))
    packed = mkldnn._reorder_convolution_weight(w, padding, stride, dilation, groups, x.shape)
    args = (x, packed, bias, padding, stride, dilation, groups, "none", [], "")
    return lambda: mkldnn._convolution_pointwise(*args)


def integer_conv(
    window: Sequence[Any], choice: Choice, x: Tensor, w: Tensor, bias: Tensor
) -> Callable[[], Any]:
    codes, scales = torch.zeros_like(x, dtype=torch.uint8), torch.ones(w.shape[0])
    packed = onednn.qconv_prepack(w.to(torch.int8), scales, 0.1, 0, *window, x.shape)
    zeros = torch.zeros(w.shape[0], dtype=torch.int32)
    weight = (packed, scales, zeros, bias)
    args = (codes, 0.1, 0, *weight, *window, 1.0, 0, torch.float32, "none", [], "")
    return lambda: onednn.qconv_pointwise.default(*args)


KERNELS = {**FLOATS, "linear": linear, "conv": conv}
