"""score[u, c]  ->  κ · score[u, c],  κ = median over a few plans of measured / predicted noise

A score says which unit hurts more, in a unit of its own.  Scaled by κ it is a noise power of the
outputs, so that it can stand in a report and begin the search near the right budget.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.ranking import draw, measured, predicted

PLANS = 4  # random ones that scale a table


def calibrated(task: Task, table: Table) -> Table:
    """The table in noise powers; κ is in its provenance."""
    plans = [draw(task, seed) for seed in range(PLANS)]
    errors = measured(replace(task, records=task.records[:1]), plans)
    guesses = [predicted(table, plan) for plan in plans]
    ratios = [(e / g) ** 2 for e, g in zip(errors, guesses, strict=True) if g > 0]
    kappa = median(ratios) if ratios else 1.0
    return multiplied(table, kappa, plans=len(plans))


def multiplied(table: Table, kappa: float, *, plans: int, **facts: Any) -> Table:
    """κ times a table; κ, `facts` and the passes of so many plans are in its provenance."""
    passes = table.provenance["forward_passes"] + plans + 1
    return replace(
        table,
        values={key: kappa * value for key, value in table.values.items()},
        spread={key: kappa * value for key, value in table.spread.items()},
        pairs={key: kappa * value for key, value in table.pairs.items()},
        provenance={**table.provenance, "forward_passes": passes, "kappa": kappa, **facts},
    )
