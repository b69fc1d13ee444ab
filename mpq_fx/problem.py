"""tables + budgets -> Problem, and back: where the user's words become the solver's quantities.

tolerance    Σ noise power        ≤ tolerance² · scale   (scale from the bisection on measured
error)
             of a loss also Σ noise power of the singles: rises may cancel, errors remain
max_latency  rest + Σ ms          ≤ ms of a call          rest = what no site accounts for
max_size     rest + Σ bytes       ≤ bytes             (what sites share counts once)
max_bits     Σ share of mean bits ≤ mean bits
min_bits     Σ share of mean bits ≥ mean bits
max_bops     Σ MAC · bits · bits  ≤ bops
max_activation_memory: Σ bytes of the values that are live at an op, for every op  ≤ bytes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mpq_fx.activation_memory import Options, changes
from mpq_fx.config import Config, budget
from mpq_fx.encoding import parse_choice
from mpq_fx.errors import InfeasibleError
from mpq_fx.facts import Live, Table
from mpq_fx.passes.allocate import Problem, diagnose
from mpq_fx.passes.allocate.infeasible import OPTION, no_agreement, unsigned
from mpq_fx.passes.allocate.problem import (
    ERROR,
    MINUS,
    NOISE,
    Condition,
    Peak,
    Term,
    limits_of,
)

MEMORY = "activation_memory"
RESOURCES = {
    "max_latency": "latency",
    "max_size": "size",
    "max_bits": "bits",
    "max_bops": "bops",
    "max_activation_memory": MEMORY,
}
FLOORS = {"min_bits": "bits"}
LIMITED = {**RESOURCES, **FLOORS}  # option -> quantity
WHOLE = ("bits", MEMORY)  # what no part of the model uses besides the units
UNIT = {"max_latency": " ms", "max_size": " bytes", "max_activation_memory": " bytes"}
OBJECTIVES = {
    "latency": ("latency", "error"),
    "size": ("size", "latency", "error"),
    "error": ("error", "latency"),
}


def numbers(config: Config, baseline: Mapping[str, float]) -> dict[str, float]:
    """The budgets of a Config as numbers; shares such as "0.5x" are of the float model."""
    found = {
        name: budget(getattr(config, name), baseline[resource])
        for name, resource in LIMITED.items()
    }
    return {name: value for name, value in found.items() if value is not None}


def problem(  # noqa: PLR0913 -- all that a problem is made of
    tables: Mapping[str, Table],
    *,
    objective: str,
    budgets: Mapping[str, float],
    baseline: Mapping[str, float],
    ties: Sequence[Sequence[str]] = (),
    live: Sequence[Live] = (),
    scale: float = 1.0,
) -> Problem:
    """The allocation problem of one set of tables; `budgets` as `numbers` gives them + tolerance.

    `live` are the values in memory at once.  Raises InfeasibleError for a budget below what is
    fixed in the model.
    """
    options: dict[str, tuple[str, ...]] = {}
    for unit, option in tables["error"].values:
        options[unit] = (*options.get(unit, ()), option)
    known = (*RESOURCES.values(), NOISE)
    resources = {name: dict(tables[name].values) for name in known if name in tables}
    limits = {
        RESOURCES[name]: value - _reachable(name, value, fixed(tables, baseline, RESOURCES[name]))
        for name, value in budgets.items()
        if name in RESOURCES
    }
    if "tolerance" in budgets:
        both = (ERROR, NOISE) if NOISE in tables else (ERROR,)
        limits |= dict.fromkeys(both, budgets["tolerance"] ** 2 * scale)
    return Problem(
        options=options,
        error=dict(tables["error"].values),
        pairs=dict(tables["error"].pairs),
        resources=resources,
        edges={name: dict(tables[name].pairs) for name in resources if tables[name].pairs},
        budgets=limits,
        floors={FLOORS[name]: value for name, value in budgets.items() if name in FLOORS},
        peaks=_peaks(options, live),
        objective=OBJECTIVES[objective],
        ties=tuple(map(tuple, ties)),
    )


def _peaks(options: Mapping[str, tuple[str, ...]], live: Sequence[Live]) -> dict[str, Peak]:
    if not live:
        return {}
    choices = {unit: [parse_choice(name) for name in names] for unit, names in options.items()}
    return {MEMORY: tuple(_sum(found, choices) for found in live)}


def _sum(found: Live, options: Options) -> tuple[Term, ...]:
    """Bytes of the values that are live at one op."""
    terms = [Term(float(value.bytes)) for value in found]
    for change in (change for value in found for change in changes(value, options)):
        when = tuple(Condition(site, names) for site, names in change.choices.items())
        terms.append(Term(float(change.bytes), when))
    return tuple(terms)


def unchanged(asked: Problem) -> dict[str, str]:
    """The plan of the user's own precisions: a search that ends without a better one has this."""
    return {unit: offers[0] for unit, offers in asked.options.items()}


