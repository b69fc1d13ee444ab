"""argmin over (scale, zero) of Σ weight · (q(x) - x)²: one static range for all of an activation

The sum runs over a sample that stands for every value seen.  The few values at the ends decide what
clipping costs, so each of them is in it, counted once; of the rest every n-th is, counted n times,
with an n that shares no factor with any dimension, so that no channel is left out.

After n values the next one exceeds them all with a probability of 1 / (n + 1), so a range for
values to come reckons with one more at either end (`expecting`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_fx.formats import Format
from mpq_fx.numerics import fake_quantize, scale_and_zero

SAMPLE = 1 << 13  # values of a call, the ends aside
END = 1 << 3  # of them so many at either end tell where the ends begin
PERCENTILES = (99.9, 99.99, 99.999)
STEPS = (0.7, 0.85, 0.95, 1.05, 1.15)  # how a search moves one end of the range
ROUNDS = 8
BEYOND = 4  # points that stand for the one value to come at an end


@dataclass(frozen=True)
class Sample:
    """Some values of an activation, and how many each of them stands for; float32."""

    values: Tensor
    weights: Tensor


def take(x: Tensor) -> Sample:
    """The ends of an activation and an even share of what lies between."""
    flat = x.reshape(-1).float()
    shares = flat[:: _step(flat.numel())]
    ordered = shares.sort().values
    low, high = ordered[min(END, len(ordered)) - 1], ordered[-min(END, len(ordered))]
    ends = flat[(flat < low) | (flat > high)]
    inner = shares[(shares >= low) & (shares <= high)]
    share = (flat.numel() - ends.numel()) / max(1, inner.numel())
    weights = torch.cat([torch.ones_like(ends), torch.full_like(inner, share)])
    return Sample(torch.cat([ends, inner]), weights)


def _step(count: int) -> int:
    """The least step without a common divisor that takes no more than SAMPLE of `count` values."""
    step = max(1, math.ceil(count / SAMPLE))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def join(samples: Sequence[Sample]) -> Sample:
    """What several calls saw."""
    return Sample(torch.cat([s.values for s in samples]), torch.cat([s.weights for s in samples]))


def expecting(sample: Sample) -> Sample:
    """The sample, and one more value at either end: quantiles of weight 1 in all.

    What the END largest exceed the least of them by is taken to be exponential (peaks over
    threshold, Pickands 1975, of shape 0), of a mean told by their median, so that one outlier does
    not announce another.  At a bound, as that of a ReLU, the largest are equal and nothing lies
    beyond.
    """
    values = sample.values
    count = min(END, len(values))
    quantiles = math.log(count + 1) - torch.log1p(-(torch.arange(BEYOND) + 0.5) / BEYOND)
    weights = torch.full((BEYOND,), 1 / BEYOND)
    coming = []
    for sign in (-1.0, 1.0):
        largest = (sign * values).topk(count).values
        mean = (largest.median() - largest[-1]) / math.log(2)
        coming.append(Sample(sign * (largest[-1] + mean * quantiles), weights))
    return join([sample, *coming])


def least_noise(sample: Sample, fmt: Format) -> tuple[Tensor, Tensor]:
    """The range with the least error: the best of min/max and the percentiles, then moved one end
    at a time while that helps.
    """
    best = min((noise(sample, fmt, ends), ends) for ends in _starts(sample))
    for _ in range(ROUNDS):
        before = best
        for side in (0, 1):
            best = min(best, *((noise(sample, fmt, e), e) for e in _moved(best[1], side)))
        if best == before:
            break
    return scale_and_zero(torch.tensor(best[1]), fmt)


def noise(sample: Sample, fmt: Format, ends: tuple[float, float]) -> float:
    """Σ weight · (q(x) - x)² with the scale of a range."""
    x = sample.values
    error = fake_quantize(x, fmt, *scale_and_zero(torch.tensor(ends), fmt)) - x
    return float(torch.dot(error.square_(), sample.weights))


def _starts(sample: Sample) -> Iterator[tuple[float, float]]:
    """Min/max, and ranges that hold a percentage of the values, cut equally at both ends."""
    ordered, order = sample.values.sort()
    below = sample.weights[order].double().cumsum(0)
    for percent in (100.0, *PERCENTILES):
        cut = (1 - percent / 100) / 2 * below[-1]
        first, last = torch.searchsorted(below, torch.stack([cut, below[-1] - cut])).tolist()
        yield ordered[first].item(), ordered[min(last, len(ordered) - 1)].item()


def _moved(ends: tuple[float, float], side: int) -> Iterator[tuple[float, float]]:
    for step in STEPS:
        low, high = (end * step if k == side else end for k, end in enumerate(ends))
        yield low, high
