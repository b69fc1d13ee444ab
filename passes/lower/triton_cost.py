"""ms of a site on the GPU at hand, timed by events; and of a pass that converts its input

Without the GPU the roofline of its datasheet (triton_device) takes the place of all this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpq_fx.facts import Choice, Site
from mpq_fx.formats import Float, Format, format_named
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_linear import Call, LinearKernel, in_tuned_tile
from mpq_fx.kernels.quantize.triton import stored
from mpq_fx.passes.lower import aten_cost
from mpq_fx.passes.lower.triton_device import LAUNCH, Device, moving, numel, resolved

MS = 20  # of calls that are timed


def measured(site: Site, choice: Choice, kernel: LinearKernel | None) -> float:
    """Of the kernel if it has one, else of PyTorch's own, on random data of the site's shapes."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cuda"):
        if kernel is not None:
            call = call_of(site, choice, kernel)
            return milliseconds(lambda: kernel.launch(in_tuned_tile(kernel, call)))
        shape = [int(size) for size in site.input_shape]
        x = None if site.op == "embedding" else torch.randn(shape)
        return milliseconds(aten_cost.FLOATS[site.op](site, choice, x))


def milliseconds(call: Callable[[], Any]) -> float:
    """Median by CUDA events, with a cold L2 cache."""
    from triton.testing import do_bench

    return do_bench(call, rep=MS, return_mode="median")  # type: ignore[return-value]


def call_of(site: Site, choice: Choice, kernel: LinearKernel) -> Call:
    """A call of a linear on random codes; a bias and nothing else behind it."""
    (n, k), rows = site.weight_shape, numel(site.input_shape[:-1])
    x_fmt, w_fmt = format_named(choice.activation), format_named(choice.weight)
    w = codes_of(w_fmt, n, k)
    scale = torch.rand(w_fmt.scale_shape(w.shape)).to(w_fmt.scale)
    packed = kernel.pack(w, scale, torch.zeros_like(scale, dtype=torch.int32), w_fmt)
    x_scale = x_zero = None
    if x_fmt.scale is not None:
        x_scale = torch.rand(math.prod(x_fmt.scale_shape((rows, k)))).to(x_fmt.scale)
        x_zero = None if x_fmt.symmetric else torch.ones_like(x_scale, dtype=torch.int32)
    epilogue = Epilogue(getattr(torch, site.dtype), bias=torch.randn(n))
    x = stored(codes_of(x_fmt, rows, k), x_fmt)
    return Call(x, x_scale, x_zero, packed, x_fmt, w_fmt, n, epilogue)


def codes_of(fmt: Format, *shape: int) -> Tensor:
    if isinstance(fmt.element, Float):
        return torch.randn(*shape).to(fmt.dtype)
    return torch.randint(int(fmt.qmin), int(fmt.qmax) + 1, shape, dtype=fmt.dtype)


def measured_conversion(site: Site, before: Choice | None, after: Choice) -> float:
    """A pass that reads what the op before writes, and writes what the site reads; of a site whose
    kernel writes those codes itself 0.
    """
    if not is_converted(site, before, after):
        return 0.0
    from mpq_fx.kernels.quantize.triton import launch_dynamic, launch_static

    fmt = format_named(after.activation)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cuda"):
        x = torch.randn([int(size) for size in site.input_shape], dtype=written(site, before))
        if after.scaling == "dynamic":
            return milliseconds(lambda: launch_dynamic(x, None, fmt, "none"))
        if after.scaling == "static":
            scale, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
            return milliseconds(lambda: launch_static(x, None, scale, zero, fmt, "none"))
        return milliseconds(lambda: x.to(fmt.dtype))


def predicted_conversion(site: Site, before: Choice | None, after: Choice, device: Device) -> float:
    """The same by the bytes that the pass moves."""
    if not is_converted(site, before, after):
        return 0.0
    bits = 8 * written(site, before).itemsize + format_named(after.activation).element.bits
    return resolved(moving(bits * numel(site.input_shape), device) + LAUNCH)


def is_converted(site: Site, before: Choice | None, after: Choice) -> bool:
    """Is a pass needed?  Inductor fuses a cast into its neighbors, and an integer linear writes the
    codes of a static format itself; a dynamic scale needs every value before the first is coded.
    """
    if site.op not in ("linear", "conv") or after.scaling == "none":
        return False
    is_fused = before is not None and before.scaling != "none" and after.scaling == "static"
    return not is_fused


def written(site: Site, before: Choice | None) -> torch.dtype:
    """What is read: a site in floats wrote its own, anything else the user's."""
    if before is not None and before.scaling == "none":
        return getattr(torch, before.activation)
    return getattr(torch, site.dtype)
