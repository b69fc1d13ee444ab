"""Triton kernels on the GPU at hand: right first, then microseconds beside those of PyTorch.

    python bench/gpu.py [--models llama-3-8b,bert-base] [--rows 1,16] [--search] [--json] [--save]

Linear layers of four models (those that read one tensor are joined) and the quantizations in front
of them.  A result is compared with the reference op on the same codes, in float32, before it is
timed; a wrong one ends the run.  Times are medians with a cold L2 cache, variants by turns: our
kernels have a bias, scales and a bfloat16 result in them, `torch._int_mm` its bare product (of 32
rows where there are fewer: it takes no less than 17), `torch._scaled_mm` scales by row and column
and a bias.  `--search` times every tile that a kernel proposes for each shape and keeps the best in
its tuned.json, before anything is compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_table import FLOAT, INT_MM, SCALED_MM, page
from torch import Tensor
from torch.nn import functional

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import Format, format_named
from mpq_fx.passes.lower import triton as target
from mpq_fx.passes.lower.triton_device import Device

mpq = torch.ops.mpq
FILE = Path(__file__).parents[1] / "docs" / "benchmarks" / "gpu.json"
ROWS = (1, 16, 64, 256, 1024, 4096)
ROUNDS, MS = 5, 20  # each variant is timed in so many turns, for so long
CHECKED = 64  # rows of a result that are compared: the first, the last, and some between
Timer = Callable[[Callable[[], Any]], float]  # microseconds of a call


@dataclass(frozen=True)
class Layer:
    """A linear of a model: [rows, K] by [N, K]."""

    model: str
    name: str
    n: int
    k: int


def layers_of(model: str, sizes: Mapping[str, tuple[int, int]]) -> tuple[Layer, ...]:
    return tuple(Layer(model, name, *size) for name, size in sizes.items())


LAYERS = (
    *layers_of(
        "llama-3-8b",
        {"qkv": (6144, 4096), "out": (4096, 4096), "up": (28672, 4096), "down": (4096, 14336)},
    ),
    *layers_of(
        "qwen2.5-7b",
        {"qkv": (4608, 3584), "out": (3584, 3584), "up": (37888, 3584), "down": (3584, 18944)},
    ),
    *layers_of(
        "flux",
        {
            "qkv": (9216, 3072),
            "out": (3072, 3072),
            "up": (12288, 3072),
            "down": (3072, 12288),
            "single in": (21504, 3072),
            "single out": (3072, 15360),
        },
    ),
    *layers_of(
        "bert-base",
        {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)},
    ),
)


@dataclass(frozen=True)
class Timed:
    """One variant of one layer at one number of rows."""

    model: str
    layer: str
    n: int
    k: int
    rows: int
    variant: str  # a choice of the target, or a baseline's name
    kernel: str
    microseconds: float
    bytes: float  # that have to be moved: operands once, the result once
    error: float | None = None  # relative RMS against the reference op; None of a baseline
    limit: float | None = None


@dataclass(frozen=True)
class Operands:
    """A layer's operands in a choice: codes with scales, or floats, as the reference takes them."""

    x: tuple[Tensor, Tensor, Tensor]
    w: tuple[Tensor, Tensor, Tensor]
    bias: Tensor
    x_fmt: Format
    w_fmt: Format


def operands(layer: Layer, rows: int, choice: Choice, device: torch.device) -> Operands:
    """Of normal numbers, quantized by the reference ops."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x_fmt, w_fmt = format_named(choice.activation), format_named(choice.weight)
    w = mpq.quantize_weight(drawn(layer.n, layer.k) / layer.k**0.5, w_fmt.name)
    x, none = drawn(rows, layer.k), torch.empty(0, device=device)
    if x_fmt.scale is None:
        codes = (x.to(x_fmt.dtype), none, none.int())
    elif choice.scaling == "dynamic":
        codes = mpq.quantize_dynamic(x, x_fmt.name)
    else:
        scale, zero = static_scale(x, x_fmt)
        codes = (mpq.quantize(x, scale, zero, x_fmt.name), scale, zero)
    return Operands(codes, w, drawn(layer.n), x_fmt, w_fmt)


def static_scale(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Of the values at hand, for the whole tensor."""
    _, scale, zero = mpq.quantize_dynamic(x, fmt.name)
    return scale, zero


def reference(given: Operands, rows: Tensor) -> Tensor:
    """The reference op in float32, on some rows."""
    x, scale, zero = given.x
    if scale.ndim and scale.numel() > 1:
        scale, zero = scale[rows], zero[rows]
    names = given.x_fmt.name, given.w_fmt.name
    return mpq.linear(x[rows], scale, zero, *given.w, given.bias, *names, torch.float32)


def site_of(layer: Layer, rows: int) -> Site:
    shape = {"input_shape": (rows, layer.k), "weight_shape": (layer.n, layer.k)}
    return Site(layer.name, "linear", layer.name, dtype="bfloat16", **shape)


