"""Problems of a few units, each with three options."""

from __future__ import annotations

from mpq_fx.passes.allocate import Problem

OPTIONS = ("float32", "bfloat16", "int8")


def problem_of(rows, *, objective="latency", pairs=None, edges=None, ties=(), **budgets) -> Problem:
    """A row is (noise in bfloat16, noise in int8) of one unit of 4, 2 and 1 ms."""
    units = [f"u{k}" for k in range(len(rows))]
    error, latency = {}, {}
    for unit, noise in zip(units, rows, strict=True):
        for option, e, ms in zip(OPTIONS, (0.0, *noise), (4.0, 2.0, 1.0), strict=True):
            error[unit, option], latency[unit, option] = e, ms
    return Problem(
        options=dict.fromkeys(units, OPTIONS),
        error=error,
        pairs=pairs or {},
        resources={"latency": latency, "size": dict(latency)},
        edges={"latency": edges} if edges else {},
        objective=(objective, "error" if objective != "error" else "latency"),
        ties=ties,
        budgets=budgets,
    )
