"""a plan whose latency was predicted  ->  the same plan with latencies measured here

What a plan stores of its sites is enough: shapes and choices, no data and no model.  Its choices
stay: `plan.resolve()` chooses again, by what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpq_fx.encoding import parse_choice
from mpq_fx.facts import Choice, Plan, Row
from mpq_fx.passes.analyze.cost import latency
from mpq_fx.passes.lower.target import Target

TARGET = "target"  # key of a plan's provenance: facts of the target that it was made for
PREDICTED = "predicted_by"  # key among them, where its milliseconds were not measured


def is_predicted(plan: Plan) -> bool:
    return PREDICTED in plan.provenance.get(TARGET, {})


def remeasured(plan: Plan, target: Target, cache_dir: Any) -> Plan:
    """Every choice that was compared, at the shapes that the plan was made for."""
    rows = {row.site.name: row for row in plan.ledger}
    known = plan.tables["latency"]
    table = latency(
        tuple(row.site for row in rows.values()),
        options_of(known.values),
        target,
        edges={reader: maker for maker, _, reader, _ in known.pairs},
        ties=plan.ties,
        cache_dir=cache_dir,
    )
    before, after = (sum(t.values[n, r.choice] for n, r in rows.items()) for t in (known, table))
    note = (
        f"its layers take {after:.3g} ms, measured here one by one; predicted were {before:.3g} ms"
    )
    return replace(
        plan,
        tables={**plan.tables, "latency": replace(table, provenance=facts_of(plan, table))},
        ledger=tuple(timed(row, table.values) for row in plan.ledger),
        notes=(*(n for n in plan.notes if not n.startswith(PREDICTION)), note),
        provenance={**plan.provenance, TARGET: dict(target.facts())},
    )
