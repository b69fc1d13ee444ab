"""Statistics of what each site reads: per-channel and per-token ranges, moments, outliers, scales.

Read from replays of the recorded calls, so that observing costs the user's calls one copy of their
inputs and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mpq_fx.errors import CalibrationError
from mpq_fx.facts import Site
from mpq_fx.formats import Format
from mpq_fx.graph import arguments
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.sites import OPERANDS
from mpq_fx.passes.analyze.static_range import Sample, expecting, join, least_noise, take

READS = ("linear", "conv")  # sites whose input is quantized


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
    """{site name: statistics of its activation}; raises CalibrationError for NaN or inf.

    Sites that read one value share its statistics.
    """
    sources: dict[str, Source] = {}
    parts: dict[Source, list[Observed]] = {}
    for inputs in records:
        env, seen = replay.start(inputs), set[Source]()
        for node in replay.gm.graph.nodes:
            if node.op == "output":
                break
            site = replay.sites.get(node.name)
            source = _source(node, site) if site else None
            if site and site.op == "residual":
                replay.step(env, node, {})
            if site and source and env[source[0]].numel():
                sources[site.name] = source
                if source not in seen:
                    parts.setdefault(source, []).append(statistics(env[source[0]], site))
                seen.add(source)
            replay.step(env, node, {})
    merged = {source: merge(found) for source, found in parts.items()}
    return {name: merged[source] for name, source in sources.items()}


Source = tuple[Node, bool]  # the value that a site reads, and whether its channels come last


def _source(node: Node, site: Site) -> Source | None:
    """Of a residual it is the result."""
    if site.op == "residual":
        return node, False
    if site.op not in READS:
        return None
    return arguments(node)[OPERANDS[str(node.target)].activation], site.op == "linear"


def statistics(x: Tensor, site: Site) -> Observed:
    """Statistics of one activation: [..., K] of a linear, [B, C, ...] of a convolution."""
    x = x.float()
    rows = x if site.op == "linear" else x.movedim(1, -1)
    rows = rows.reshape(-1, rows.shape[-1])
    low, high = rows.amin(0), rows.amax(0)  # several times as fast as aminmax or a norm
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CalibrationError(
            f"the input of {site.name} holds NaN or inf in a calibration call",
            at=site.source,
            fix="calibrate with finite inputs, or check the weights",
        )
    mean = rows.mean()
    centered = (rows - mean).reshape(-1)
    return Observed(
        low.min().item(),
        high.max().item(),
        mean.item(),
        torch.dot(centered, centered).item() / centered.numel(),
        torch.maximum(-low, high),
        torch.maximum(-rows.amin(1), rows.amax(1)),
        take(x.reshape(-1)),
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
    formats, scales = tuple(formats), dict[int, dict[str, tuple[Tensor, Tensor]]]()
    for seen in observed.values():
        if id(seen) not in scales:  # sites that read one value share it
            sample = expecting(seen.sample)
            scales[id(seen)] = {fmt.name: least_noise(sample, fmt) for fmt in formats}
    return {
        (site, fmt.name): scales[id(seen)][fmt.name]
        for site, seen in observed.items()
        for fmt in formats
    }
