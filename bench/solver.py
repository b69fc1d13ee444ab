"""Allocation problems from a fixed generator -> value, proved gap and time of the solvers.

    python bench/solver.py [--seconds 30] [--seeds 3]

Least error under a budget of bytes.  Errors fall by about 4 and bytes grow with each option, at
rates that differ between units over three decades.  Pairs join the errors of two units, each as a
share of √(error · error):

singles    10,000 units of 8 options, no pairs
penalties  500 units of 8 options, 5,000 pair terms >= 0, each of a random choice of two units
gram       500 units of 8 options; 26 blocks of 3 are Gram matrices: 4,992 terms of either sign
signed     500 units of 8 options, 5,000 pair terms of either sign

and, far denser than tables of nets are (a pair of options of every two units that are joined):

dense penalties  5,000 pairs of units, 320,000 terms >= 0
dense signed     5,000 pairs of units, 320,000 terms of either sign
dense gram       25 blocks of 20, Gram matrices of 16-dimensional vectors: 304,000 terms
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from results import parser

from mpq_fx.passes.allocate import Problem, cp_sat

OPTIONS = 8
UNITS, TERMS = 500, 5000
BUDGET = 0.45  # of the bytes of the dearest plan
STRONGEST = 0.3  # correlation of two errors at most
DIMENSIONS = 16  # of the vectors whose Gram matrix a block is


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


def coupled(draw: random.Random, least: float) -> Problem:
    """Terms of random choices, correlations from `least` to the strongest."""
    problem = singles(draw, UNITS)
    error, units = problem.error, list(problem.options)
    pairs = dict[tuple[str, str, str, str], float]()
    while len(pairs) < TERMS:
        u, v = draw.sample(units, 2)
        o, p = draw.choice(problem.options[u]), draw.choice(problem.options[v])
        correlation = draw.uniform(least, STRONGEST)
        pairs[u, o, v, p] = 2 * correlation * (error[u, o] * error[v, p]) ** 0.5
    return replace(problem, pairs=pairs)


def densely_coupled(draw: random.Random, least: float) -> Problem:
    """Random pairs of units; every pair of options has its own correlation."""
    problem = singles(draw, UNITS)
    units = list(problem.options)
    joined = set[tuple[str, str]]()
    while len(joined) < TERMS:
        u, v = draw.sample(units, 2)
        joined.add((min(u, v), max(u, v)))
    return with_pairs(problem, sorted(joined), lambda *key: draw.uniform(least, STRONGEST))


def gram(draw: random.Random, blocks: int, size: int) -> Problem:
    """error of a block = |Σ_u e(u, option)|², e along a direction of the unit and its own."""
    problem = singles(draw, UNITS)
    units = list(problem.options)
    vectors = {}
    for unit in units:
        common = unit_vector(draw)
        for option in problem.options[unit]:
            mixed = [a + b for a, b in zip(common, unit_vector(draw), strict=True)]
            vectors[unit, option] = [x / math.hypot(*mixed) for x in mixed]
    found = [units[k * size : (k + 1) * size] for k in range(blocks)]
    joined = [pair for block in found for pair in itertools.combinations(block, 2)]

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


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "singles": singles,
    "penalties": partial(coupled, least=0.0),
    "gram": partial(gram, blocks=26, size=3),
    "signed": partial(coupled, least=-STRONGEST),
    "dense penalties": partial(densely_coupled, least=0.0),
    "dense signed": partial(densely_coupled, least=-STRONGEST),
    "dense gram": partial(gram, blocks=25, size=20),
}


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
            f"{kind:16} proved gap {statistics.median(gaps):8.3%} median {max(gaps):8.3%} worst  "
            f"{statistics.median(solution.seconds for solution in found):5.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
