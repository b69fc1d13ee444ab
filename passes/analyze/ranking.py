"""Random plans: what a table predicts of their error, against what is measured"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np

from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.metric import Record, Task
from mpq_fx.passes.analyze.replay import output_error
from mpq_fx.passes.analyze.work import Found

Plan = Mapping[str, Choice]  # site -> choice; sites that are not in it stay in float


@dataclass(frozen=True)
class Agreement:
    """How well a table predicts the errors of plans."""

    rank: float  # Spearman's correlation of predicted and measured
    ratios: tuple[float, float, float]  # least, median and largest of predicted / measured


def draw(task: Task, seed: int) -> Plan:
    """A plan in which each unit leaves float with one probability, for a choice that is even."""
    source = random.Random(seed)
    share = source.random()
    changed = [u for u in task.units if len(task.options[u[0]]) > 1 and source.random() < share]
    picks = {unit: source.choice(task.options[unit[0]][1:]) for unit in changed}
    return {site: choice for unit, choice in picks.items() for site in unit}


def measured(task: Task, plans: Sequence[Plan]) -> list[float]:
    """√ of the mean noise power of each plan over the recorded calls."""
    powers = np.zeros(len(plans))
    by_name = {_name(plan): plan for plan in plans}
    for k, record in enumerate(task.records):
        measure = partial(_measured, task, record, by_name)
        found = task.work.collect(f"plans, call {k}", dict.fromkeys(by_name, 1.0), measure)
        powers += np.square([found[_name(plan)].powers[0] for plan in plans])
    return np.sqrt(powers / len(task.records)).tolist()


def _measured(
    task: Task, record: Record, plans: Mapping[str, Plan], names: Sequence[str]
) -> Iterator[tuple[str, Found]]:
    # Every weight in every format would be as large as the model several times over.
    replay = replace(task.replay, caches=False)
    reference = replay.run(record, {})
    for name in names:
        outputs = replay.run(record, plans[name])
        yield name, Found((output_error(outputs, reference, task.excluded),))


def _name(plan: Plan) -> str:
    """A plan goes by its content, so that it is measured once whoever draws it."""
    rows = "\n".join(f"{site}\t{choice.name}" for site, choice in sorted(plan.items()))
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def predicted(table: Table, plan: Plan) -> float:
    """√ (Σ noise of singles + Σ pairs)"""
    return max(power(table, plan), 0.0) ** 0.5


def power(table: Table, plan: Plan) -> float:
    """Σ noise of singles + Σ pairs; negative where signed terms say that a plan gains."""
    keys = [(site, choice.name) for site, choice in plan.items()]  # in order: sums round
    alone, taken = sum(table.values[key] for key in keys), set(keys)
    pairs = table.pairs.items()
    return alone + sum(p for (u, c, v, d), p in pairs if {(u, c), (v, d)} <= taken)


def agreement(table: Table, plans: Sequence[Plan], errors: Sequence[float]) -> Agreement:
    """Of the plans that have an error at all."""
    guesses = [predicted(table, plan) for plan in plans]
    both = [(g, m) for g, m in zip(guesses, errors, strict=True) if m > 0]
    ratios = [g / m for g, m in both] or [float("nan")]
    rank = spearman([g for g, _ in both], [m for _, m in both])
    return Agreement(rank, (min(ratios), median(ratios), max(ratios)))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing their mean rank; NaN where all are equal."""
    one, two = (_ranks(np.asarray(values)) for values in (a, b))
    if len(one) < 2 or one.std() == 0 or two.std() == 0:
        return float("nan")
    return float(np.corrcoef(one, two)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]
