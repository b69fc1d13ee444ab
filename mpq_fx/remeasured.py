"""a plan whose latency was predicted  ->  the same plan with latencies measured here

What a plan stores of its sites is enough: shapes and choices, no data and no model.  Its choices
stay; `plan.resolve()` chooses again by what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpq_fx.encoding import parse_choice
from mpq_fx.facts import Choice, Plan, Row
from mpq_fx.passes.analyze.cost import latency
from mpq_fx.passes.lower.target import Target

PREDICTED = "latency is predicted by"  # how the note of such a plan begins


def is_predicted(plan: Plan) -> bool:
    return any(note.startswith(PREDICTED) for note in plan.notes)


def remeasured(plan: Plan, target: Target, cache_dir: Any) -> Plan:
    """Every choice that was compared, at the shapes that the plan was made for; what was concluded
    from predictions, the frontier and the solver's words, is dropped.
    """
    sites = {row.site.name: row.site for row in plan.ledger}
    known = plan.tables["latency"]
    table = latency(
        tuple(sites.values()),
        options_of(known.values),
        target,
        edges={reader: maker for maker, _, reader, _ in known.pairs},
        ties=plan.ties,
        cache_dir=cache_dir,
    )
    table = replace(table, provenance={**known.provenance, **table.provenance})
    ledger = tuple(_timed(row, table.values) for row in plan.ledger)
    before, after = (sum(row.ms_after or 0.0 for row in rows) for rows in (plan.ledger, ledger))
    note = f"layers take {after:.3g} ms one by one, measured here; predicted were {before:.3g} ms"
    return replace(
        plan,
        tables={**plan.tables, "latency": table},
        ledger=ledger,
        baseline={**plan.baseline, "latency": sum(row.ms_before or 0.0 for row in ledger)},
        solver=None,
        points=(),
        notes=(*(n for n in plan.notes if not n.startswith(PREDICTED)), note),
        provenance={**plan.provenance, "target": dict(target.facts())},
    )


def options_of(values: Mapping[tuple[str, str], float]) -> dict[str, tuple[Choice, ...]]:
    """The choices of each site that a table knows."""
    found: dict[str, tuple[Choice, ...]] = {}
    for site, name in values:
        found[site] = (*found.get(site, ()), parse_choice(name))
    return found


def _timed(row: Row, ms: Mapping[tuple[str, str], float]) -> Row:
    name = row.site.name
    return replace(row, ms_before=ms[name, row.site.dtype], ms_after=ms[name, row.choice])
