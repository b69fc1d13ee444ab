"""A linear in what others have: PyTorch's own products, torchao, and gemlite.

All are made from one layer in bfloat16, and those of torchao and gemlite take x in bfloat16, add
the bias, and give bfloat16: a dynamic one quantizes x in the call.  torchao is compiled by Inductor
(max-autotune, the settings that torchao recommends, no CUDA graph), gemlite launches its kernels
itself, in the tiles that it ships or autotunes at the first call.  gemlite gets the int4 codes of
mpq, since it has only kernels for them; everything else is quantized by the package itself.

What is not installed, or fails on a layer, is left out with its reason.  Not run so far, for want
of a GPU: gemlite, which does not even import without one, and torchao's int4 and compiled CUDA
kernels.  A kernel that breaks the CUDA context ends the run, whoever launched it; and a call that
keeps the CPU longer than the GPU is kept by clearing its cache shows that in its time.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_table import FLOAT, INT_MM, SCALED_MM
from torch import Tensor, nn
from torch.nn import functional

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.formats import format_named

PACKAGES = ("torchao", "gemlite")
CHECKED = 64  # rows of a result that are compared: the first, the last, and some between
INT4 = format_named("int4")
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Floats:
    """A layer in bfloat16, x [M, K], w [N, K], bias [N]: what a variant is made from."""

    x: Tensor
    w: Tensor
    bias: Tensor

    @cached_property
    def checked(self) -> Tensor:
        """The rows of a result that are compared."""
        count = len(self.x)
        return torch.linspace(0, count - 1, min(count, CHECKED)).long().to(self.x.device)

    @cached_property
    def product(self) -> Tensor:
        """x · wᵀ + bias in float64, of the rows that are compared."""
        return functional.linear(self.x[self.checked].double(), self.w.double(), self.bias.double())

    def error(self, y: Tensor) -> float:
        """√(Σ (y - product)² / Σ product²): what a variant's rounding and its format cost."""
        return float((y[self.checked].double() - self.product).norm() / self.product.norm())


def drawn(n: int, k: int, rows: int, device: torch.device) -> Floats:
    """Normal numbers, the same ones for the same sizes."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    w = normal(n, k) / k**0.5
    return Floats(normal(rows, k).bfloat16(), w.bfloat16(), normal(n).bfloat16())


@dataclass(frozen=True)
class Baseline:
    """A call that was seen to run; its error, where it computes the layer."""

    call: Call
    float_error: float | None


def baselines(given: Floats, packages: Sequence[str]) -> dict[str, Callable[[], Call]]:
    """{variant: what makes its call}, of PyTorch and of some packages."""
    torch.compiler.reset()  # or Dynamo refuses after a few layers
    made = {FLOAT: float_linear, INT_MM: int_mm, SCALED_MM: scaled_mm}
    made |= {name: make for name, make in PEERS.items() if package_of(name) in packages}
    return {name: partial(make, given) for name, make in made.items()}


def running(
    makers: Mapping[str, Callable[[], Call]], given: Floats
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Those that this machine can run; of the others the reason."""
    kept, left_out = {}, {}
    for name, make in makers.items():
        try:
            call = make()
            y = call()
            if y.is_cuda:
                torch.cuda.synchronize()  # so that a failing kernel is this one's
            kept[name] = Baseline(call, error_of(name, y, given))
        except Exception as error:  # each package raises types of its own
            left_out[name] = reason(error)
            say(f"{name} left out: {left_out[name]}")
    return kept, left_out


@cache  # once, not for each layer
def say(line: str) -> None:
    print(line, file=sys.stderr)


def error_of(name: str, y: Tensor, given: Floats) -> float | None:
    """Against the layer; None of a product of other codes. RuntimeError of what is no result."""
    if name in (INT_MM, SCALED_MM):
        return None
    expected = (len(given.x), len(given.w))
    if y.shape != expected or y.dtype != torch.bfloat16:
        raise RuntimeError(f"gives {y.dtype} of {tuple(y.shape)}, not bfloat16 of {expected}")
    error = given.error(y)
    if not math.isfinite(error):
        raise RuntimeError("its result is not finite")
    return error


