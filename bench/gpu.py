"""Triton kernels on the GPU at hand: right first, then microseconds beside those of PyTorch.

    python bench/gpu.py [--models llama-3-8b,bert-base] [--rows 1,16] [--peers torchao,gemlite]
                        [--search] [--json] [--save]

Linear layers of four models (those that read one tensor are joined) and the quantizations in front
of them.  A result is compared with the reference op on the same codes, in float32, before it is
timed; a wrong one ends the run.  Times are medians with a cold L2 cache, variants by turns, plain
launches: our kernels have a bias, scales and a bfloat16 result in them, `torch._int_mm` its bare
product (of 32 rows where there are fewer: it takes no less than 17), `torch._scaled_mm` scales by
row and column and a bias.  Layers of torchao and gemlite (gpu_peers.py) start from x in bfloat16;
beside their dynamic ones stand ours with the quantization of x in front, as `quantize + …`.  The
float error of all of them is against the float64 product of the layer before it was quantized.
`--search` times every tile that a kernel proposes for each shape and keeps what is better than
its own in its tuned.json, before anything is compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_layers import LAYERS, ROWS, Layer
from gpu_peers import PACKAGES, Floats, baselines, drawn, running, versions
from gpu_table import FORMATS, QUANTIZE, page
from torch import Tensor

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import Format, format_named
from mpq_fx.passes.lower import triton as target
from mpq_fx.passes.lower.triton_device import Device

mpq = torch.ops.mpq
FILE = Path(__file__).parents[1] / "docs" / "benchmarks" / "gpu.json"
OURS = ("mpq-fx", "torch", "triton")
ROUNDS, MS = 5, 20  # each variant is timed in so many turns, for so long
Timer = Callable[[Callable[[], Any]], float]  # microseconds of a call


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
    bytes: float | None = None  # to move: operands once, the result once; None of a baseline
    error: float | None = None  # relative RMS against the reference op; None of a baseline
    limit: float | None = None
    float_error: float | None = None  # relative RMS against the layer in float64


@dataclass(frozen=True)
class LeftOut:
    """A baseline that is not installed, or that failed on a layer."""

    model: str
    layer: str
    rows: int
    variant: str
    reason: str


@dataclass(frozen=True)
class Operands:
    """A layer's operands in a choice: codes with scales, or floats, as the reference takes them."""

    x: tuple[Tensor, Tensor, Tensor]
    w: tuple[Tensor, Tensor, Tensor]
    bias: Tensor
    x_fmt: Format
    w_fmt: Format


def operands(floats: Floats, choice: Choice) -> Operands:
    """A layer quantized by the reference ops."""
    x_fmt, w_fmt = format_named(choice.activation), format_named(choice.weight)
    w = mpq.quantize_weight(floats.w.float(), w_fmt.name)
    x, none = floats.x.float(), torch.empty(0, device=floats.x.device)
    if x_fmt.scale is None:
        codes = (x.to(x_fmt.dtype), none, none.int())
    elif choice.scaling == "dynamic":
        codes = mpq.quantize_dynamic(x, x_fmt.name)
    else:
        scale, zero = static_scale(x, x_fmt)
        codes = (mpq.quantize(x, scale, zero, x_fmt.name), scale, zero)
    return Operands(codes, w, floats.bias.float(), x_fmt, w_fmt)


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


def kernel_calls(layer: Layer, floats: Floats, device: Device) -> Iterator[Any]:
    """(choice, kernel, call, operands) of each choice that a kernel takes."""
    from mpq_fx.kernels.linear.triton_epilogue import Epilogue
    from mpq_fx.kernels.linear.triton_linear import Call
    from mpq_fx.kernels.quantize.triton import stored

    site = site_of(layer, len(floats.x))
    for choice in target.CHOICES["linear"]:
        kernel = target.kernel_of(site, choice, device)
        if kernel is None:
            continue
        given = operands(floats, choice)
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


def checked(kernel: Any, call: Any, given: Operands, rows: Tensor) -> tuple[float, float]:
    """(relative RMS error of the float32 result, what rounding explains); SystemExit above it."""
    from mpq_fx.kernels.linear.triton_linear import in_tuned_tile

    exact = replace(call, epilogue=replace(call.epilogue, dtype=torch.float32, bias=given.bias))
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


def moved(call: Any, x: Tensor | None = None) -> float:
    """Bytes of the operands, of x instead of its codes where that is given; of a bfloat16 result"""
    parts = [call.x if x is None else x, *call.packed]
    return sum(t.numel() * t.element_size() for t in parts) + 2.0 * len(call.x) * call.n


def from_float(x: Tensor, kernel: Any, call: Any) -> Tensor:
    """The layer from x as it comes: quantized by row, then the kernel."""
    from mpq_fx.kernels.quantize.triton import launch_dynamic

    codes, scale, _ = launch_dynamic(x, None, call.x_fmt, "none")
    return kernel.launch(replace(call, x=codes, x_scale=scale.reshape(-1)))