def fixed(tables: Mapping[str, Table], baseline: Mapping[str, float], name: str) -> float:
    """What the float model uses outside the units: the part of a budget that no choice can change.

    0 for mean bits, which speak of the weights of units only, and for what is live at once, which
    is counted in full.
    """
    if name in WHOLE:
        return 0.0
    first: dict[str, str] = {}  # the first option of a unit is the precision of the user's model
    for unit, option in tables[ERROR].values:
        first.setdefault(unit, option)
    return baseline[name] - total(tables[name], first)


def total(table: Table, assignment: Mapping[str, str]) -> float:
    """Σ over units, and over the pairs of choices that an assignment has."""
    both = (
        term
        for (u, c, v, d), term in table.pairs.items()
        if assignment[u] == c and assignment[v] == d
    )
    return sum(table.values[key] for key in assignment.items()) + sum(both)


def in_user_units(
    tables: Mapping[str, Table],
    baseline: Mapping[str, float],
    scale: float,
    name: str,
    value: float,
) -> float:
    """A sum over units -> the whole model: error = √(Σ noise power / scale), others + the fixed."""
    if name in (ERROR, NOISE):
        return math.sqrt(max(value, 0.0) / scale)
    return value + fixed(tables, baseline, name)


def unreachable(asked: Problem, convert: Callable[[str, float], float]) -> InfeasibleError:
    """The solver's diagnosis in the user's own words; `convert` is `in_user_units` of the model."""
    found, limits = diagnose(asked), limits_of(asked)
    if not found.conflict:
        return no_agreement(asked)

    def in_units(name: str, value: float) -> float:
        return convert(name.removeprefix(MINUS), unsigned(name, value))

    def said(name: str, value: float) -> str:
        return words(OPTION[name], in_units(name, value))

    asking = dict.fromkeys(said(n, limits[n]) for n in found.conflict)
    lines = dict.fromkeys(["no plan meets " + " and ".join(asking)])  # error and noise say the same
    for name in found.conflict:
        reachable = [said(name, found.alone[name])]
        if len(limits) > 1 and found.kept[name] < math.inf:
            reachable.append(said(name, found.kept[name]) + " with the other budgets kept")
        lines["    within reach: " + ", ".join(reachable)] = None
    grown: dict[str, float] = {}
    for n, at in found.reachable.items():
        if at > limits[n]:
            rounded = round_down if n.startswith(MINUS) else round_up
            enough = rounded(in_units(n, at), digits=4)
            grown[OPTION[n]] = max(enough, grown.get(OPTION[n], 0.0))
    fix = ", ".join(f'"{name}": {number(value)}' for name, value in grown.items())
    typed = f"options={{{fix}}}" if grown else "wider budgets"
    return InfeasibleError("\n".join(lines), at="budgets", fix=typed)


def words(option: str, value: float) -> str:
    """ "max_latency <= 9 ms", "min_bits >= 4" """
    relation = ">=" if option in FLOORS else "<="
    return f"{option} {relation} {number(value)}{UNIT.get(option, '')}"


def number(value: float) -> str:
    """Four digits, and all of them before the point: as a user types it."""
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def round_up(value: float, digits: int = 2) -> float:
    """The next number of so many digits: what is printed must be enough when typed."""
    if value <= 0.0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}")


def round_down(value: float, digits: int = 2) -> float:
    """The number of so many digits below: a floor that is printed must be in reach when typed."""
    if value <= 0.0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.floor(value / unit + 1e-9) * unit:.{digits}g}")


def _reachable(name: str, value: float, rest: float) -> float:
    """`rest`, or InfeasibleError where the model uses more without any choice."""
    if value < rest:
        raise InfeasibleError(
            f"no plan meets {words(name, value)}: {rest:g} of it are used by parts of the model "
            "that have no choice",
            at="budgets",
            fix=f"a {name} above {rest:g}",
        )
    return rest
