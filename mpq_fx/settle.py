"""The plan against simpler ones, all lowered equally well: the best that is allowed is
installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mpq_fx.binding import Installed
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.facts import Choice
from mpq_fx.formats import format_named
from mpq_fx.graph import clone, placeholders
from mpq_fx.measure import Measured, parse
from mpq_fx.passes.allocate import is_feasible
from mpq_fx.passes.analyze.replay import output_error
from mpq_fx.passes.lower.constants import fold_constants
from mpq_fx.passes.lower.target import Kernels, Target
from mpq_fx.passes.rewrite import rewrite
from mpq_fx.problem import problem
from mpq_fx.search import Found, Judge, drop, joint_error, search
from mpq_fx.sizes import size_guard
from mpq_fx.verify import Timing, pick, race

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

POLISH = 0.75  # share of the time budget after which no further compilation is begun
TEMPLATES = ", templates"  # what a variant's name ends with when it was compiled with them
RETRIES = 3  # solves with a tighter tolerance when kernels round worse than the replay


@dataclass(frozen=True)
class Variant:
    """An assignment, compiled, with its error measured on what really runs.

    `installed` is None for the user's own float model under Inductor.
    """

    name: str
    assignment: Mapping[str, str]
    installed: Installed | None
    kernels: Kernels
    error: float
    thorough: bool = False  # compiled with matmul templates


@dataclass(frozen=True)
class Settled:
    """All variants that are allowed, their times, and the one to run."""

    variants: Mapping[str, Variant]
    errors: Mapping[str, float]  # of refused ones too
    timings: Mapping[str, Timing]
    winner: Variant
    found: Found


def settle(  # noqa: PLR0913 -- all that was found out so far
    graph: Graph,
    measured: Measured,
    found: Found,
    config: Config,
    clock: Clock,
    run_float: Callable[..., Any],
    judge: Judge | None,
) -> Settled:
    """Compile the plan and each uniform plan that is allowed, race them, keep the best."""
    plan, found = _meet_tolerance(graph, measured, found, config, clock)
    errors = {"plan": plan.error, "inductor float": 0.0}
    if not measured.target.is_timed:
        return Settled({"plan": plan}, errors, {}, plan, found)
    floats = {unit: kept[0].name for unit, kept in measured.proposal.options.items()}
    variants = {"plan": plan, "inductor float": Variant("inductor float", floats, None, {}, 0.0)}
    for name, assignment in contenders(measured).items():
        errors[name] = joint_error(measured, assignment)
        if _is_repeated(assignment, variants) or not _is_allowed(
            measured, found, assignment, errors[name], judge
        ):
            continue
        if clock.is_past():
            clock.cut(f"{name!r} was not compiled for comparison")
            continue
        with clock.stage("compile"):
            variant = build(graph, measured, name, assignment)
        errors[name] = variant.error
        if measured.tolerance is None or variant.error <= measured.tolerance:
            variants[name] = variant
    if not _is_allowed(measured, found, floats, 0.0, None):
        del variants["inductor float"]
    with clock.stage("race"):
        timings = race(_callers(variants, run_float, measured.parts.choose[0]))
    winner = variants[_winner(config, found, variants, timings)]
    winner, timings = _polished(graph, measured, winner, timings, clock)
    return Settled(variants, errors, timings, winner, found)


def _callers(
    variants: Mapping[str, Variant], run_float: Callable[..., Any], record: Sequence[Any]
) -> dict[str, Callable[[], Any]]:
    """What a race calls: each variant on one recorded call."""
    return {
        name: caller(v.installed, record) if v.installed else lambda: run_float(*record)
        for name, v in variants.items()
    }


def _polished(
    graph: Graph,
    measured: Measured,
    winner: Variant,
    timings: Mapping[str, Timing],
    clock: Clock,
) -> tuple[Variant, Mapping[str, Timing]]:
    """The winner compiled again with matmul templates, if that is faster and as accurate."""
    if winner.installed is None or not measured.target.has_templates:
        return winner, timings
    if clock.is_past(POLISH):
        clock.cut("matmul templates were not tried")
        return winner, timings
    with clock.stage("compile with templates"):
        name = f"{winner.name}{TEMPLATES}"
        other = build(graph, measured, name, winner.assignment, thorough=True)
    if measured.tolerance is not None and other.error > measured.tolerance:
        return winner, timings
    record = measured.parts.choose[0]
    assert other.installed is not None
    with clock.stage("race"):
        pair = {
            winner.name: caller(winner.installed, record),
            name: caller(other.installed, record),
        }
        again = race(pair)
    best = other if pick(again, [winner.name, name]) == name else winner
    return best, {**timings, **again}


def _meet_tolerance(
    graph: Graph, measured: Measured, found: Found, config: Config, clock: Clock
) -> tuple[Variant, Found]:
    """Build the plan; where kernels round worse than the replay, search again a little tighter."""
    for _ in range(RETRIES):
        with clock.stage("compile"):
            plan = build(graph, measured, "plan", found.candidate.solution.assignment)
        if measured.tolerance is None or plan.error <= measured.tolerance:
            return plan, found
        tighter = measured.tolerance * min(0.98, 0.98 * found.candidate.error / plan.error)
        found = replace(
            search(replace(measured, tolerance=tighter), config, clock), budgets=found.budgets
        )
    floats = {unit: kept[0].name for unit, kept in measured.proposal.options.items()}
    clock.cut(f"{RETRIES} plans missed the tolerance once lowered; float instead")
    return build(graph, measured, "plan", floats), found


def _winner(
    config: Config, found: Found, variants: Mapping[str, Variant], timings: Mapping[str, Timing]
) -> str:
    """The plan, unless the objective says that a simpler variant is better."""
    names = list(variants)
    if config.objective == "latency":
        return pick(timings, names)
    if config.objective == "error":
        return min(names, key=lambda name: variants[name].error)
    return "plan"  # of least size by the exact table: nothing simpler is smaller


def contenders(measured: Measured) -> dict[str, dict[str, str]]:
    """Each uniform plan, float among them."""
    return {
        name: {unit: _cheapest(measured, unit, wanted) for unit in measured.proposal.options}
        for name, wanted in UNIFORM.items()
    }


UNIFORM: dict[str, tuple[Callable[[Choice], bool], ...]] = {
    "all bfloat16": (lambda c: c.weight == "bfloat16",),
    "all int8": (
        lambda c: c.weight == "int8" and not format_named(c.activation).is_float,
        lambda c: c.weight == "bfloat16",
    ),
    "all float": (),
}


def _cheapest(measured: Measured, unit: str, wanted: Sequence[Callable[[Choice], bool]]) -> str:
    """The cheapest choice of the first kind that the unit offers, else its float."""
    cost = measured.tables["latency"].values
    kept = measured.proposal.options[unit]
    for is_wanted in wanted:
        names = [c.name for c in kept if is_wanted(c)]
        if names:
            return min(names, key=lambda name: cost[unit, name])
    return kept[0].name


def _is_allowed(
    measured: Measured,
    found: Found,
    assignment: Mapping[str, str],
    error: float,
    judge: Judge | None,
) -> bool:
    """Within the tolerance (by replay), what the user's metric allows, and the budgets?"""
    tolerance = measured.tolerance
    if tolerance is not None and error > tolerance:
        return False
    if judge is not None and drop(measured, judge, assignment) > judge.limit:
        return False
    budgets = {k: v for k, v in found.budgets.items() if k != "tolerance"}
    return is_feasible(
        problem(measured.tables, objective="latency", budgets=budgets, baseline=found.baseline),
        assignment,
    )