Ours = dict[str, tuple[Callable[[], Tensor], dict[str, Any]]]  # {variant: (call, facts)}


def ours(layer: Layer, floats: Floats, device: Device) -> Ours:
    """Each choice that a kernel takes, seen to be right; those that peers have also from floats."""
    from mpq_fx.kernels.linear.triton_linear import in_tuned_tile

    found: Ours = {}
    for choice, kernel, call, given in kernel_calls(layer, floats, device):
        error, limit = checked(kernel, call, given, floats.checked)
        cut = in_tuned_tile(kernel, call)
        run = partial(kernel.launch, cut)
        facts = {"kernel": kernel.name, "bytes": moved(call), "error": error, "limit": limit}
        found[choice.name] = run, {**facts, "float_error": floats.error(run())}
        if choice.name in FORMATS and choice.scaling == "dynamic":
            run = partial(from_float, floats.x, kernel, cut)
            facts = {"kernel": f"quantize_dynamic, {kernel.name}", "bytes": moved(call, floats.x)}
            found[QUANTIZE + choice.name] = run, {**facts, "float_error": floats.error(run())}
    return found


def compare(
    layer: Layer,
    rows: int,
    device: Device,
    at: torch.device,
    time: Timer,
    packages: Sequence[str] = PACKAGES,
) -> tuple[list[Timed], list[LeftOut]]:
    """Every variant of one layer, by turns; and the baselines that cannot run."""
    floats = drawn(layer.n, layer.k, rows, at)
    kept, left_out = running(baselines(floats, packages), floats)
    variants: Ours = {
        name: (each.call, {"kernel": "", "float_error": each.float_error})
        for name, each in kept.items()
    }
    variants |= ours(layer, floats, device)
    turns = [{name: time(call) for name, (call, _) in variants.items()} for _ in range(ROUNDS)]
    timed = [
        Timed(
            *(layer.model, layer.name, layer.n, layer.k, rows, name),
            microseconds=median(turn[name] for turn in turns),
            **facts,
        )
        for name, (_, facts) in variants.items()
    ]
    about = layer.model, layer.name, rows
    return timed, [LeftOut(*about, name, reason) for name, reason in left_out.items()]


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
    """Time the tiles that each kernel proposes beside the one that it takes now; a better one goes
    to its tuned.json.
    """
    from mpq_fx.kernels.linear.triton_linear import in_tuned_tile, keep_tile

    found = 0
    for layer in layers:
        for m in rows:
            for _, kernel, call, _ in kernel_calls(layer, drawn(layer.n, layer.k, m, at), device):
                tiles = kernel.configurations(m, layer.n, layer.k, device.machine)
                now = in_tuned_tile(kernel, call)
                cut = [now, *(replace(call, tile=tile) for tile in tiles)]
                times = {c.tile: microseconds(partial(kernel.launch, c)) for c in cut}
                best = min(times, key=lambda tile: times[tile])
                if best is not None and best != now.tile:
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
    made.add_argument("--peers", default=",".join(PACKAGES), help="packages to stand beside")
    made.add_argument("--search", action="store_true", help="tune the tiles of every shape first")
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    made.add_argument("--save", action="store_true", help="write docs/benchmarks/gpu.json and .md")
    options = made.parse_args(arguments)
    packages = packages_of(options.peers)
    device, at = device_at_hand(), torch.device("cuda")
    layers = [layer for layer in LAYERS if layer.model in options.models.split(",")]
    rows = [int(count) for count in options.rows.split(",")]
    if options.search:
        search(layers, rows, device, at)
    found = results(layers, rows, device, at, microseconds, packages)
    if options.save:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        FILE.with_suffix(".md").write_text(page(found))
    print(json.dumps(found, indent=1) if options.json else page(found))


def packages_of(names: str) -> list[str]:
    """The packages named, separated by commas; SystemExit at another."""
    packages = [name for name in names.split(",") if name]
    if unknown := [name for name in packages if name not in PACKAGES]:
        raise SystemExit(f"no peer {', '.join(unknown)}\n  valid  {', '.join(PACKAGES)}")
    return packages


def results(
    layers: Sequence[Layer],
    rows: Sequence[int],
    device: Device,
    at: torch.device,
    time: Timer,
    packages: Sequence[str] = PACKAGES,
) -> dict[str, Any]:
    """Everything that was measured, with what it depends on."""
    cells = [compare(layer, m, device, at, time, packages) for layer in layers for m in rows]
    timed = [each for cell, _ in cells for each in cell]
    widths = dict.fromkeys(layer.k for layer in layers)
    timed += [t for k in widths for t in quantizations(k, max(rows), at, time)]
    return {
        "device": torch.cuda.get_device_name() if at.type == "cuda" else str(at),
        "architecture": device.machine.architecture,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in OURS} | versions(packages),
        "cuda": torch.version.cuda,
        "copy_gb_per_s": copy_bandwidth(at, time),
        "timed": [asdict(each) for each in timed],
        "left_out": [asdict(each) for _, left_out in cells for each in left_out],
    }


if __name__ == "__main__":
    main()
