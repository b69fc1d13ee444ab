"""Allocation problems from a fixed generator -> value, proved gap and time of the solvers.

    python bench/solver.py [--seconds 30] [--seeds 3]

Least error under a budget of bytes.  Errors fall by about 4 and bytes grow with each option, at
rates that differ between units over three decades.  Pairs join the errors of two units, each as a
share of √(error · error):

singles    10,000 units of 8 options, no pairs
penalties  500 units of 8 options, 5,000 pairs of units, all terms >= 0
gram       500 units of 8 options in 25 blocks: all singles and pairs are a Gram matrix per block
signed     500 units of 8 options, 5,000 pairs of units, terms of either sign
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from results import parser

from mpq_fx.passes.allocate import Problem, cp_sat

OPTIONS = 8
BUDGET = 0.45  # of the bytes of the dearest plan
STRONGEST = 0.3  # correlation of two errors at most
DIMENSIONS = 16  # of the vectors whose Gram matrix a block is
BLOCK = 20  # units in one


def singles(draw: random.Random, units: int = 10_000) -> Problem:
    offers = {f"u{k}": tuple(f"o{j}" for j in range(OPTIONS)) for k in range(units)}
    error, size = {}, {}
    for unit, names in offers.items():
        weights, noise = 10 ** draw.uniform(4, 7), 10 ** draw.uniform(-8, -5)
        for j, name in enumerate(names):
            error[unit, name] = noise * 4.0**-j * draw.uniform(0.5, 1.5)
            size[unit, name] = float(round(weights * (j + 1)))
    dearest = sum(size[unit, names[-1]] for unit, names in offers.items())
    return Problem(
        options=offers,
        error=error,
        objective=("error",),
        resources={"size": size},
        budgets={"size": BUDGET * dearest},
    )


def penalties(draw: random.Random) -> Problem:
    return coupled(draw, lambda: draw.uniform(0.0, STRONGEST))


def signed(draw: random.Random) -> Problem:
    return coupled(draw, lambda: draw.uniform(-STRONGEST, STRONGEST))


def coupled(draw: random.Random, correlation: Callable[[], float]) -> Problem:
    """Random pairs of units; every pair of options has its own correlation."""
    problem = singles(draw, 500)
    units = list(problem.options)
    joined = set[tuple[str, str]]()
    while len(joined) < 5000:
        u, v = draw.sample(units, 2)
        joined.add((min(u, v), max(u, v)))
    return with_pairs(problem, sorted(joined), lambda *key: correlation())


def gram(draw: random.Random) -> Problem:
    """error of a block = |Σ_u e(u, option)|², e along a direction of the unit and its own."""
    problem = singles(draw, 500)
    units = list(problem.options)
    vectors = {}
    for unit in units:
        common = unit_vector(draw)
        for option in problem.options[unit]:
            mixed = [a + b for a, b in zip(common, unit_vector(draw), strict=True)]
            vectors[unit, option] = [x / math.hypot(*mixed) for x in mixed]
    blocks = [units[k : k + BLOCK] for k in range(0, len(units), BLOCK)]
    joined = [(u, v) for block in blocks for k, u in enumerate(block) for v in block[k + 1 :]]

    def correlation(u: str, o: str, v: str, p: str) -> float:
        return sum(a * b for a, b in zip(vectors[u, o], vectors[v, p], strict=True))

    return with_pairs(problem, joined, correlation)


def unit_vector(draw: random.Random) -> list[float]:
    made = [draw.gauss(0.0, 1.0) for _ in range(DIMENSIONS)]
    return [x / math.hypot(*made) for x in made]


def with_pairs(
    problem: Problem,
    joined: Iterable[tuple[str, str]],
    correlation: Callable[[str, str, str, str], float],
) -> Problem:
    """pairs[u, o, v, p] = 2 · correlation · √(error[u, o] · error[v, p])"""
    error, options = problem.error, problem.options
    pairs = {
        (u, o, v, p): 2 * correlation(u, o, v, p) * (error[u, o] * error[v, p]) ** 0.5
        for u, v in joined
        for o in options[u]
        for p in options[v]
    }
    return replace(problem, pairs=pairs)


KINDS = {"singles": singles, "penalties": penalties, "gram": gram, "signed": signed}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, default=30.0)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--kinds", default=",".join(KINDS))
    options = made.parse_args(arguments)
    for kind in options.kinds.split(","):
        found = []
        for seed in range(options.seeds):
            problem = KINDS[kind](random.Random(seed))
            found.append(cp_sat.solve(problem, time_limit=options.seconds))
        gaps = [solution.gap for solution in found]
        print(
            f"{kind:10} proved gap {statistics.median(gaps):8.3%} median {max(gaps):8.3%} worst  "
            f"{statistics.median(solution.seconds for solution in found):5.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
