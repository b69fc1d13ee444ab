"""Statistics of what each site reads: per-channel and per-token ranges, moments, outliers, scales.

Read from replays of the recorded calls, so that observing costs the user's calls one copy of their
inputs and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpq_fx.errors import CalibrationError
from mpq_fx.facts import Site
from mpq_fx.formats import Format
from mpq_fx.numerics import fake_quantize, scale_and_zero
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.sites import OPERANDS

READS = ("linear", "conv")  # sites whose input is quantized; of a residual it is the result
SAMPLE = 1 << 13  # values per call kept for the choice of a static range
PERCENTILES = (99.9, 99.99, 99.999)
SHRINKS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Observed:
    """Statistics of the activation of one site over the calls of the fit part."""

    minimum: float
    maximum: float
    mean: float
    variance: float
    channel_absmax: Tensor  # [K] (or [C] of a convolution), float32
    token_absmax: Tensor  # absmax of each token: what a per-token scale would see
    sample: Tensor  # up to SAMPLE values per call, extremes included, float32
    calls: int

    @property
    def outlier_score(self) -> float:
        """max_k absmax_k / median_k absmax_k: how far the loudest channel stands out."""
        typical = self.channel_absmax.median().item()
        return self.channel_absmax.max().item() / typical if typical > 0 else float("inf")

    @property
    def outlier_channels(self) -> Tensor:
        """Channels above six times the median range, loudest first."""
        ratio = self.channel_absmax / self.channel_absmax.median().clamp_min(1e-30)
        loud = (ratio > 6).nonzero().flatten()
        return loud[ratio[loud].argsort(descending=True)]


def observe(replay: Replayer, records: Sequence[Sequence[Any]]) -> dict[str, Observed]:
    """{site name: statistics of its activation}; raises CalibrationError for NaN or inf."""
    parts: dict[str, list[Observed]] = {}
    for inputs in records:
        env = replay.start(inputs)
        for node in replay.gm.graph.nodes:
            if node.op == "output":
                break
            site = replay.sites.get(node.name)
            reads = site and site.op in READS
            x = env[node.args[OPERANDS[str(node.target)].activation]] if reads else None
            replay.step(env, node, {})
            if site and site.op == "residual":
                x = env[node]
            if site and x is not None and x.numel():
                parts.setdefault(site.name, []).append(statistics(x, site))
    return {name: merge(seen) for name, seen in parts.items()}


def concrete(replay: Replayer, sites: Sequence[Site], record: Sequence[Any]) -> tuple[Site, ...]:
    """The sites with the sizes of one recorded call in place of symbols, to measure latency at."""
    shapes: dict[str, tuple[int, ...]] = {}
    env = replay.start(record)
    for node in replay.gm.graph.nodes:
        if node.op == "output":
            break
        site = replay.sites.get(node.name)
        if site:
            position = OPERANDS[str(node.target)].activation if site.op != "residual" else 0
            shapes[site.name] = tuple(env[node.args[position]].shape)
        replay.step(env, node, {})
    return tuple(dataclasses.replace(site, input_shape=shapes[site.name]) for site in sites)


def statistics(x: Tensor, site: Site) -> Observed:
    """Statistics of one activation: [..., K] of a linear, [B, C, ...] of a convolution."""
    if not torch.isfinite(x).all():
        raise CalibrationError(
            f"the input of {site.name} holds NaN or inf in a calibration call",
            at=site.source,
            fix="calibrate with finite inputs, or check the weights",
        )
    x = x.float()
    rows = x if site.op == "linear" else x.movedim(1, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    flat = x.reshape(-1)
    step = max(1, flat.numel() // SAMPLE)
    low, high = torch.aminmax(flat)
    return Observed(
        low.item(),
        high.item(),
        flat.mean().item(),
        flat.var(correction=0).item(),
        rows.abs().amax(0),
        rows.abs().amax(1),
        torch.cat([flat[::step], low[None], high[None]]),
        1,
    )


def merge(parts: Sequence[Observed]) -> Observed:
    """Statistics over several calls from those of each."""
    n = torch.tensor([float(p.token_absmax.numel()) for p in parts])
    weight = n / n.sum()
    means, variances = (torch.tensor([getattr(p, k) for p in parts]) for k in ("mean", "variance"))
    mean = (weight * means).sum()
    return Observed(
        min(p.minimum for p in parts),
        max(p.maximum for p in parts),
        mean.item(),
        (weight * (variances + (means - mean) ** 2)).sum().item(),
        torch.stack([p.channel_absmax for p in parts]).amax(0),
        torch.cat([p.token_absmax for p in parts]),
        torch.cat([p.sample for p in parts]),
        len(parts),
    )


def minmax(seen: Observed, fmt: Format) -> tuple[Tensor, Tensor]:
    """The range of everything seen."""
    return scale_and_zero(torch.tensor([seen.minimum, seen.maximum]), fmt)


def percentile(ordered: Tensor, fmt: Format, percent: float) -> tuple[Tensor, Tensor]:
    """The range that holds `percent` of the sorted values, cut equally at both ends."""
    cut = int((1 - percent / 100) / 2 * (ordered.numel() - 1))
    ends = torch.stack([ordered[cut], ordered[ordered.numel() - 1 - cut]])
    return scale_and_zero(ends, fmt)


def least_noise(seen: Observed, fmt: Format) -> tuple[Tensor, Tensor, str]:
    """The static range with the least mean squared rounding and clipping error on the sample.

    Candidates are min/max, the percentiles and shrunk min/max; ties go to the earlier.
    """
    best: tuple[float, Tensor, Tensor, str] | None = None
    for name, (scale, zero) in _ranges(seen, fmt):
        noise = (fake_quantize(seen.sample, fmt, scale, zero) - seen.sample).square().mean().item()
        if best is None or noise < best[0]:
            best = noise, scale, zero, name
    assert best is not None
    return best[1:]


def static_scales(
    observed: Mapping[str, Observed], formats: Iterable[Format]
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """{(site, format): (scale, zero)} for every static activation format in use."""
    formats = tuple(formats)
    return {
        (site, fmt.name): least_noise(seen, fmt)[:2]
        for site, seen in observed.items()
        for fmt in formats
    }


def _ranges(seen: Observed, fmt: Format) -> Iterable[tuple[str, tuple[Tensor, Tensor]]]:
    for shrink in SHRINKS:
        low, high = seen.minimum * shrink, seen.maximum * shrink
        yield (
            "minmax" if shrink == 1.0 else f"minmax × {shrink}",
            scale_and_zero(torch.tensor([low, high]), fmt),
        )
    ordered = seen.sample.sort().values
    for percent in PERCENTILES:
        yield f"percentile {percent}", percentile(ordered, fmt, percent)
