"""score[u, c] = mean over positions of KL(softmax(y) ‖ softmax(y(u in c))), scaled to noise power

For outputs that are logits along the last dimension.  ZeroQ (arXiv 2001.00281).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch.nn import functional

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged, singles
from mpq_fx.passes.analyze.replay import is_logits


def kl_singles(task: Task) -> Table:
    """Divergence of the distributions that a single changes, the largest over the outputs."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        reference = task.replay.run(record, {})
        for unit, choice, outputs in singles(task, record, is_wanted):
            yield Single(unit, choice, divergence(outputs, reference, task.excluded))

    return calibrated(task, averaged("kl_singles", task, each, forward_passes=task.suffixes))


def divergence(outputs: Sequence[Any], reference: Sequence[Any], excluded: frozenset[int]) -> float:
    """max over outputs of the mean KL(reference ‖ output) in nats; 0 where there are no logits."""
    found = [0.0]
    for k, (y, ref) in enumerate(zip(outputs, reference, strict=True)):
        if k not in excluded and is_logits(ref):
            got, want = (functional.log_softmax(x.double(), -1) for x in (y, ref))
            kl = functional.kl_div(got, want, reduction="none", log_target=True)
            kl = kl.masked_fill(want.isneginf(), 0.0).sum(-1)  # what has no probability costs none
            found.append(float(kl.mean().clamp_min(0.0)))
    return math.nan if any(map(math.isnan, found)) else max(found)
