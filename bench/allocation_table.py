"""allocation.json -> docs/benchmarks/allocation.md: the default against every other search.

    python bench/allocation_table.py

Errors are compared within a seed.  A difference counts if the 95 % interval of the mean of
log(error / error) over the seeds, by a paired bootstrap, leaves out 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from allocation import FILE, Cell
from allocators import DEFAULT

RESAMPLES = 10_000
PAGE = FILE.with_suffix(".md")
UNIFORM = "uniform"
Key = tuple[str, str]  # search, metric

INTRODUCTION = """\
# Which search finds the better plan at equal budgets

Written by `python bench/allocation_table.py` from `allocation.json`; `python bench/allocation.py
NET --save` measures one net. Trained nets, budgets and seeds were fixed before the runs: {seeds}
draws of the calibration rows. Errors are relative RMS errors of the outputs on batches that no
search has seen. Bits are those of the codes, weights alone; latencies are sums of measured kernels
of the `cpu` target against the float ones, so that a share of 0.5 is one of the table and no
promise about the whole net.

Other tools' searches are written from their descriptions (bench/allocators.py), with the metric
nearest to theirs. All solve with the same limit of work. `mpq-fx` with a metric's name is that
table and the solver alone; the default makes several tables in the time that `tune` has for them by
default (`auto`), measures the best plan of each, then up to eight more with a table that they
correct.
"""


@dataclass(frozen=True)
class Compared:
    """log(error of the default / error of another search), over the seeds."""

    mean: float
    low: float
    high: float


def bootstrap(logs: Sequence[float]) -> Compared:
    """Mean and 95 % interval over resampled seeds."""
    values = np.asarray(logs)
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
    return Compared(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Question:
    """The cells of one net and budget, by search and seed."""

    net: str
    budget: str
    cells: Mapping[Key, tuple[Cell, ...]]

    def errors(self, key: Key) -> list[float] | None:
        """Of a search that kept to the budget with every seed."""
        found = [cell.error for cell in self.cells[key]]
        return None if None in found else [e for e in found if e is not None]

    def against(self, other: Key) -> Compared | None:
        """The default against another search; None where that has no plan with some seed."""
        mine, theirs = self.errors((DEFAULT, "auto")), self.errors(other)
        if mine is None or theirs is None:
            return None
        logs = [math.log(a / b) if a and b else 0.0 for a, b in zip(mine, theirs, strict=True)]
        return bootstrap(logs)

    @property
    def best(self) -> Key:
        """The search with the least mean error, the default among equals."""
        means = {k: mean(e) for k in self.cells if (e := self.errors(k)) is not None}
        return min(means, key=lambda k: (means[k], k[0] != DEFAULT))


def questions(results: Mapping[str, Any]) -> Iterator[Question]:
    for net, found in results.items():
        cells = [Cell(**dict(zip(found["columns"], row, strict=True))) for row in found["rows"]]
        for budget in dict.fromkeys(cell.budget for cell in cells):
            by: dict[Key, list[Cell]] = {}
            for cell in cells:
                if cell.budget == budget:
                    by.setdefault((cell.search, cell.metric), []).append(cell)
            kept = {key: tuple(seen) for key, seen in by.items()}
            asked = Question(net, budget, kept)
            if asked.errors((DEFAULT, "auto")) is not None:
                yield asked


def page(results: Mapping[str, Any]) -> str:
    asked = list(questions(results))
    seeds = max(len(next(iter(q.cells.values()))) for q in asked)
    runs = [
        f"- {net}: {of['score']} on {of['examples']}; {of['run']}" for net, of in results.items()
    ]
    parts = [INTRODUCTION.format(seeds=seeds), *runs, "", verdict(asked)]
    parts += [*by_search(asked), *by_cell(asked)]
    return "\n".join(parts) + "\n"


def verdict(asked: Sequence[Question]) -> str:
    """The bar: best or tied in 90 % of the cells, never worse than uniform."""
    beaten = [q for q in asked if _is_beaten(q, q.best)]
    worse = [q for q in asked if (UNIFORM, "measured") in q.cells and _is_beaten(q, UNIFORM_KEY)]
    share = 1 - len(beaten) / len(asked)
    where = "; ".join(f"{q.net} at {q.budget} ({name_of(q.best)}, {_ratio(q)})" for q in beaten)
    return (
        f"The default is best, or tied with the best, in {len(asked) - len(beaten)} of"
        f" {len(asked)} cells ({share:.0%}){'; not in ' + where if where else ''}. It is"
        f" significantly worse than a uniform plan in {len(worse)}.\n"
    )


UNIFORM_KEY: Key = (UNIFORM, "measured")


def _is_beaten(question: Question, other: Key) -> bool:
    found = question.against(other)
    return found is not None and found.low > 0


def _ratio(question: Question) -> str:
    found = question.against(question.best)
    assert found is not None
    return f"{math.exp(found.mean):.3f}"


def by_search(asked: Sequence[Question]) -> Iterator[str]:
    """One line per search: how the default compares with it, and what each costs."""
    yield "## Against each search\n"
    yield (
        "| search | metric | its error / the default's, geometric mean | default better | tied |"
        " worse | no plan | score − the default's | forward passes | seconds |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    keys = list(dict.fromkeys(key for q in asked for key in q.cells))
    for key in sorted(keys, key=lambda k: _geometric(asked, k)):
        yield _line(asked, key)


def _geometric(asked: Sequence[Question], key: Key) -> float:
    found = [c.mean for q in asked if key in q.cells and (c := q.against(key)) is not None]
    return math.exp(-mean(found)) if found else math.inf


def _line(asked: Sequence[Question], key: Key) -> str:
    mine = [q for q in asked if key in q.cells]
    found = [q.against(key) for q in mine]
    better = sum(c is not None and c.high < 0 for c in found)
    worse = sum(c is not None and c.low > 0 for c in found)
    none = sum(c is None for c in found)
    tied = len(found) - better - worse - none
    scores = [
        mean(a.score - b.score for a, b in zip(q.cells[key], q.cells[DEFAULT, "auto"], strict=True))
        for q, c in zip(mine, found, strict=True)
        if c is not None
    ]
    cells = [cell for q in mine for cell in q.cells[key]]
    score = f"{mean(scores):+.4f}" if scores else "–"
    ratio = _geometric(asked, key)
    return (
        f"| {key[0]} | {key[1]} | {ratio:.3f} | {better} | {tied} | {worse} | {none} | {score} |"
        f" {mean(c.forward_passes for c in cells):.0f} | {mean(c.seconds for c in cells):.1f} |"
    )


def by_cell(asked: Sequence[Question]) -> Iterator[str]:
    """One line per net and budget."""
    yield "\n## Each net and budget\n"
    yield "Error, and in brackets the task's score: means over the seeds.\n"
    yield "| net | budget | default | uniform | best of other tools | best of all |"
    yield "|---|---|---|---|---|---|"
    for q in asked:
        tools = [k for k in q.cells if not k[0].startswith("mpq-fx") and k != UNIFORM_KEY]
        errors = {k: mean(e) for k in tools if (e := q.errors(k)) is not None}
        tool = min(errors, key=lambda k: errors[k], default=None)
        shown = (
            _shown(q, (DEFAULT, "auto")),
            _shown(q, UNIFORM_KEY),
            f"{_shown(q, tool)} {name_of(tool)}" if tool else "–",
            f"{_shown(q, q.best)} {name_of(q.best)}",
        )
        yield f"| {q.net} | {q.budget} | " + " | ".join(shown) + " |"


def _shown(question: Question, key: Key) -> str:
    errors = question.errors(key)
    if errors is None:
        return "–"
    return f"{mean(errors):.4f} ({mean(c.score or 0.0 for c in question.cells[key]):.3f})"


def name_of(key: Key) -> str:
    return key[0] if key[0] != "mpq-fx" else key[1]


def main() -> None:
    PAGE.write_text(page(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
