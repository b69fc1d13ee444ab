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
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.sites import OPERANDS
from mpq_fx.passes.analyze.static_range import Sample, expecting, join, least_noise, take

READS = ("linear", "conv")  # sites whose input is quantized; of a residual it is the result


@dataclass(frozen=True)
class Observed:
    """Statistics of the activation of one site over the calls of the fit part."""

    minimum: float
    maximum: float
    mean: float
    variance: float
    channel_absmax: Tensor  # [K] (or [C] of a convolution), float32
    token_absmax: Tensor  # absmax of each token: what a per-token scale would see
    sample: Sample  # for the choice of a static range
    calls: int

    @property
    def facts(self) -> dict[str, float]:
        """What the ledger tells of it: extremes, moments, and how far the loudest channel and the
        loudest token stand out.
        """
        return {
            "minimum": self.minimum,
            "maximum": self.maximum,
            "mean": self.mean,
            "standard_deviation": self.variance**0.5,
            "outlier_score": outlier_score(self.channel_absmax),
            "token_outlier_score": outlier_score(self.token_absmax),
        }


def outlier_score(absmax: Tensor) -> float:
    """max absmax / median absmax, of channels or of tokens: 1 where all are alike."""
    typical, most = absmax.median().item(), absmax.max().item()
    return most / typical if typical > 0 else float("inf") if most > 0 else 1.0


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
    low, high = torch.aminmax(flat)
    return Observed(
        low.item(),
        high.item(),
        flat.mean().item(),
        flat.var(correction=0).item(),
        rows.abs().amax(0),
        rows.abs().amax(1),
        take(flat),
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
        join([p.sample for p in parts]),
        len(parts),
    )


def static_scales(
    observed: Mapping[str, Observed], formats: Iterable[Format]
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """{(site, format): (scale, zero)} for every static activation format in use."""
    formats = tuple(formats)
    samples = ((site, expecting(seen.sample)) for site, seen in observed.items())
    return {
        (site, fmt.name): least_noise(sample, fmt) for site, sample in samples for fmt in formats
    }