def _is_repeated(assignment: Mapping[str, str], variants: Mapping[str, Variant]) -> bool:
    # The user's own float model is compiled otherwise: mpq's float has its weights packed.
    same = (dict(v.assignment) == dict(assignment) for v in variants.values() if v.installed)
    return any(same)


def build(
    graph: Graph,
    measured: Measured,
    name: str,
    assignment: Mapping[str, str],
    *,
    thorough: bool = False,
) -> Variant:
    """Rewrite, lower, fold and compile one assignment; then measure what it really computes."""
    choices = parse(measured.proposal, assignment)
    installed, kernels = lower(
        graph,
        measured.target,
        measured.values,
        choices,
        measured.replay.scales,
        thorough=thorough,
    )
    errors = [
        output_error(caller(installed, fresh(record))(), reference, measured.excluded)
        for record, reference in zip(measured.parts.choose, measured.references, strict=True)
    ]
    return Variant(name, assignment, installed, kernels, max(errors), thorough)


def lower(
    graph: Graph,
    target: Target,
    values: Mapping[str, torch.Tensor],
    choices: Mapping[str, Choice],
    scales: Any,
    *,
    thorough: bool = False,
) -> tuple[Installed, Kernels]:
    """canonical graph + choices -> compiled callable over owned constants, and its callees."""
    gm, _ = clone(graph.gm)
    rewrite(gm, graph.sites, choices, scales)
    kernels = target.lower(gm)
    folded = fold_constants(gm, {graph.names[k]: values[graph.names[k]] for k in graph.parameters})
    inputs = [node.meta["val"] for node in placeholders(folded.gm)]
    with size_guard(graph.gm) as accepts:
        compiled = target.compile(folded.gm, inputs, thorough)
    live_names = tuple(graph.names[k] for k in folded.live)
    passed = tuple(getattr(folded.gm, name) for name in folded.passed)
    installed = Installed(
        compiled.run,
        folded.live,
        passed,
        folded.gm,
        live_names,
        compiled.derived,
        gm,
        folded.recipes,
        accepts,
    )
    return installed, kernels


def caller(installed: Installed, record: Sequence[Any]) -> Callable[[], Any]:
    """A call of a compiled plan on a recorded call; mutated inputs are copies, and written to."""
    args = [record[k] for k in installed.live]
    return lambda: installed.run(*args, *installed.passed)


def fresh(record: Sequence[Any]) -> tuple[Any, ...]:
    """A record whose plain tensors are copies, for a run that may write to its inputs."""
    return tuple(
        x.clone() if isinstance(x, torch.Tensor) and not isinstance(x, torch.nn.Parameter) else x
        for x in record
    )
