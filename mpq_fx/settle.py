"""The plan against simpler ones, all lowered equally well: the best that is allowed is
installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mpq_fx.binding import fresh
from mpq_fx.build import WRONG, Variant, build, caller
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.errors import InfeasibleError, first_line
from mpq_fx.facts import INDUCTOR, Choice
from mpq_fx.formats import FORMATS, format_named
from mpq_fx.measure import Measured, parse
from mpq_fx.passes.allocate import is_feasible, value_of
from mpq_fx.passes.lower.target import Lowered
from mpq_fx.problem import problem, round_up, words
from mpq_fx.search import Found, Judge, drop, joint_error, search
from mpq_fx.verify import Timing, pick, race

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

ALL_BF16 = "all bfloat16"
ALL_FLOAT = "all float"  # every site by the target, in the model's own dtype
# Shares of the time budget after which something is not begun any more.
SLOW_MODE, SIMPLER_PLAN, MORE_MODES = 0.5, 1.0, 0.75
HOPELESS = 1.5  # with this many times the plan's predicted latency a simpler one does not race
CLOSE = 1.1  # within this share of the winner's time all bfloat16 is tried in other modes, too
RETRIES = 3  # solves with a tighter tolerance when kernels round worse than the replay


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
    """Compile the plan and each uniform plan that is allowed, race them, keep the best.

    In this order, as far as the time budget reaches: the plan in the most promising mode of
    compilation, all bfloat16 likewise, simpler plans quickly, then the best in other modes: first
    in what finishes the mode that won, since that is known to be good.
    """
    plan, found = _meet_tolerance(graph, measured, found, config, clock)
    if not measured.target.is_timed:
        return Settled({plan.name: plan}, {plan.name: plan.error, INDUCTOR: 0.0}, {}, plan, found)
    once = replace(measured, replay=replace(measured.replay, caches=False))
    simpler = contenders(measured)
    predicted = {name: joint_error(once, a) for name, a in simpler.items()}
    variants = {plan.name: plan}
    for label in _worth_compiling(measured, found, judge, plan, predicted):
        is_rival = label == ALL_BF16
        if clock.is_past(SIMPLER_PLAN) and not is_rival:
            clock.cut(f"{label!r} was not compiled for comparison")
            continue
        mode = _modes(measured, simpler[label])[0] if is_rival else ""
        with clock.stage(_stage(mode)):
            _add(build(graph, measured, label, simpler[label], mode), variants, measured)
    if _is_allowed(measured, found, None, simpler[ALL_FLOAT], 0.0):
        variants[INDUCTOR] = Variant(INDUCTOR, simpler[ALL_FLOAT], None, Lowered({}), 0.0, INDUCTOR)
    winner, timings = _in_best_mode(graph, measured, config, clock, variants, run_float)
    compiled = {name: variant.error for name, variant in variants.items()}
    return Settled(variants, {INDUCTOR: 0.0, **predicted, **compiled}, timings, winner, found)


def _worth_compiling(
    measured: Measured,
    found: Found,
    judge: Judge | None,
    plan: Variant,
    predicted: Mapping[str, float],
) -> Iterator[str]:
    """Uniform plans that are allowed, differ from each other, and may be as fast as the plan.

    All bfloat16 is what one gets without mpq: no prediction of its latency rules it out.
    """
    asked = problem(measured.tables, objective="latency", budgets={}, baseline={})
    limit = HOPELESS * value_of(asked, "latency", plan.assignment)
    seen = [dict(plan.assignment)]
    for label, assignment in contenders(measured).items():
        is_fast = label == ALL_BF16 or value_of(asked, "latency", assignment) <= limit
        if assignment in seen or not is_fast:
            continue
        if _is_allowed(measured, found, judge, assignment, predicted[label]):
            seen.append(assignment)
            yield label


def _add(variant: Variant, variants: dict[str, Variant], measured: Measured) -> None:
    """A variant races unless what was compiled rounds worse than is allowed."""
    if measured.tolerance is None or variant.error <= measured.tolerance:
        variants[variant.name] = variant


def _modes(measured: Measured, assignment: Mapping[str, str]) -> tuple[str, ...]:
    """How the target would compile an assignment, the most promising mode first."""
    ms, choices = measured.tables["latency"].values, parse(measured.proposal, assignment)
    sites = measured.sites
    planned = [(s, choices[s.name], ms[s.name, assignment[s.name]]) for s in sites]
    return measured.target.modes(planned)


def _in_best_mode(
    graph: Graph,
    measured: Measured,
    config: Config,
    clock: Clock,
    variants: dict[str, Variant],
    run_float: Callable[..., Any],
) -> tuple[Variant, Mapping[str, Timing]]:
    """The fastest of `variants`, to which what is near is added in other modes; all times."""
    winner, timings = _raced(measured, config, clock, variants, run_float)
    tried = {(v.label, v.mode) for v in variants.values()}
    for more in (_finishing, _other_modes, _finishing):
        modes = _in_other_modes(measured, more, variants, timings, winner)
        wanted = [(v, mode) for v, mode in modes if (v.label, mode) not in tried]
        tried |= {(v.label, mode) for v, mode in wanted}
        if again := _compiled(graph, measured, clock, wanted):
            variants |= again  # all race again: times of two races do not compare
            winner, timings = _raced(measured, config, clock, variants, run_float)
    return winner, timings


More = Callable[[Measured, Variant, float], tuple[str, ...]]


def _other_modes(measured: Measured, variant: Variant, ms: float) -> tuple[str, ...]:
    return _modes(measured, variant.assignment)


def _finishing(measured: Measured, variant: Variant, ms: float) -> tuple[str, ...]:
    return measured.target.finishing(variant.mode, len(measured.sites), ms)


def _stage(mode: str) -> str:
    return f"compile with {mode}" if mode else "compile"


def _in_other_modes(
    measured: Measured,
    more: More,
    variants: Mapping[str, Variant],
    timings: Mapping[str, Timing],
    winner: Variant,
) -> Iterator[tuple[Variant, str]]:
    """What another mode may make the fastest: the winner, and all bfloat16 if it is not far."""
    limit = CLOSE * timings[winner.name].median
    rivals = [v for v in variants.values() if v.label == ALL_BF16 and v.label != winner.label]
    for variant in (winner, *rivals):
        ms = timings[variant.name].median
        if variant.installed is not None and ms <= limit:
            yield from ((variant, mode) for mode in more(measured, variant, ms))


def _compiled(
    graph: Graph, measured: Measured, clock: Clock, wanted: Sequence[tuple[Variant, str]]
) -> dict[str, Variant]:
    """Variants compiled in other modes, while there is time.

    A mode that fails to compile takes nothing from what is there; the plan names it.
    """
    found: dict[str, Variant] = {}
    for variant, mode in wanted:
        label = variant.label
        if clock.is_past(MORE_MODES):
            clock.cut(f"{label!r} was not compiled with {mode or 'kernels of oneDNN alone'}")
            break
        try:
            with clock.stage(_stage(mode)):
                _add(build(graph, measured, label, variant.assignment, mode), found, measured)
        except Exception as error:  # whatever a compiler raises: the variant is there already
            clock.note(f"{label!r} did not compile with {mode}: {first_line(error)}")
    return found


def _raced(
    measured: Measured,
    config: Config,
    clock: Clock,
    variants: Mapping[str, Variant],
    run_float: Callable[..., Any],
) -> tuple[Variant, Mapping[str, Timing]]:
    """The best variant and everybody's times."""
    with clock.stage("race"):
        timings = race(_callers(variants, run_float, measured.parts.choose[0]))
    return variants[_winner(config, variants, timings)], timings


