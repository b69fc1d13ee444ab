"""tables + budgets -> Problem: the one place where the user's words become the solver's quantities.

tolerance    Σ noise power        ≤ tolerance² · scale   (scale from the bisection on measured error)
max_latency  rest + Σ ms          ≤ ms of a call          rest = what no site accounts for
max_size     rest + Σ bytes       ≤ bytes
max_bits     Σ bits               ≤ mean bits · Σ weights
max_bops     Σ MAC · bits · bits  ≤ bops
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpq_fx.config import Config, budget
from mpq_fx.facts import Table
from mpq_fx.passes.allocate import Problem

RESOURCES = {"max_latency": "latency", "max_size": "size", "max_bits": "bits", "max_bops": "bops"}
OBJECTIVES = {
    "latency": ("latency", "error"),
    "size": ("size", "latency", "error"),
    "error": ("error", "latency"),
}


def numbers(config: Config, baseline: Mapping[str, float]) -> dict[str, float]:
    """The budgets of a Config as numbers; shares such as "0.5x" are of the float model."""
    found = {
        name: budget(getattr(config, name), baseline[resource])
        for name, resource in RESOURCES.items()
    }
    return {name: value for name, value in found.items() if value is not None}


def problem(
    tables: Mapping[str, Table],
    *,
    objective: str,
    budgets: Mapping[str, float],
    baseline: Mapping[str, float],
    ties: Sequence[Sequence[str]] = (),
    scale: float = 1.0,
) -> Problem:
    """The allocation problem of one set of tables; `budgets` as `numbers` gives them + tolerance."""
    options: dict[str, tuple[str, ...]] = {}
    for unit, option in tables["error"].values:
        options[unit] = (*options.get(unit, ()), option)
    resources = {name: dict(tables[name].values) for name in RESOURCES.values() if name in tables}
    limits = {
        RESOURCES[name]: value
        - _rest(options, resources[RESOURCES[name]], baseline, RESOURCES[name])
        for name, value in budgets.items()
        if name in RESOURCES
    }
    if "tolerance" in budgets:
        limits["error"] = budgets["tolerance"] ** 2 * scale
    return Problem(
        options=options,
        error=dict(tables["error"].values),
        pairs=dict(tables["error"].pairs),
        resources=resources,
        budgets=limits,
        objective=OBJECTIVES[objective],
        ties=tuple(map(tuple, ties)),
    )


def _rest(
    options: Mapping[str, tuple[str, ...]],
    table: Mapping[tuple[str, str], float],
    baseline: Mapping[str, float],
    name: str,
) -> float:
    """What the float model uses outside the sites: the part of a budget no choice can change."""
    if name == "bits":  # a budget of mean bits speaks of site weights only
        return 0.0
    return baseline[name] - sum(table[unit, names[0]] for unit, names in options.items())
