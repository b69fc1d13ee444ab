"""score[u, c] = mean KL(softmax(y) ‖ softmax(y(u in c))) on noise in place of the recorded inputs

OHQ's mask-guided estimate (arXiv 2309.01945): one layer at a time is quantized, all others are
masked from it, and the distance of the outputs counts; no gradients, and no data: a floating input
is normal noise with the mean and the deviation of the recorded one, an integer input is drawn
evenly from its range.  An input of at most two values, or with an infinite one (a mask, a
constant), says what counts of the others, and stays.  Scaled to noise power, which is the only
other use of recorded values.

Reconstruction: public are the mask, synthetic inputs and the distance of outputs; how the inputs
are made is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.graph import placeholders
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged, singles
from mpq_fx.passes.analyze.metrics.kl_singles import divergence


def masked(task: Task) -> Table:
    """Divergence that each single makes on synthetic inputs."""
    # Each call has its own: a call whose numbers are known already is not measured again.
    seeds = {id(record): k for k, record in enumerate(task.records)}

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        generator = torch.Generator().manual_seed(seeds[id(record)])
        made = [
            given if node in task.replay.constants else synthetic(given, generator)
            for node, given in zip(placeholders(task.replay.gm), record, strict=True)
        ]
        reference = task.replay.run(made, {})
        for unit, choice, outputs in singles(task, made, is_wanted):
            yield Single(unit, choice, divergence(outputs, reference, task.excluded))

    return calibrated(task, averaged("masked", task, each, forward_passes=task.suffixes))


def synthetic(given: Any, generator: torch.Generator) -> Any:
    """Noise in the shape and the range of an input; what is no tensor of real numbers stays."""
    if not isinstance(given, Tensor) or given.is_complex() or len(given.unique()) <= 2:
        return given
    if given.is_floating_point():
        if not bool(given.isfinite().all()):
            return given
        noise = torch.randn(given.shape, generator=generator).to(given.device)
        deviation, mean = torch.std_mean(given.double())
        return (mean + deviation * noise).to(given.dtype)
    low, high = int(given.min()), int(given.max())
    drawn = torch.randint(low, high + 1, given.shape, generator=generator)
    return drawn.to(given.device, given.dtype)
