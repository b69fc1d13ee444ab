"""A trained net -> how well each metric predicts by how much random plans raise a loss.

    python bench/loss.py cnn [--plans 40] [--calls 4] [--metrics interlayer_loss,measured]

Cross-entropy with the labels for nets on digits, a contrastive loss of paraphrases for MiniLM.
Plans are those of sensitivity.py, the rise is that on the calls that the tables are made of.
Reported are Spearman's rank correlation of prediction and rise; the ratio predicted / measured, its
tenth percentile, median and ninetieth, of the metric that predicts rises; and the rank correlation
with the error of the outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from results import parser
from sensitivity import FIRST, PLANS
from torch import Tensor
from torch.nn import functional

import mpq_fx
from mpq_fx.demo.nets import CALLS, DIGITS, SUBJECTS, digits
from mpq_fx.facts import Table
from mpq_fx.passes import METRICS
from mpq_fx.passes.analyze.metric import LossMetric, Task
from mpq_fx.passes.analyze.ranking import Plan, draw, measured, power, spearman
from mpq_fx.plugins import add

NAME, RISES = "compared_with_a_loss", "interlayer_loss"
METRICS_ASKED = (RISES, "interlayer_kl", "interlayer_hessian", "measured")
TEMPERATURE = 0.05
_LOOKING_ON: list[Callable[[Task], None]] = []  # what the metric of this script does


@dataclass(frozen=True)
class Score:
    """One metric against the rises of the loss, and against the errors, of the same plans."""

    metric: str
    of_rises: float
    of_errors: float
    ratios: tuple[float, float, float] | None  # None: it predicts no rises


def of_labels(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return functional.cross_entropy(output, batch["labels"])


def contrastive(embeddings: Tensor, batch: object) -> Tensor:
    """A sentence and its paraphrase stand beside each other."""
    count = len(embeddings)
    cosines = embeddings @ embeddings.T / TEMPERATURE - 1e4 * torch.eye(count)
    return functional.cross_entropy(cosines, torch.arange(count) ^ 1)


def labelled() -> list[dict[str, Tensor]]:
    images, labels, _, _ = digits()
    both = zip(images[: CALLS * DIGITS].split(DIGITS), labels.split(DIGITS), strict=False)
    return [{"images": x, "labels": y} for x, y in both]


def rises(task: Task, plans: Sequence[Plan]) -> list[float]:
    """By how much the loss rises, the mean over the recorded calls."""
    replay, sums = replace(task.replay, caches=False), np.zeros(len(plans))
    for record, loss in zip(task.records, task.losses, strict=True):
        base = float(loss(replay.run(record, {})))
        sums += [float(loss(replay.run(record, plan))) - base for plan in plans]
    return (sums / len(task.records)).tolist()


def compare(name: str, metrics: Sequence[str], count: int, calls: int) -> list[Score]:
    found: list[Score] = []

    def look(task: Task) -> None:
        kept = {"records": task.records[:calls], "losses": task.losses[:calls]}
        task = replace(task, **kept, deadline=float("inf"))
        plans = [p for p in (draw(task, seed) for seed in range(FIRST, FIRST + count)) if p]
        real, errors = rises(task, plans), measured(task, plans)
        print(f"{len(plans)} plans, of which {sum(r < 0 for r in real)} lower the loss")
        for metric in metrics:
            found.append(scored(metric, METRICS.named(metric)(task), plans, real, errors))

    subject = SUBJECTS[name]()
    given: Sequence[Any] = subject.calibration if name == "minilm" else labelled()
    _LOOKING_ON.append(look)
    add("metrics", NAME, f"{__name__}:compared")
    config = mpq_fx.Config(target="reference", sensitivity=NAME)
    loss = contrastive if name == "minilm" else of_labels
    mpq_fx.tune(subject.model, given, loss=loss, config=config, progress=False)
    return found


def scored(
    metric: str,
    table: Table,
    plans: Sequence[Plan],
    real: Sequence[float],
    errors: Sequence[float],
) -> Score:
    guesses, ratios = [power(table, plan) for plan in plans], None
    if metric == RISES:
        each = np.array(guesses) / table.provenance["kappa"] / np.array(real)  # of a loss to noise
        low, middle, high = np.percentile(each, (10, 50, 90)).tolist()
        ratios = low, middle, high
    return Score(metric, spearman(guesses, real), spearman(guesses, errors), ratios)


def _looking_on(task: Task) -> tuple[Table, Table]:
    _LOOKING_ON[-1](task)
    table = METRICS["measured"](task)
    return table, table


compared = LossMetric(_looking_on)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("net", choices=SUBJECTS)
    made.add_argument("--plans", type=int, default=PLANS)
    made.add_argument("--calls", type=int, default=CALLS, help="recorded calls that are looked at")
    made.add_argument("--metrics", default=",".join(METRICS_ASKED))
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    metrics = options.metrics.split(",")
    for score in compare(options.net, metrics, options.plans, options.calls):
        ratios = " ".join(f"{ratio:.2f}" for ratio in score.ratios or ())
        print(
            f"{options.net:8} {score.metric:20} rank of rises {score.of_rises:.2f}, of errors "
            f"{score.of_errors:.2f}{'  predicted/measured ' if ratios else ''}{ratios}"
        )
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
