"""min measured noise s.t. one budget, by gradients of option logits (RCO, arXiv 2605.00649)

The logits move on the manifold of plans whose expected cost is the budget:

    α <- −ln noise of the table, retracted;   then, with a falling temperature τ,
    g ~ Gumbel,  a = (α + g) / τ,  soft = softmax(a),  hard = the plan of largest Σ a in the budget
    G = soft ∘ (∂noise/∂share at hard) / τ, projected on the tangent plane;  Adam;  retract;
    Adam's first moment is projected on the plane of the new point.
    At last the plan of largest Σ ln softmax(α) within the budget.

The derivative at a plan knows the error of an option only along with the errors that the plan has:
that of an option by itself is seen when the option is drawn.

Where paper and published code differ, the anneal is the code's, which is exponential.  A plan may
cost less than the budget.  The float option, whose noise is 0, begins with a share of the largest
noise of its row, lest it has all of the probability.  One draw for each step, seeded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mpq_fx.passes.allocate.groups import Group, groups_of
from mpq_fx.passes.allocate.knapsack import cells_of, knapsack
from mpq_fx.passes.allocate.manifold import (
    Costs,
    normal,
    retract,
    softmax,
    tangent,
    through_softmax,
)
from mpq_fx.passes.allocate.problem import (
    ERROR,
    Problem,
    coupling_of,
    table_of,
)
from mpq_fx.passes.allocate.search import (
    Candidate,
    Evaluator,
    Plan,
    Search,
    Shares,
    candidate_of,
    check_budgets_alone,
    unmeant,
)

if TYPE_CHECKING:
    from mpq_fx.config import Config

STEPS = 200
RATE = 0.1  # of Adam
MOMENTS = (0.9, 0.999)
HOT, COLD = 1.0, 0.01  # temperatures at the first step and at the last
FLOOR = 1e-3  # of the largest noise of a row: the least that an option begins with
CELLS = 500  # of the budget, for the plans on the way
SURE = 1e-12  # the least probability of an option of the last plan
LEAST = 1e-3  # probability of an option whose derivative is asked for


@dataclass(frozen=True)
class Rows:
    """The groups of a problem as rows of arrays; `offered` is false where a row has ended."""

    groups: tuple[Group, ...]
    offered: np.ndarray
    noise: np.ndarray
    costs: Costs

    def plan(self, picks: np.ndarray) -> dict[str, str]:
        return {
            unit: group.options[pick]
            for group, pick in zip(self.groups, picks, strict=True)
            for unit in group.members
        }

    def shares(self, hard: np.ndarray, asked: np.ndarray) -> Shares:
        """1 for the option that a unit has in a plan, 0 for all others that are asked about."""
        return {
            (unit, option): float(k == pick)
            for g, (group, pick) in enumerate(zip(self.groups, hard, strict=True))
            for unit in group.members
            for k, option in enumerate(group.options)
            if k == pick or asked[g, k]
        }

    def gathered(self, values: Shares) -> np.ndarray:
        """Σ over the units of a group, by row and option; 0 where there is no value."""
        return gathered(self.groups, values)


def gathered(groups: Sequence[Group], values: Shares) -> np.ndarray:
    found = np.zeros((len(groups), max(len(group.options) for group in groups)))
    for g, group in enumerate(groups):
        for k, option in enumerate(group.options):
            found[g, k] = math.fsum(values.get((unit, option), 0.0) for unit in group.members)
    return found


def rco(problem: Problem, evaluator: Evaluator) -> Candidate | None:
    """The better, as measured, of the descent's last plan and of the solver's own."""
    check_budgets_alone(problem)
    begin = time.perf_counter()
    (name,) = problem.budgets
    plans = [evaluator.solve(problem).assignment]
    if evaluator.error(plans[0]) > 0.0:
        rows = rows_of(problem, name)
        logits = descended(rows, problem.budgets[name], evaluator)
        plans.append(likeliest(problem, rows, logits, evaluator))
    best = min(plans, key=evaluator.error)
    return candidate_of(problem, evaluator, best, time.perf_counter() - begin)


def rows_of(problem: Problem, name: str) -> Rows:
    """Noise and costs of every option, and what pairs of neighbors cost together."""
    groups = groups_of(problem)
    noise, single = gathered(groups, problem.error), gathered(groups, table_of(problem, name))
    offered = np.array([[k < len(g.options) for k in range(noise.shape[1])] for g in groups])
    at = {
        (unit, option): (g, k)
        for g, group in enumerate(groups)
        for k, option in enumerate(group.options)
        for unit in group.members
    }
    pairs: dict[tuple[int, int], np.ndarray] = {}
    for (u, o, v, p), term in coupling_of(problem, name).items():
        if (u, o) not in at or (v, p) not in at:
            continue  # a tie leaves this option to neither
        (i, k), (j, m) = at[u, o], at[v, p]
        if i != j:
            pairs.setdefault((i, j), np.zeros((single.shape[1],) * 2))[k, m] += term
        elif k == m:
            single[i, k] += term
    together = tuple((i, j, both) for (i, j), both in pairs.items())
    return Rows(groups, offered, noise, Costs(single, together))


def begun(rows: Rows) -> np.ndarray:
    """α = −ln noise, floored, with rows of mean 0; −inf where a row has ended."""
    largest = np.where(rows.offered, rows.noise, -np.inf).max(axis=1, keepdims=True, initial=0.0)
    floor = np.where(largest > 0.0, FLOOR * largest, 1.0)
    logits = -np.log(np.maximum(rows.noise, floor))
    mean = np.where(rows.offered, logits, 0.0).sum(axis=1, keepdims=True)
    mean /= rows.offered.sum(axis=1, keepdims=True)
    return np.where(rows.offered, logits - mean, -np.inf)


def descended(rows: Rows, budget: float, evaluator: Evaluator) -> np.ndarray:
    """α after STEPS steps, or as many as there is time for; one that is not finite is none."""
    source = np.random.default_rng(0)
    logits = retract(begun(rows), rows.costs, budget)
    first, second = np.zeros(logits.shape), np.zeros(logits.shape)
    for step in range(STEPS):
        if evaluator.is_past():
            break
        heat = HOT * (COLD / HOT) ** (step / (STEPS - 1))
        drawn = (logits + source.gumbel(size=logits.shape)) / heat
        soft, hard = likely(softmax(drawn)), sampled(rows, drawn, budget)
        noise, given = evaluator.gradient(rows.shares(hard, soft > 0.0), step)
        if not math.isfinite(noise):
            continue
        gradient = through_softmax(soft, gathered(rows.groups, given)) / heat
        gradient = tangent(gradient, normal(softmax(logits), rows.costs))
        first = MOMENTS[0] * first + (1 - MOMENTS[0]) * gradient
        second = MOMENTS[1] * second + (1 - MOMENTS[1]) * gradient**2
        logits = retract(logits - _adam(first, second, step + 1), rows.costs, budget)
        first = tangent(first, normal(softmax(logits), rows.costs))
    return logits


def likely(shares: np.ndarray) -> np.ndarray:
    """Rows without the options of least probability, of sum 1 again: what the derivatives of a row
    have in common must go on to cancel.
    """
    kept = np.where(shares > LEAST, shares, 0.0)
    return kept / kept.sum(axis=1, keepdims=True)


def _adam(first: np.ndarray, second: np.ndarray, steps: int) -> np.ndarray:
    """RATE · m̂ / √v̂, with both moments freed of their start at 0."""
    mean = first / (1 - MOMENTS[0] ** steps)
    spread = np.sqrt(second / (1 - MOMENTS[1] ** steps))
    return RATE * np.divide(mean, spread, out=np.zeros_like(mean), where=spread > 0)


def sampled(rows: Rows, drawn: np.ndarray, budget: float) -> np.ndarray:
    """The plan of largest Σ drawn within the budget, pairs priced at the present shares."""
    shares = softmax(drawn)
    costs = rows.costs.marginal(shares)
    rest = rows.costs.total(shares) - float((costs * shares).sum())  # pairs are in both marginals
    costs = np.where(rows.offered, costs, np.inf)
    return knapsack(drawn, cells_of(costs, budget - rest, CELLS), CELLS)


def likeliest(problem: Problem, rows: Rows, logits: np.ndarray, evaluator: Evaluator) -> Plan:
    """The plan of largest Σ ln p within the budget, by the user's solver."""
    price = -np.log(np.maximum(softmax(logits), SURE))
    singles = dict.fromkeys(problem.error, 0.0)  # of options that a tie leaves to nobody, too
    for g, group in enumerate(rows.groups):
        for k, option in enumerate(group.options):
            share = float(price[g, k]) / len(group.members)
            singles |= {(unit, option): share for unit in group.members}
    asked = replace(problem, error=singles, pairs={}, objective=(ERROR,))
    return evaluator.solve(asked).assignment


def refuse(config: Config) -> Iterator[str]:
    """One budget that is met exactly, and the error to be least."""
    if config.objective != "error":
        yield f"minimizes the error, and there is objective={config.objective!r}"
    if len(config.budgets) > 1:
        yield f"keeps to one budget, and there are {', '.join(config.budgets)}"
    yield from unmeant(config, ("min_bits", "max_activation_memory"))


RCO = Search(rco, refuse)
