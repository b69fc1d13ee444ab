"""A trained net -> how well each metric predicts the error of random plans that it has not seen.

    python bench/sensitivity.py vit [--plans 40] [--metrics measured,interlayer_hessian]

Plans are drawn over every choice of the reference target: each site leaves float with a probability
of its plan.  Reported are Spearman's rank correlation between predicted and measured error, and the
ratio predicted / measured: its median and its extremes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from results import parser

import mpq_fx
from mpq_fx.demo.nets import SUBJECTS
from mpq_fx.facts import Choice, Table
from mpq_fx.passes import METRICS
from mpq_fx.passes.analyze.metric import Metric, Task
from mpq_fx.passes.analyze.replay import Replayer, output_error
from mpq_fx.plugins import add

NAME = "compared"  # under which the comparison stands among the metrics
METRIC_NAMES = ("measured", "interlayer_hessian")
PLANS = 40
Assignment = Mapping[str, Choice]
_LOOKING_ON: list[Metric] = []  # what `compared` does: a metric is found by its name in a module


@dataclass(frozen=True)
class Score:
    """One metric against measured errors of random plans."""

    metric: str
    seconds: float
    forward_passes: float
    rank: float
    ratio: tuple[float, float, float]  # least, median, largest of predicted / measured


def compare(name: str, metrics: Sequence[str], plans: int) -> list[Score]:
    """Tune the net with a metric that only looks on: it has the replay, and the recorded calls."""
    subject, found = SUBJECTS[name](), list[Score]()

    def looking_on(task: Task) -> Table:
        task = replace(task, deadline=float("inf"))
        tables = {m: METRICS.named(m)(task) for m in metrics}
        drawn = [draw(random.Random(seed), task.units, task.options) for seed in range(plans)]
        calls = [(record, task.replay.run(record, {})) for record in task.records]
        measured = [joint(task.replay, calls, a, task.excluded) for a in drawn]
        found.extend(score(tables[m], m, drawn, measured) for m in metrics)
        return next(iter(tables.values()))

    _LOOKING_ON.append(looking_on)
    add("metrics", NAME, f"{__name__}:compared")
    config = mpq_fx.Config(target="reference", sensitivity=NAME)
    mpq_fx.tune(subject.model, subject.calibration, config=config, progress=False)
    return found


def compared(task: Task) -> Table:
    return _LOOKING_ON[-1](task)


def draw(
    source: random.Random, units: Sequence[tuple[str, ...]], options: Mapping[str, Sequence[Choice]]
) -> Assignment:
    """A plan in which each unit leaves float with one probability, for a choice that is even."""
    share = source.random()
    changed = [unit for unit in units if len(options[unit[0]]) > 1 and source.random() < share]
    picks = {unit: source.choice(options[unit[0]][1:]) for unit in changed}
    return {site: choice for unit, choice in picks.items() for site in unit}


def joint(
    replay: Replayer, calls: Sequence[Any], plan: Assignment, excluded: frozenset[int]
) -> float:
    """√ of the mean noise power over (recorded call, its float outputs)."""
    errors = [output_error(replay.run(x, plan), reference, excluded) for x, reference in calls]
    return float(np.mean(np.square(errors)) ** 0.5)


def predicted(table: Table, plan: Assignment) -> float:
    """√ (Σ noise of singles + Σ pairs)"""
    keys = {(site, choice.name) for site, choice in plan.items()}
    power = sum(table.values[key] for key in keys)
    power += sum(p for (u, c, v, d), p in table.pairs.items() if {(u, c), (v, d)} <= keys)
    return max(power, 0.0) ** 0.5


def score(table: Table, name: str, plans: Sequence[Assignment], measured: Sequence[float]) -> Score:
    guesses = [predicted(table, plan) for plan in plans]
    both = [(g, m) for g, m in zip(guesses, measured, strict=True) if m > 0]
    ratios = [g / m for g, m in both]
    return Score(
        name,
        table.provenance["seconds"],
        table.provenance["forward_passes"],
        spearman(*zip(*both, strict=True)),
        (min(ratios), float(np.median(ratios)), max(ratios)),
    )


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks; ties cannot matter among measured errors."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("net", choices=SUBJECTS)
    made.add_argument("--plans", type=int, default=PLANS)
    made.add_argument("--metrics", default=",".join(METRIC_NAMES))
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    for found in compare(options.net, options.metrics.split(","), options.plans):
        low, middle, high = found.ratio
        print(
            f"{options.net:8} {found.metric:20} rank {found.rank:.3f}  predicted/measured "
            f"{low:.2f} {middle:.2f} {high:.2f}  {found.forward_passes:.0f} forward passes, "
            f"{found.seconds:.1f} s"
        )
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
