"""plan, other budgets -> plan: argmin over the tables that a plan carries; no model, no data.

What comes out is predicted: a plan is measured where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mpq_fx.config import Config, nearest
from mpq_fx.encoding import parse_choice
from mpq_fx.errors import ConfigError, InfeasibleError, PlanError
from mpq_fx.facts import INDUCTOR, Plan, Row, SolverFacts
from mpq_fx.passes.allocate.cp_sat import solve
from mpq_fx.passes.allocate.frontier import frontier as non_dominated
from mpq_fx.passes.allocate.problem import ERROR, NOISE, Problem, Solution, values_of
from mpq_fx.problem import (
    LIMITED,
    MEMORY,
    in_user_units,
    numbers,
    problem,
    round_up,
    unchanged,
    unreachable,
)

OBJECTIVES = ("latency", "size")  # resources that a plan can be asked to have least of
WISHES = ("objective", "tolerance", *LIMITED)
PREDICTED = "predicted from the stored tables, not measured"


def resolve(plan: Plan, **wishes: Any) -> Plan:
    """argmin objective s.t. budgets, with the options in `wishes` in place of the plan's own.

    `wishes`: objective, tolerance, max_latency, max_size, max_bits, min_bits, max_bops,
    max_activation_memory, as in Config ("0.5x" is of the float model).  A wish of None lifts a
    budget; one that is not named stays.
    """
    _check_tables(plan)
    config = _config(plan, wishes)
    unused = dict.fromkeys(LIMITED.values(), math.nan)  # of what no budget speaks
    budgets = numbers(config, {**unused, **plan.baseline})
    if config.tolerance is not None:
        budgets["tolerance"] = float(config.tolerance)
    asked = _problem(plan, config.objective, budgets)
    try:
        solution = solve(asked, hint=unchanged(asked))
    except InfeasibleError as error:
        raise unreachable(asked, _units(plan)) from error
    return _resolved(plan, config, budgets, solution)


def frontier(
    plan: Plan, resource: str = "latency", points: int = 9, *, time_limit: float = 10.0
) -> tuple[dict[str, Any], ...]:
    """{(resource, error)} that no other plan improves on, cheapest first; what to type for each.

    A point holds the predicted error, every resource of the whole model, and the `options`.
    """
    found = trade_offs(plan, resource, points, time_limit=time_limit)
    return tuple(point_of(plan, resource, solution) for solution in found)


def trade_offs(
    plan: Plan, resource: str, points: int, *, time_limit: float
) -> tuple[Solution, ...]:
    """The plans on the frontier of `resource` and predicted error, cheapest first."""
    _check_tables(plan)
    if resource not in plan.tables or resource in (ERROR, NOISE):
        valid = [name for name in plan.tables if name not in (ERROR, NOISE)]
        raise ConfigError(
            f"{resource!r} is not a resource of this plan", fix=nearest(resource, valid)
        )
    budgets = {n: v for n, v in plan.budgets.items() if n != "tolerance" and LIMITED[n] != resource}
    asked = _problem(plan, plan.objective, budgets)
    if NOISE not in plan.tables:
        return non_dominated(asked, resource, points, time_limit)
    found = non_dominated(_by_noise(asked), resource, points, time_limit)
    kept: list[Solution] = []
    for each in found:
        whole = replace(each, values=values_of(asked, each.assignment))
        if not kept or _error(plan, whole) < _error(plan, kept[-1]):
            kept.append(whole)
    return tuple(kept)


def _by_noise(asked: Problem) -> Problem:
    """error <- noise, which ends at float; a sum with rises may cancel, and end anywhere."""
    return replace(asked, error=asked.resources[NOISE], pairs={})


def _error(plan: Plan, solution: Solution) -> float:
    return predicted(plan, solution.values)[ERROR]


def point_of(plan: Plan, resource: str, solution: Solution) -> dict[str, Any]:
    values = predicted(plan, solution.values)
    tolerance = round_up(values[ERROR])
    is_asked = resource == "size" or resource != plan.objective
    objective = {"objective": resource} if resource in OBJECTIVES and is_asked else {}
    options = {**objective, "tolerance": tolerance} if tolerance > 0 else {}
    return {"resource": resource, **values, "options": options}


def predicted(plan: Plan, values: Mapping[str, float]) -> dict[str, float]:
    """Sums over units -> the whole model: error = √(Σ noise power / scale), others + the fixed.

    Of a loss and its noise the larger is the error: the tolerance that admits both.
    """
    convert = _units(plan)
    found = {name: convert(name, value) for name, value in values.items()}
    noise = found.pop(NOISE, 0.0)
    return {**found, ERROR: max(found[ERROR], noise)}


def _units(plan: Plan) -> Callable[[str, float], float]:
    return partial(in_user_units, plan.tables, plan.baseline, plan.error_scale)


def _check_tables(plan: Plan) -> None:
    if ERROR not in plan.tables or not plan.tables[ERROR].values:
        raise PlanError(
            "this plan holds no error table, so nothing can be solved again",
            fix="tune the model again with the wanted options",
        )


def _config(plan: Plan, wishes: Mapping[str, Any]) -> Config:
    """The plan's own wishes as numbers, with those that the caller names in their place."""
    for name in wishes:
        if name not in WISHES:
            raise ConfigError(f"unknown option {name!r}", fix=nearest(name, WISHES))
    if wishes.get("tolerance") == "bf16":
        raise ConfigError(
            "the error of bfloat16 is not in the tables of a plan",
            fix="a number, for example tolerance=0.02",
        )
    kept = {name: plan.budgets.get(name) for name in WISHES[1:]}
    config = Config(**{"objective": plan.objective, **kept, **wishes})
    for name, resource in LIMITED.items():
        is_told = bool(plan.live) if resource == MEMORY else resource in plan.tables
        known = is_told and resource in plan.baseline
        if getattr(config, name) is not None and not known:
            raise ConfigError(
                f"this plan holds no table of {resource}, so {name} cannot be met",
                fix=f"leave {name} out, or tune again",
            )
    return config


