"""The metric that ranks random plans best: singles alone, or with the pairs that come for nothing

Both tables are made from the same replays.  Half of the plans decide; how well each table does on
the other half is in the provenance, and in the report.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.metrics.interlayer_hessian import interlayer_hessian
from mpq_fx.passes.analyze.ranking import agreement, draw, measured

PLANS = 8  # that decide, and again as many that tell
SHARE = 0.8  # of the time for tables
WORTH = 0.01  # by how much the rank correlation must gain for pairs, which make the problem harder


def auto(task: Task) -> Table:
    """`measured_singles`, or `interlayer_hessian` where its pairs rank plans better."""
    now = time.monotonic()
    paired = interlayer_hessian(replace(task, deadline=now + SHARE * (task.deadline - now)))
    alone = replace(paired, metric="measured_singles", pairs={})
    if not paired.pairs or task.work.agreed(time.monotonic() > task.deadline):
        return alone
    plans = [draw(task, seed) for seed in range(2 * PLANS)]
    errors = measured(replace(task, records=task.records[:1]), plans)
    deciding, telling = slice(None, PLANS), slice(PLANS, None)
    ranks = [agreement(t, plans[deciding], errors[deciding]).rank for t in (alone, paired)]
    told = {t.metric: agreement(t, plans[telling], errors[telling]) for t in (alone, paired)}
    best = paired if ranks[1] > ranks[0] + WORTH else alone
    compared = {name: asdict(found) for name, found in told.items()}
    passes = best.provenance["forward_passes"] + len(plans) + 1
    provenance = {**best.provenance, "forward_passes": passes, "compared": compared}
    return replace(best, provenance=provenance)
