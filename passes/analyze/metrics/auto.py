"""Tables of the same calls by several metrics: the one that ranks random plans best, and the others

`measured_singles` and `interlayer_hessian` are made from the same replays; `block_pairs` takes many
more, where there is time for them.  Half of the plans decide; how well each table does on the other
half is in the provenance, and in the report.  What a metric is good at depends on the budget too,
so the search measures plans of all of them.
"""

from __future__ import annotations

import time
from dataclasses import replace

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.metrics.interlayer_hessian import interlayer_hessian
from mpq_fx.passes.analyze.metrics.measured_pairs import block_pairs, passes_of_blocks
from mpq_fx.passes.analyze.ranking import agreement, draw, measured

PLANS = 8  # that decide, and again as many that tell
SHARE = 0.8  # of the time for tables
WORTH = 0.01  # by how much the rank correlation must gain for pairs, which make the problem harder


def auto(task: Task) -> Table:
    """`measured_singles`, or a table with pairs that ranks plans better; all others beside it."""
    now = time.monotonic()
    soon = replace(task, deadline=now + SHARE * (task.deadline - now))
    paired = interlayer_hessian(soon)
    alone = replace(paired, metric="measured_singles", pairs={})
    blocks = _of_blocks(soon, paired)
    tables = [alone, *([paired] if paired.pairs else []), *blocks]
    if len(tables) == 1 or task.work.agreed(time.monotonic() > task.deadline):
        return replace(alone, others=tuple(tables[1:]))
    plans = [draw(task, seed) for seed in range(2 * PLANS)]
    errors = measured(replace(task, records=task.records[:1]), plans)
    deciding, telling = slice(None, PLANS), slice(PLANS, None)
    ranks = [agreement(t, plans[deciding], errors[deciding]).rank for t in tables]
    told = {t.metric: agreement(t, plans[telling], errors[telling]) for t in tables}
    best = tables[_best(ranks)]
    compared = {n: {"rank": found.rank, "ratios": [*found.ratios]} for n, found in told.items()}
    passes = sum(table.provenance["forward_passes"] for table in (paired, *blocks))
    provenance = {
        **best.provenance,
        "seconds": round(time.monotonic() - now, 3),
        "forward_passes": passes + len(plans) + 1,
        "compared": compared,
    }
    others = tuple(table for table in tables if table is not best)
    return replace(best, provenance=provenance, others=others)


def _of_blocks(task: Task, paired: Table) -> list[Table]:
    """`block_pairs`, if one call should end by the deadline and there are pairs at all."""
    passes = passes_of_blocks(task)
    seconds = paired.provenance["seconds"] / paired.provenance["forward_passes"] * passes
    is_late = time.monotonic() + seconds > task.deadline
    if task.work.agreed(is_late):
        return []
    found = block_pairs(task)
    return [found] if found.pairs else []


def _best(ranks: list[float]) -> int:
    """The first, unless a later one gains enough; of these the one that gains most."""
    later = max(range(len(ranks)), key=lambda k: ranks[k])
    return later if ranks[later] > ranks[0] + WORTH else 0
