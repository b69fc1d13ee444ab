"""Every metric × search × baseline at equal budgets, on trained nets: error and task, by seed.

    python bench/allocation.py vit [--seeds 5] [--save]

Two questions about each net.  At 2.5, 3, 4, 5 and 6 mean bits of a code (weights alone, 2 to 8
bits with a scale and a zero point for each row): which layer gets how many?  And at 0.5, 0.6 and
0.7 of the sites' float latency (all choices of the `cpu` target, weights and activations, as
measured here): which choice?  A seed draws the rows to calibrate with.  The error is the relative
RMS error of the outputs on batches that no search has seen; the task's score is of the same plan.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from allocators import DEFAULT, RIVALS, default, ours, without_loss
from results import parser
from trained import NETS, Net

import mpq_fx
from mpq_fx.config import Config
from mpq_fx.facts import Choice, Table
from mpq_fx.formats import ROW, Format, Int
from mpq_fx.graph import placeholders
from mpq_fx.measure import ERROR_TABLE, split
from mpq_fx.passes import METRICS, target_named
from mpq_fx.passes.allocate import Problem, is_feasible
from mpq_fx.passes.allocate.rescaled import REFINE_ROUNDS
from mpq_fx.passes.analyze.cost import latency
from mpq_fx.passes.analyze.metric import Record, Task
from mpq_fx.passes.analyze.metrics.auto import auto
from mpq_fx.passes.analyze.ranking import measured
from mpq_fx.passes.analyze.trace import trace
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.plugins import add

FILE = Path(__file__).parents[1] / "docs" / "benchmarks" / "allocation.json"
BITS = (2, 3, 4, 5, 6, 8)
MEAN_BITS = (2.5, 3.0, 4.0, 5.0, 6.0)  # at 2 there is one plan
LATENCIES = (0.5, 0.6, 0.7)
SEEDS = 5
# A pass for each pair of singles, or dozens for each site, or thousands of pairs to solve with.
LONG_ON_MINILM = (
    "measured_pairs",
    "projected_pairs",
    "block_pairs",
    "interlayer_kl",
    "hessian_eigenvalue",
    "eigenvalue_spread",
    "perturbation_hessian",
)


# What the mean-bits question offers, found by name as plug-ins are.
def _row(bits: int) -> Format:
    return Format(f"int{bits}_row_asym", Int(bits), torch.float32, ROW, symmetric=False)


int2, int3, int4, int5, int6, int8 = map(_row, BITS)
FORMATS = {fmt.name: fmt for fmt in (int2, int3, int4, int5, int6, int8)}
WEIGHTS_ALONE = tuple(Choice(name, "float32") for name in FORMATS)
bits_only = replace(
    REFERENCE,
    name="bits_only",
    choices=dict.fromkeys(("linear", "conv", "embedding"), WEIGHTS_ALONE),
)


@dataclass(frozen=True)
class Cell:
    """What one search found under one budget, and what it had cost."""

    net: str
    budget: str  # "3 bits", "0.5x"
    seed: int
    search: str
    metric: str
    error: float | None  # None: no plan, or one above the budget
    score: float | None
    forward_passes: float
    seconds: float


class Observed(Exception):
    """Carries a Task out of a tune that need not go on."""

    def __init__(self, task: Task) -> None:
        self.task = task


def observed(task: Task) -> Table:
    raise Observed(task)


def task_of(net: Net, seed: int, target: str) -> Task:
    """What `tune` would measure with, after it has observed the calibration of a seed."""
    config = mpq_fx.Config(target=target, sensitivity="observed", tolerance=0.05)
    try:
        mpq_fx.tune(net.model, net.calibration(seed), config=config, progress=False)
    except Observed as found:
        return replace(found.task, deadline=float("inf"))
    raise AssertionError("tune measured nothing")


def registered() -> None:
    """The formats, the target and the metric above, where mpq-fx finds those of plug-ins."""
    for bits in BITS:
        add("formats", f"int{bits}_row_asym", f"{__name__}:int{bits}")
    add("targets", "bits_only", f"{__name__}:bits_only")
    add("metrics", "observed", f"{__name__}:observed")


def mean_bits(task: Task) -> dict[tuple[str, str], float]:
    """Bits of the codes of each choice, as a share of all codes; 32 in float."""
    sites = {site.name: site for site in task.replay.sites.values()}
    numel = {name: sites[name].weight_numel for name in task.options}
    whole = sum(numel.values())
    width = {c.name: FORMATS[c.weight].element.bits for c in WEIGHTS_ALONE}
    return {
        (name, choice.name): width.get(choice.name, 32) * numel[name] / whole
        for name, kept in task.options.items()
        for choice in kept
    }


def milliseconds(task: Task) -> dict[tuple[str, str], float]:
    """Measured latency of each site in each choice; conversions between sites are left out."""
    sites = trace(task.replay, task.records[0]).concrete(tuple(task.replay.sites.values()))
    return dict(latency(sites, task.options, target_named("cpu"), ties=task.ties).values)


Costs = Mapping[tuple[str, str], float]


def problem_of(task: Task, table: Table, costs: Costs, most: float) -> Problem:
    """The least error at a cost of at most `most`; a tie is one unit."""
    units = [unit for unit in task.units if len(task.options[unit[0]]) > 1]
    names = {unit[0]: tuple(c.name for c in task.options[unit[0]]) for unit in units}
    keys = [(unit, name) for unit in units for name in names[unit[0]]]
    fixed = sum(
        costs[site, task.options[site][0].name]
        for unit in task.units
        if unit not in units
        for site in unit
    )
    return Problem(
        options=names,
        error={(u[0], n): sum(table.values[s, n] for s in u) for u, n in keys},
        pairs=dict(table.pairs),
        objective=("error",),
        resources={"cost": {(u[0], n): sum(costs[s, n] for s in u) for u, n in keys}},
        budgets={"cost": max(most - fixed, 0.0)},
    )


def questions(task: Task, target: str) -> Iterator[tuple[str, Costs, float]]:
    """(budget, cost of each choice, its limit)"""
    if target == "bits_only":
        costs = mean_bits(task)
        yield from ((f"{bits:g} bits", costs, bits) for bits in MEAN_BITS)
    else:
        costs = milliseconds(task)
        floats = sum(costs[site, kept[0].name] for site, kept in task.options.items())
        yield from ((f"{share:g}x", costs, share * floats) for share in LATENCIES)


def power(task: Task, assignment: Mapping[str, str]) -> float:
    """Noise power of a whole plan on the calls that a search may see."""
    (error,) = measured(task, [plan_of(task, assignment)])
    return error**2


def plan_of(task: Task, assignment: Mapping[str, str]) -> dict[str, Choice]:
    return {
        site: choice
        for site, kept in task.options.items()
        for choice in kept
        if choice.name == assignment.get(task.unit_of[site][0], kept[0].name)
    }


@dataclass(frozen=True)
class Judged:
    """The batches that no search has seen, as the graph takes them."""

    net: Net
    task: Task
    records: tuple[Record, ...]
    reference: torch.Tensor

    def of(self, assignment: Mapping[str, str]) -> tuple[float, float]:
        """(relative RMS error of the outputs, the task's score)"""
        outputs = self._outputs(plan_of(self.task, assignment))
        error = (outputs - self.reference).norm() / self.reference.norm()
        return float(error), self.net.score(outputs, self.reference)

    def _outputs(self, plan: Mapping[str, Choice]) -> torch.Tensor:
        return torch.cat([self.task.replay.run(record, plan)[0] for record in self.records])


def judged(net: Net, task: Task, seed: int) -> Judged:
    """What to judge plans with."""
    records = records_of(net, task, seed, net.measured)
    reference = torch.cat([task.replay.run(record, {})[0] for record in records])
    return Judged(net, task, records, reference)


def with_all_calls(net: Net, task: Task, seed: int) -> Task:
    """With the calls that decide between plans where no error is a limit: all but the report's."""
    parts = split(net.calibration(seed))
    return replace(task, records=records_of(net, task, seed, (*parts.fit, *parts.choose)))


def records_of(
    net: Net, task: Task, seed: int, batches: Sequence[tuple[torch.Tensor, ...]]
) -> tuple[Record, ...]:
    """Batches put where the inputs of a recorded call stand."""
    template = task.records[0]
    nodes = placeholders(task.replay.gm)
    free = [k for k, node in enumerate(nodes) if node not in task.replay.constants]
    known = net.calibration(seed)
    order = next(o for batch in known if (o := _order(template, free, batch)) is not None)
    return tuple(
        tuple(batch[order[k]] if k in order else x for k, x in enumerate(template))
        for batch in batches
    )


def _order(
    template: Record, free: Sequence[int], batch: tuple[torch.Tensor, ...]
) -> dict[int, int] | None:
    """Place in the graph -> place in the batch, if this batch is the recorded call."""
    found = {
        k: at
        for k in free
        for at, x in enumerate(batch)
        if isinstance(template[k], torch.Tensor) and torch.equal(template[k], x)
    }
    return found if len(found) == len(batch) else None


def auto_in_time(task: Task) -> Table:
    """The table that `tune` would make within its default time budget."""
    return auto(replace(task, deadline=time.monotonic() + ERROR_TABLE * Config().time_budget))


def compare(net: Net, seed: int, metrics: Sequence[str], target: str) -> Iterator[Cell]:
    """All searches under all budgets of one target."""
    task = task_of(net, seed, target)
    look = judged(net, task, seed)
    searches = [*ours(metrics), *RIVALS]
    tables = {m: METRICS.named(m)(task) for m in {s.metric for s in searches} - {"auto"}}
    tables["auto"], asked = auto_in_time(task), with_all_calls(net, task, seed)
    known: dict[tuple[tuple[str, str], ...], tuple[float, float]] = {}
    for budget, costs, most in questions(task, target):
        others = [problem_of(task, other, costs, most) for other in tables["auto"].others]
        for search in (default(partial(power, asked), others), *searches):
            table, begin = tables[search.metric], time.perf_counter()
            problem = problem_of(task, table, costs, most)
            found = search.allocate(problem)
            seconds = time.perf_counter() - begin + table.provenance["seconds"]
            plans = (1 + len(others) + REFINE_ROUNDS) * (search.name == DEFAULT)
            passes = table.provenance["forward_passes"] + plans * len(asked.records)
            error = score = None
            if found is not None and is_feasible(problem, found):
                key = tuple(sorted(found.items()))
                error, score = known[key] = known.get(key) or look.of(found)
            yield Cell(
                net.name, budget, seed, search.name, search.metric, error, score, passes, seconds
            )


def save(name: str, cells: Sequence[Cell], net: Net, about: str) -> None:
    """Put the cells of a net in the place of its old ones."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    kept[name] = {
        "score": net.score_name,
        "examples": net.examples,
        "run": about,
        "columns": [each.name for each in fields(Cell)],
        "rows": [[_short(value) for value in astuple(cell)] for cell in cells],
    }
    FILE.write_text(json.dumps(kept, indent=None, separators=(",", ":"), sort_keys=True) + "\n")


def _short(value: Any) -> Any:
    """Five digits of a number: more would be noise in a file that is kept."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("net", choices=NETS)
    made.add_argument("--seeds", type=int, default=SEEDS)
    made.add_argument("--metrics", default="", help="all; of MiniLM those that do not take hours")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    registered()
    left_out = ("observed", *(LONG_ON_MINILM if options.net == "minilm" else ()))
    short = [m for m in without_loss() if m not in left_out]
    metrics = options.metrics.split(",") if options.metrics else short
    net, cells = NETS[options.net](), []
    with torch.no_grad():
        for seed in range(options.seeds):
            for target in ("bits_only", "cpu"):
                begin = time.perf_counter()
                cells += compare(net, seed, metrics, target)
                seconds = time.perf_counter() - begin
                print(f"{net.name} seed {seed} {target}: {seconds:.0f} s", flush=True)
    if options.save:
        save(net.name, cells, net, f"{options.seeds} seeds, {options.threads} threads")


if __name__ == "__main__":
    main()