def _callers(
    variants: Mapping[str, Variant], run_float: Callable[..., Any], record: Sequence[Any]
) -> dict[str, Callable[[], Any]]:
    """What a race calls: each variant on one recorded call."""
    args = fresh(record)
    return {
        name: caller(v.installed, args) if v.installed else lambda: run_float(*args)
        for name, v in variants.items()
    }


def _meet_tolerance(
    graph: Graph, measured: Measured, found: Found, config: Config, clock: Clock
) -> tuple[Variant, Found]:
    """Build the plan; where kernels round worse than the replay, search again a little tighter.

    An error far from what the replay promised is no rounding: a compiler went wrong in this mode,
    and the plan is built in the target's plainest one.
    """
    plan: Variant | None = None
    for _ in range(RETRIES):
        assignment, promised = found.candidate.solution.assignment, found.candidate.error
        mode = "" if clock.is_past(SLOW_MODE) else _modes(measured, assignment)[0]
        with clock.stage(_stage(mode)):
            plan = build(graph, measured, "plan", assignment, mode)
        if mode and measured.tolerance is not None and plan.error > WRONG * measured.tolerance:
            clock.note(
                f"with {mode} the plan computed something else: error {plan.error:.3g}, "
                f"{promised:.3g} by replay"
            )
            with clock.stage(_stage("")):
                plan = build(graph, measured, "plan", assignment)
        if measured.tolerance is None or plan.error <= measured.tolerance:
            return plan, found
        tighter = measured.tolerance * min(0.98, 0.98 * promised / plan.error)
        try:
            again = search(replace(measured, tolerance=tighter), config, clock)
        except InfeasibleError as error:  # of a tolerance that nobody typed
            raise _missed(measured, found, plan) from error
        found = replace(again, budgets=found.budgets)
    floats = contenders(measured)[ALL_FLOAT]
    if plan is not None and not _is_allowed(measured, found, None, floats, 0.0):
        raise _missed(measured, found, plan)
    clock.cut(f"{RETRIES} plans missed the tolerance once lowered; float instead")
    return build(graph, measured, "plan", floats), found