def kernel_calls(layer: Layer, rows: int, device: Device, at: torch.device) -> Iterator[Any]:
    """(choice, kernel, call, operands) of each choice that a kernel takes."""
    from mpq_fx.kernels.linear.triton_epilogue import Epilogue
    from mpq_fx.kernels.linear.triton_linear import Call
    from mpq_fx.kernels.quantize.triton import stored

    site = site_of(layer, rows)
    for choice in target.CHOICES["linear"]:
        kernel = target.kernel_of(site, choice, device)
        if kernel is None:
            continue
        given = operands(layer, rows, choice, at)
        x, scale, zero = given.x
        packed = kernel.pack(*given.w, given.w_fmt)
        scaled = given.x_fmt.scale is not None
        is_shifted = scaled and not given.x_fmt.symmetric
        call = Call(
            stored(x, given.x_fmt),
            scale.reshape(-1) if scaled else None,
            zero.reshape(-1) if is_shifted else None,
            packed,
            given.x_fmt,
            given.w_fmt,
            layer.n,
            Epilogue(torch.bfloat16, bias=given.bias.to(torch.bfloat16)),
        )
        yield choice, kernel, call, given


def checked(kernel: Any, call: Any, given: Operands) -> tuple[float, float]:
    """(relative RMS error of the float32 result, what rounding explains); SystemExit above it."""
    from mpq_fx.kernels.linear.triton_linear import in_tuned_tile

    exact = replace(call, epilogue=replace(call.epilogue, dtype=torch.float32, bias=given.bias))
    rows = torch.linspace(0, len(call.x) - 1, min(len(call.x), CHECKED)).long().to(call.x.device)
    right = reference(given, rows).double()
    error = float(
        (kernel.launch(in_tuned_tile(kernel, exact))[rows].double() - right).norm() / right.norm()
    )
    limit = rounding(call)
    if not error <= limit:
        raise SystemExit(
            f"{kernel.name} is wrong: error {error:.2g}, and rounding explains {limit:.2g}, at M, "
            f"N, K = {len(call.x)}, {call.n}, {call.k} in {given.w_fmt} by {given.x_fmt}"
        )
    return error, limit


def rounding(call: Any) -> float:
    """Relative RMS error of a float32 sum of K products and of its result; and of what a tensor
    core of 8-bit floats sums before that is added in float32 (kernels/linear/triton_float8.py).
    """
    from mpq_fx.kernels.linear.triton_float8 import LONGEST

    k = call.k
    inexact = min(k, LONGEST) ** 0.5 * 2.0**-13 if call.x_fmt.has_float_codes else 0.0
    return inexact + (1 + k**0.5) * 2.0**-24


def baselines(
    layer: Layer, rows: int, at: torch.device, has_float8: bool
) -> dict[str, Callable[[], Any]]:
    """What PyTorch itself has for the same layer."""
    x = torch.randn(rows, layer.k, device=at, dtype=torch.bfloat16)
    w = torch.randn(layer.n, layer.k, device=at, dtype=torch.bfloat16)
    bias = torch.randn(layer.n, device=at, dtype=torch.bfloat16)
    padded = max(rows, 32) if rows < 17 else rows
    codes = torch.randint(-127, 128, (padded, layer.k), dtype=torch.int8, device=at)
    weight = torch.randint(-127, 128, (layer.n, layer.k), dtype=torch.int8, device=at).t()
    found: dict[str, Callable[[], Any]] = {
        FLOAT: lambda: functional.linear(x, w, bias),
        INT_MM: lambda: torch._int_mm(codes, weight),
    }
    if has_float8:
        x8, w8 = x.to(torch.float8_e4m3fn), (w / layer.k**0.5).to(torch.float8_e4m3fn).t()
        scales = torch.ones(rows, 1, device=at), torch.ones(1, layer.n, device=at)
        found[SCALED_MM] = lambda: torch._scaled_mm(
            x8, w8, *scales, bias=bias, out_dtype=torch.bfloat16
        )
    return found


def moved(call: Any) -> float:
    """Bytes of the operands and of a bfloat16 result."""
    parts = [call.x, *call.packed]
    return sum(t.numel() * t.element_size() for t in parts) + 2.0 * len(call.x) * call.n