def _problem(plan: Plan, objective: str, budgets: Mapping[str, float]) -> Problem:
    """The stored tables as a problem."""
    return problem(
        plan.tables,
        objective=objective,
        budgets=budgets,
        baseline=plan.baseline,
        ties=plan.ties,
        live=plan.live,
        scale=plan.error_scale,
    )


def _resolved(plan: Plan, config: Config, budgets: Mapping[str, float], solution: Solution) -> Plan:
    """The old plan with new choices; everything that was measured on the old choices is dropped."""
    values = predicted(plan, solution.values)
    summary = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    return replace(
        plan,
        choices={unit: parse_choice(name, at=unit) for unit, name in solution.assignment.items()},
        ledger=tuple(_row(plan, row, solution.assignment) for row in plan.ledger),
        error=None,
        tolerance=budgets.get("tolerance"),
        latency_ms={},
        errors={},
        activation_bytes={},
        winner="plan",
        objective=config.objective,
        budgets=dict(budgets),
        solver=solver_facts(solution),
        timings={"solve": round(solution.seconds, 3)},
        provenance={**plan.provenance, "predicted": values},
        notes=(
            f"solved again without data: {summary} ({PREDICTED})",
            *filter(None, [plan.without_data]),
        ),
    )


def solver_facts(solution: Solution) -> SolverFacts:
    """What a Solution proves, as a plan keeps it."""
    return SolverFacts(
        solution.status,
        solution.objective,
        solution.values[solution.objective[0]],
        solution.bound,
        solution.gap,
        solution.seconds,
        dict(solution.scale),
    )


def _row(plan: Plan, row: Row, assignment: Mapping[str, str]) -> Row:
    """The line of a site under its new choice, from the tables; others stay as they are."""
    unit = row.site.name
    if unit not in assignment:
        return row
    name = assignment[unit]
    error, ms = plan.tables[ERROR].values[unit, name], plan.tables.get("latency")
    size = plan.tables.get("size")
    return replace(
        row,
        choice=name,
        reason=row.reason if name == row.choice else "",
        kernel=row.kernel if name == row.choice else "",
        predicted_error=math.sqrt(max(error, 0.0)),
        mode="" if row.mode == INDUCTOR else row.mode,
        ms_after=ms.values[unit, name] if ms else None,
        weight_bytes=int(size.values[unit, name]) if size else row.weight_bytes,
    )