def _missed(measured: Measured, found: Found, plan: Variant) -> InfeasibleError:
    """What was compiled rounds worse than the replay, and the budgets leave nothing closer."""
    limits = " and ".join(words(n, at) for n, at in found.budgets.items() if n != "tolerance")
    return InfeasibleError(
        f"the plan within {limits} has an error of {plan.error:.3g} once compiled, more than the "
        f"{measured.tolerance:.3g} that is allowed, and the budgets leave no plan of less",
        fix=f'options={{"tolerance": {round_up(plan.error)}}}, or a larger budget',
    )


def _winner(config: Config, variants: Mapping[str, Variant], timings: Mapping[str, Timing]) -> str:
    """The plan, unless the objective says that a simpler variant is better."""
    if config.objective == "error":
        return min(variants, key=lambda name: variants[name].error)
    if config.objective == "latency":
        return pick(timings, list(variants))
    # By the exact table the plan is of least size, so that nothing simpler is smaller.
    return pick(timings, [name for name, v in variants.items() if v.label == "plan"])


def contenders(measured: Measured) -> dict[str, dict[str, str]]:
    """Each uniform plan, float among them."""
    options = measured.proposal.options
    offered = [choice for kept in options.values() for choice in kept]
    rare = {name: kinds for name, kinds in WHERE_OFFERED.items() if any(map(kinds[0], offered))}
    return {
        name: {unit: _cheapest(measured, unit, wanted) for unit in options}
        for name, wanted in {**UNIFORM, **rare}.items()
    }


def _in_float_codes(choice: Choice) -> bool:
    """8-bit floats on both sides; a site's own dtype need not be a format."""
    names = (choice.weight, choice.activation)
    return all(name in FORMATS and FORMATS[name].has_float_codes for name in names)


Kinds = tuple[Callable[[Choice], bool], ...]
UNIFORM: dict[str, Kinds] = {
    ALL_BF16: (lambda c: c.weight == "bfloat16",),
    "all int8": (
        lambda c: c.weight == "int8" and c.scaling == "static",  # codes pass from site to site
        lambda c: c.weight == "int8" and not format_named(c.activation).is_plain,
        lambda c: c.weight == "bfloat16",
    ),
    ALL_FLOAT: (),
}
WHERE_OFFERED: dict[str, Kinds] = {
    "all fp8": (_in_float_codes, lambda c: c.weight == "bfloat16"),
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
    judge: Judge | None,
    assignment: Mapping[str, str],
    error: float,
) -> bool:
    """Within the tolerance (by replay), what the user's metric allows, and the budgets?"""
    tolerance = measured.tolerance
    if tolerance is not None and error > tolerance:
        return False
    if judge is not None and drop(measured, judge, assignment) > judge.limit:
        return False
    budgets = {k: v for k, v in found.budgets.items() if k != "tolerance"}
    asked = problem(
        measured.tables,
        objective="latency",
        budgets=budgets,
        baseline=found.baseline,
        live=measured.live,
    )
    return is_feasible(asked, assignment)
