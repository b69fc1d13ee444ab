"""Every plan of a small net measured -> how far each search lands from the optimum.

    python bench/regret.py vit [--metrics measured,fisher,…] [--units 8] [--bits 8,4,2]

Which layer gets how many bits, as in allocation.py: the least joint error under a budget of mean
bits, at five budgets between the cheapest plan and the dearest; all other layers stay in float.
The optimum is taken among all plans, by their joint error on the calls that the metrics see.  A
metric fills the table, an allocator solves it (ours, with pairs, and those of other tools), and
that plan is looked up.  Regret = its error / the least one - 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

import torch
from allocation import FORMATS, mean_bits, registered, task_of
from allocators import DEFAULT, RIVALS, Rival, default, ours, without_loss
from results import parser
from trained import NETS, Net

from mpq_fx.facts import Choice, Table
from mpq_fx.passes import METRICS
from mpq_fx.passes.allocate import Problem, is_feasible
from mpq_fx.passes.allocate.rescaled import REFINE_ROUNDS
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.ranking import measured

SHARES = (0.15, 0.3, 0.45, 0.6, 0.75)  # of the way from the cheapest plan to the dearest
Key = tuple[str, ...]  # a choice for each unit, by name


@dataclass(frozen=True)
class Regret:
    """Of one search, over the budgets that it kept to."""

    search: str
    metric: str
    regrets: tuple[float | None, ...]  # None: no plan, or one above the budget
    forward_passes: float

    def __str__(self) -> str:
        found = [r for r in self.regrets if r is not None]
        missed = len(self.regrets) - len(found)
        numbers = f"{mean(found):8.2%} mean {max(found):8.2%} worst" if found else "no plan"
        cost = f"{self.forward_passes:5.0f} forward passes a call"
        return f"{self.search:26} {self.metric:20} {numbers:28} {cost}" + (
            f", {missed} of {len(self.regrets)} budgets missed" if missed else ""
        )


def compare(net: Net, metrics: Sequence[str], units: int, bits: Sequence[int]) -> list[Regret]:
    found: list[Regret] = []
    small = restricted(task_of(net, 0, "bits_only"), units, bits)
    costs = mean_bits(small)
    every = enumerated(small)
    errors = dict(zip(every, measured(small, [*every.values()]), strict=True))
    searches = [*ours(metrics), *RIVALS]
    tables = {m: METRICS.named(m)(small) for m in {"auto", *(s.metric for s in searches)}}
    measure, beside = partial(power, errors, [*_changing(small)]), tables["auto"].others
    rows: dict[tuple[str, str], list[float | None]] = {}
    for share in SHARES:
        asked = partial(problem_of, small, costs=costs, share=share)
        mine = default(measure, [asked(table) for table in beside])
        for each in (mine, *searches):
            at = regret(asked(tables[each.metric]), each, errors)
            rows.setdefault((each.name, each.metric), []).append(at)
    for (search, metric), regrets in rows.items():
        plans = (1 + len(beside) + REFINE_ROUNDS) * (search == DEFAULT) * len(small.records)
        passes = tables[metric].provenance["forward_passes"] + plans
        found.append(Regret(search, metric, tuple(regrets), passes))
    return found


def restricted(task: Task, units: int, bits: Sequence[int]) -> Task:
    """Some units, spread over the net, with some widths each; all others stay in float."""
    able = [unit for unit in task.units if len(task.options[unit[0]]) > 1]
    kept = set(able[:: max(1, len(able) // units)][:units])
    options: dict[str, tuple[Choice, ...]] = {}
    for unit in task.units:
        for site in unit:
            first, *others = task.options[site]
            wanted = [c for c in others if FORMATS[c.weight].element.bits in bits]
            options[site] = (first, *(wanted if unit in kept else ()))
    return replace(task, options=options)


def enumerated(task: Task) -> dict[Key, Mapping[str, Choice]]:
    """Every plan that leaves no unit of choice in float, by the names of its choices."""
    units = [*_changing(task)]
    plans = {}
    for picks in itertools.product(*(task.options[unit[0]][1:] for unit in units)):
        chosen = zip(units, picks, strict=True)
        plan = {site: choice for unit, choice in chosen for site in unit}
        plans[tuple(choice.name for choice in picks)] = plan
    return plans


def _changing(task: Task) -> Iterator[tuple[str, ...]]:
    """The units that have a choice."""
    return (unit for unit in task.units if len(task.options[unit[0]]) > 1)


def power(
    errors: Mapping[Key, float], units: Sequence[tuple[str, ...]], plan: Mapping[str, str]
) -> float:
    """Noise power of a plan, among those that were all measured."""
    return errors[tuple(plan[unit[0]] for unit in units)] ** 2


def problem_of(
    task: Task, table: Table, *, costs: Mapping[tuple[str, str], float], share: float
) -> Problem:
    """The least error within a budget that lies `share` of the way from cheapest to dearest."""
    units = [*_changing(task)]
    names = {unit[0]: tuple(c.name for c in task.options[unit[0]][1:]) for unit in units}
    cost = {(u[0], n): sum(costs[s, n] for s in u) for u in units for n in names[u[0]]}
    low, high = (
        sum(pick(cost[u, n] for n in kept) for u, kept in names.items()) for pick in (min, max)
    )
    return Problem(
        options=names,
        error={(u[0], n): sum(table.values[s, n] for s in u) for u in units for n in names[u[0]]},
        pairs={key: value for key, value in table.pairs.items() if _is_asked(key, names)},
        objective=("error",),
        resources={"bits": cost},
        budgets={"bits": low + share * (high - low)},
    )


def regret(problem: Problem, search: Rival, errors: Mapping[Key, float]) -> float | None:
    """Measured error of the plan that a search picks, against the least within the budget."""
    found = search.allocate(problem)
    if found is None or not is_feasible(problem, found):
        return None
    within = [
        error
        for key, error in errors.items()
        if is_feasible(problem, dict(zip(problem.options, key, strict=True)))
    ]
    return errors[tuple(found[unit] for unit in problem.options)] / min(within) - 1


def _is_asked(pair: tuple[str, str, str, str], names: Mapping[str, tuple[str, ...]]) -> bool:
    u, c, v, d = pair
    return c in names.get(u, ()) and d in names.get(v, ())


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("net", choices=NETS)
    made.add_argument("--metrics", default=",".join(without_loss()))
    made.add_argument("--units", type=int, default=8)
    made.add_argument("--bits", default="8,4,2")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    metrics = options.metrics.split(",")
    registered()
    bits = [int(width) for width in options.bits.split(",")]
    net = NETS[options.net]()
    with torch.no_grad():
        regrets = compare(net, metrics, options.units, bits)
    for found in regrets:
        print(f"{options.net:8} {found}", flush=True)


if __name__ == "__main__":
    main()
