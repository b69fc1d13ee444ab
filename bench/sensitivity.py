"""A trained net -> how well each metric predicts the error of random plans that it has not seen.

    python bench/sensitivity.py vit [--plans 40] [--metrics measured,interlayer_hessian]

Plans are drawn over every choice of the reference target: each site leaves float with a probability
of its plan.  Reported are Spearman's rank correlation between predicted and measured error, and the
ratio predicted / measured: its median and its extremes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from results import parser
from torch import nn

import mpq_fx
from mpq_fx.demo.nets import SUBJECTS, Batch
from mpq_fx.facts import Table
from mpq_fx.passes import METRICS
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.ranking import Agreement, agreement, draw, measured
from mpq_fx.plugins import add

NAME = "compared"  # under which the comparison stands among the metrics
PLANS = 40
FIRST = 1000  # seed of the first plan: none of those that a metric draws for itself
_LOOKING_ON: list[
    Callable[[Task], None]
] = []  # what `compared` does: a metric is found by its name in a module


@dataclass(frozen=True)
class Score:
    """One metric against measured errors of random plans, and what it cost."""

    metric: str
    seconds: float
    forward_passes: float
    found: Agreement


def compare(name: str, metrics: Sequence[str], plans: int) -> list[Score]:
    found: list[Score] = []

    def looking_on(task: Task) -> None:
        task = replace(task, deadline=float("inf"))
        drawn = [draw(task, seed) for seed in range(FIRST, FIRST + plans)]
        errors = measured(task, drawn)
        tables = {m: METRICS.named(m)(task) for m in metrics}
        for metric, table in tables.items():
            cost = (table.provenance["seconds"], table.provenance["forward_passes"])
            found.append(Score(metric, *cost, agreement(table, drawn, errors)))

    subject = SUBJECTS[name]()
    looked_on(subject.model, subject.calibration, looking_on)
    return found


def looked_on(model: nn.Module, calibration: Sequence[Batch], look: Callable[[Task], None]) -> None:
    """Tune a net with a metric that only looks on: it has the replay, and the recorded calls."""
    _LOOKING_ON.append(look)
    add("metrics", NAME, f"{__name__}:compared")
    config = mpq_fx.Config(target="reference", sensitivity=NAME)
    mpq_fx.tune(model, calibration, config=config, progress=False)


def compared(task: Task) -> Table:
    _LOOKING_ON[-1](task)
    return METRICS["measured"](task)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("net", choices=SUBJECTS)
    made.add_argument("--plans", type=int, default=PLANS)
    made.add_argument("--metrics", default="measured,interlayer_hessian")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    for score in compare(options.net, options.metrics.split(","), options.plans):
        low, middle, high = score.found.ratios
        print(
            f"{options.net:8} {score.metric:20} rank {score.found.rank:.3f}  predicted/measured "
            f"{low:.2f} {middle:.2f} {high:.2f}  {score.forward_passes:.0f} forward passes, "
            f"{score.seconds:.1f} s"
        )
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
