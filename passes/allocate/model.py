"""min max_k Σ c[k]·x + Σ q[k]·y   s.t.  Σ_i x[g, i] = 1,  Σ_j y[g, i, h, j] = x[g, i],  rows,
Σ_{i of class} x[g, i] = Σ_{j of class} x[h, j] of linked groups: one run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ortools.sat.python import cp_model

from mpq_fx.passes.allocate.groups import Link
from mpq_fx.passes.allocate.quantity import Meeting
from mpq_fx.passes.allocate.rows import Row

# One core does 0.27 to 0.7 of CP-SAT's deterministic work in a second.  The limit in work ends a
# run, so that the answer does not depend on the machine's load; the limit in seconds is a guard
# for a machine that is several times slower.
WORK_PER_SECOND = 0.3
PATIENCE = 6.0
BUILD = 1e-5  # work of building a model, per choice: 30 µs

Outcome = Literal["OPTIMAL", "FEASIBLE", "INFEASIBLE", "UNKNOWN"]


@dataclass
class Clock:
    """How much of a time limit is left, in deterministic work; shared by all runs of one solve."""

    limit: float
    work: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return max(self.limit * WORK_PER_SECOND - self.work, 0.0)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


@dataclass(frozen=True)
class Run:
    """What one CP-SAT run found: option indexes and a bound in integers of the objective row."""

    outcome: Outcome
    picks: tuple[int, ...] = ()
    least: int = 0


@dataclass(frozen=True)
class Task:
    """Minimize the largest of `objective`, which have one base and step, under `rows` (of each
    limited quantity) and `links`, never answering one of `cuts`, starting from `hint`.
    """

    sizes: tuple[int, ...]
    objective: tuple[Row, ...]
    rows: Mapping[str, tuple[Row, ...]]
    links: tuple[Link, ...] = ()
    cuts: tuple[tuple[int, ...], ...] = ()
    hint: tuple[int | None, ...] = ()

    @property
    def every_row(self) -> tuple[Row, ...]:
        return (*(row for rows in self.rows.values() for row in rows), *self.objective)


def run(task: Task, clock: Clock) -> Run:
    """One deterministic run: one worker, a fixed seed, a limit in work rather than in seconds."""
    model = cp_model.CpModel()
    x = [[model.new_bool_var("") for _ in range(size)] for size in task.sizes]
    for choices in x:
        model.add_exactly_one(choices)
    y, met = _products(model, x, task), _meetings(model, x, task)
    for link in task.links:
        _agree(model, x, link)
    for row in task.every_row:
        if row.limit is not None:
            model.add(_expression(x, y, met, row) <= row.limit)
    for cut in task.cuts:
        model.add_bool_or([x[g][i].negated() for g, i in enumerate(cut)])
    for g, pick in enumerate(task.hint):
        for i, choice in enumerate(x[g] if pick is not None else ()):
            model.add_hint(choice, i == pick)
    sums = [_expression(x, y, met, row) for row in task.objective]
    model.minimize(sums[0] if len(sums) == 1 else _largest(model, sums, task))
    return _solve(model, x, clock)


def _largest(
    model: cp_model.CpModel, sums: Sequence[cp_model.LinearExprT], task: Task
) -> cp_model.IntVar:
    most = model.new_int_var(0, max(row.most for row in task.objective), "")
    for each in sums:
        model.add(each <= most)
    return most


def _agree(model: cp_model.CpModel, x: Sequence[Sequence[cp_model.IntVar]], link: Link) -> None:
    """As many options of a class in one group as in the next: one or none."""
    for name in sorted({name for names in link.classes for name in names}):
        taken = [
            sum(choice for choice, own in zip(x[g], names, strict=True) if own == name)
            for g, names in zip(link.groups, link.classes, strict=True)
        ]
        for other in taken[1:]:
            model.add(taken[0] - other == 0)


def _meetings(
    model: cp_model.CpModel, x: Sequence[Sequence[cp_model.IntVar]], task: Task
) -> dict[Meeting, cp_model.IntVar]:
    """met[m] = every group of m takes one of its options there"""
    met = {}
    for meeting in dict.fromkeys(m for row in task.every_row for m in row.joint):
        met[meeting] = model.new_bool_var("")
        taken = [sum(x[g][i] for i in options) for g, options in meeting]
        for each in taken:
            model.add(met[meeting] <= each)
        model.add(met[meeting] >= sum(taken) - (len(taken) - 1))
    return met


def _products(
    model: cp_model.CpModel, x: list[list[cp_model.IntVar]], task: Task
) -> dict[tuple[int, int], dict[tuple[int, int], cp_model.IntVar]]:
    """y[g, i, h, j] = x[g, i] and x[h, j].

    Σ_j y = x[g, i] and Σ_i y = x[h, j] hold for terms of either sign, and relax tighter than the
    three inequalities per product.
    """
    y = {}
    for g, h in dict.fromkeys(at for row in task.every_row for at in row.blocks):
        cells = {(i, j): model.new_bool_var("") for i in range(len(x[g])) for j in range(len(x[h]))}
        for i, choice in enumerate(x[g]):
            model.add(sum(cells[i, j] for j in range(len(x[h]))) == choice)
        for j, choice in enumerate(x[h]):
            model.add(sum(cells[i, j] for i in range(len(x[g]))) == choice)
        y[g, h] = cells
    return y


def _expression(
    x: Sequence[Sequence[cp_model.IntVar]],
    y: Mapping[tuple[int, int], Mapping[tuple[int, int], cp_model.IntVar]],
    met: Mapping[Meeting, cp_model.IntVar],
    row: Row,
) -> cp_model.LinearExprT:
    singles = zip((v for vs in x for v in vs), (c for cs in row.single for c in cs), strict=True)
    products = ((y[at][ij], c) for at, block in row.blocks.items() for ij, c in block.items())
    joint = ((met[m], holds - fails) for m, (fails, holds) in row.joint.items())
    terms = [(v, c) for v, c in (*singles, *products, *joint) if c]
    constant = row.offset + sum(fails for fails, _ in row.joint.values())
    return constant + cp_model.LinearExpr.weighted_sum([v for v, _ in terms], [c for _, c in terms])


def _solve(model: cp_model.CpModel, x: list[list[cp_model.IntVar]], clock: Clock) -> Run:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2  # products of choices: 20 times faster than level 1
    solver.parameters.max_deterministic_time = clock.left
    solver.parameters.max_time_in_seconds = max(clock.limit * PATIENCE - clock.seconds, 0.0)
    status = solver.solve(model)
    clock.work += solver.response_proto.deterministic_time + BUILD * sum(map(len, x))
    if status == cp_model.INFEASIBLE:
        return Run("INFEASIBLE")
    if status == cp_model.UNKNOWN:
        return Run("UNKNOWN", least=solver.response_proto.inner_objective_lower_bound)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), model.validate()
    picks = tuple(next(i for i, v in enumerate(vs) if solver.boolean_value(v)) for vs in x)
    outcome = "OPTIMAL" if status == cp_model.OPTIMAL else "FEASIBLE"
    return Run(outcome, picks, solver.response_proto.inner_objective_lower_bound)