def running(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Those that this GPU and this PyTorch can run; of the others the reason is printed."""
    kept = {}
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            print(f"{name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            kept[name] = call
    return kept


def compare(layer: Layer, rows: int, device: Device, at: torch.device, time: Timer) -> list[Timed]:
    """Every variant of one layer, by turns."""
    from mpq_fx.kernels.linear.triton_linear import in_tuned_tile

    calls = running(baselines(layer, rows, at, "float8" in device.peak))
    about: dict[str, dict[str, Any]] = {}
    for choice, kernel, call, given in kernel_calls(layer, rows, device, at):
        error, limit = checked(kernel, call, given)
        calls[choice.name] = partial(kernel.launch, in_tuned_tile(kernel, call))
        facts = {"kernel": kernel.name, "bytes": moved(call), "error": error, "limit": limit}
        about[choice.name] = facts
    turns = [{name: time(call) for name, call in calls.items()} for _ in range(ROUNDS)]
    floats = {"kernel": "", "bytes": 2.0 * (rows * (layer.k + layer.n) + layer.n * layer.k)}
    return [
        Timed(
            *(layer.model, layer.name, layer.n, layer.k, rows, name),
            microseconds=median(turn[name] for turn in turns),
            **about.get(name, floats),
        )
        for name in calls
    ]


QUANTIZED = (("int8", "none"), ("int8_asym", "none"), ("int8", "silu"), ("int8", "gelu"))


def quantizations(k: int, rows: int, at: torch.device, time: Timer) -> Iterator[Timed]:
    """Per token, with and without an activation in front; the bytes of x and of the codes."""
    from mpq_fx.kernels.quantize.triton import launch_dynamic

    x = torch.randn(rows, k, device=at, dtype=torch.bfloat16)
    for name, activation in QUANTIZED:
        fmt = format_named(name)
        found = median(
            time(lambda fmt=fmt, a=activation: launch_dynamic(x, None, fmt, a))
            for _ in range(ROUNDS)
        )
        label = name if activation == "none" else f"{activation}, {name}"
        about = ("quantize", f"rows of {k}", k, k, rows, label, "quantize_dynamic")
        yield Timed(*about, found, 3.0 * rows * k)


def copy_bandwidth(at: torch.device, time: Timer, numel: int = 1 << 28) -> float:
    """GB/s of copying one large tensor: read and written."""
    x = torch.zeros(numel, device=at, dtype=torch.int8)
    y = torch.empty_like(x)
    return 2e-3 * numel / median(time(lambda: y.copy_(x)) for _ in range(ROUNDS))


def search(layers: Sequence[Layer], rows: Sequence[int], device: Device, at: torch.device) -> int:
    """Time the tiles that each kernel proposes; the best of each shape goes to its tuned.json."""
    from mpq_fx.kernels.linear.triton_linear import keep_tile

    found = 0
    for layer in layers:
        for m in rows:
            for _, kernel, call, _ in kernel_calls(layer, m, device, at):
                tiles = kernel.configurations(m, layer.n, layer.k, device.machine)
                cut = [replace(call, tile=tile) for tile in tiles]
                times = {c.tile: microseconds(partial(kernel.launch, c)) for c in cut}
                best = min(times, key=lambda tile: times[tile])
                keep_tile(kernel, call, best)
                found += 1
    return found


def microseconds(call: Callable[[], Any]) -> float:
    """Median by CUDA events, the L2 cache cold."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, rep=MS, return_mode="median"))


def device_at_hand() -> Device:
    """The GPU, or SystemExit that says what is missing."""
    if not torch.cuda.is_available():
        raise SystemExit("nothing to measure: PyTorch sees no NVIDIA GPU")
    if reason := target.unavailable():
        raise SystemExit(f"nothing to measure: {reason}")
    found = target.device_at_hand()
    if found is None:
        raise SystemExit("nothing to measure: Triton's interpreter is on (TRITON_INTERPRET)")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--models", default=",".join(dict.fromkeys(x.model for x in LAYERS)))
    made.add_argument("--rows", default=",".join(map(str, ROWS)))
    made.add_argument("--search", action="store_true", help="tune the tiles of every shape first")
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    made.add_argument("--save", action="store_true", help="write docs/benchmarks/gpu.json and .md")
    options = made.parse_args(arguments)
    device, at = device_at_hand(), torch.device("cuda")
    layers = [layer for layer in LAYERS if layer.model in options.models.split(",")]
    rows = [int(count) for count in options.rows.split(",")]
    if options.search:
        search(layers, rows, device, at)
    found = results(layers, rows, device, at, microseconds)
    if options.save:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        FILE.with_suffix(".md").write_text(page(found))
    print(json.dumps(found, indent=1) if options.json else page(found))


def results(
    layers: Sequence[Layer], rows: Sequence[int], device: Device, at: torch.device, time: Timer
) -> dict[str, Any]:
    """Everything that was measured, with what it depends on."""
    timed = [t for layer in layers for m in rows for t in compare(layer, m, device, at, time)]
    widths = dict.fromkeys(layer.k for layer in layers)
    timed += [t for k in widths for t in quantizations(k, max(rows), at, time)]
    return {
        "device": torch.cuda.get_device_name() if at.type == "cuda" else str(at),
        "architecture": device.machine.architecture,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("mpq-fx", "torch", "triton")},
        "cuda": torch.version.cuda,
        "copy_gb_per_s": copy_bandwidth(at, time),
        "timed": [asdict(each) for each in timed],
    }


if __name__ == "__main__":
    main()