def reason(error: Exception) -> str:
    """In one line: of a package that is missing its name, of "... raised:" also what."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    count = 2 if lines and lines[0].endswith(":") else 1
    return " ".join([f"{type(error).__name__}:", *lines[:count]]).removesuffix(":")


def package_of(variant: str) -> str:
    """The package that has to be installed: of "torchao-mslk int4*bfloat16", torchao."""
    return variant.split()[0].split("-")[0]


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # the reason stands with each of its variants
    return found


def float_linear(given: Floats) -> Call:
    return partial(functional.linear, given.x, given.w, given.bias)


def int_mm(given: Floats) -> Call:
    """The bare product of codes: no scale, no bias; of 32 rows where there are fewer than 17."""
    (n, k), rows, device = given.w.shape, len(given.x), given.x.device
    padded = 32 if rows < 17 else rows
    codes = torch.randint(-127, 128, (padded, k), dtype=torch.int8, device=device)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device).t()
    return partial(torch._int_mm, codes, weight)


def scaled_mm(given: Floats) -> Call:
    """Codes that are given, scales by row and column, a bias."""
    (n, k), rows, device = given.w.shape, len(given.x), given.x.device
    x, w = given.x.to(torch.float8_e4m3fn), (given.w * k**0.5).to(torch.float8_e4m3fn).t()
    scales = torch.ones(rows, 1, device=device), torch.ones(1, n, device=device)
    return partial(torch._scaled_mm, x, w, *scales, bias=given.bias, out_dtype=torch.bfloat16)


def torchao(config: Callable[[Any], Any], given: Floats) -> Call:
    """nn.Linear quantized by `config` and compiled; what torchao sets for Inductor ends with it."""
    import torch._inductor.config as inductor
    from torchao import quantization

    linear = nn.Linear(*given.w.shape[::-1], device="meta")
    linear.weight = nn.Parameter(given.w, requires_grad=False)
    linear.bias = nn.Parameter(given.bias, requires_grad=False)
    with inductor.patch(inductor.get_config_copy()):
        quantization.quantize_(linear, config(quantization))
        if type(linear.weight) is nn.Parameter:  # torchao says nothing where it skips a layer
            raise RuntimeError(f"torchao leaves a weight of {tuple(given.w.shape)} as it is")
        run = torch.compile(
            linear, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False
        )
        run(given.x)
    return partial(run, given.x)


def gemlite(processor: str, given: Floats) -> Call:
    """A layer of gemlite.helper, which quantizes by row; int4 from the codes of mpq."""
    from gemlite import helper

    made = getattr(helper, processor)(device=given.w.device, dtype=torch.bfloat16)
    if processor != "A16W4_HQQ_INT":
        return partial(made.from_weights(given.w, given.bias), given.x)
    codes, scale, _ = torch.ops.mpq.quantize_weight(given.w.float(), INT4.name)
    middle = -INT4.qmin
    zero = torch.full_like(scale, middle)
    return partial(
        made.from_weights((codes + middle).to(torch.uint8), scale, zero, given.bias), given.x
    )


PEERS: dict[str, Callable[[Floats], Call]] = {
    "torchao int4*bfloat16": partial(
        torchao,
        lambda ao: ao.Int4WeightOnlyConfig(INT4.block, int4_packing_format="tile_packed_to_4d"),
    ),
    "torchao-mslk int4*bfloat16": partial(
        torchao, lambda ao: ao.Int4WeightOnlyConfig(INT4.block, int4_packing_format="plain")
    ),
    "torchao int8*bfloat16": partial(torchao, lambda ao: ao.Int8WeightOnlyConfig()),
    "torchao int8/dynamic": partial(torchao, lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
    "torchao fp8_e4m3/dynamic": partial(
        torchao,
        lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    ),
    "gemlite int4*bfloat16": partial(gemlite, "A16W4_HQQ_INT"),
    "gemlite int8*bfloat16": partial(gemlite, "A16W8_INT8"),
    "gemlite int8/dynamic": partial(gemlite, "A8W8_INT8_dynamic"),
    "gemlite fp8_e4m3/dynamic": partial(gemlite, "A8W8_FP8_dynamic"),
}
