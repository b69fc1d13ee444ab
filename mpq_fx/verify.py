"""Bisection on the measured error, and the comparison that makes a plan never worse than simpler
ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate import Solution

ROUNDS = 10  # solve-and-measure rounds of a bisection
MARGIN = 0.02  # a simpler plan has to be faster by this share to win
LEAST_ROUNDS = 3  # of a race, however long they take
LONG = 20.0  # ms of a call that finds little in the caches anyway


@dataclass(frozen=True)
class Candidate:
    """A solved assignment with its error measured on the choose part."""

    solution: Solution
    error: float
    scale: float  # of the error budget that the solver was given


def bisect(
    solve: Callable[[float], Solution],
    measure: Callable[[Solution], float],
    tolerance: float,
    *,
    start: float,
    is_past: Callable[[], bool] = lambda: False,
) -> Candidate | None:
    """argmin objective s.t. *measured* error ≤ tolerance: rescale the predicted budget until it
    fits.

    The predicted noise power may be start² · scale.  Starts at scale 1, widens while the measured
    error allows, then halves the bracket geometrically; `is_past` ends that once some plan fits.
    None if no plan that was tried meets the tolerance.
    """
    best: Candidate | None = None
    good, bad, scale = 0.0, float("inf"), 1.0
    measured: dict[tuple[tuple[str, str], ...], float] = {}
    for _ in range(ROUNDS):
        solution = solve(start**2 * scale)
        key = tuple(sorted(solution.assignment.items()))
        if key not in measured:
            measured[key] = measure(solution)
        error = measured[key]
        if error <= tolerance:
            good = max(good, scale)
            best = _better(best, Candidate(solution, error, scale))
        else:
            bad = min(bad, scale)
        scale = _next_scale(good, bad, error, tolerance)
        if scale is None or (best is not None and is_past()):
            break  # without any plan that fits, looking on is cheaper than running in float
    return best or _exact(solve, measure, tolerance)


def _exact(
    solve: Callable[[float], Solution],
    measure: Callable[[Solution], float],
    tolerance: float,
) -> Candidate | None:
    """The last resort: a plan without any predicted error, which is float unless budgets forbid
    it.
    """
    try:
        solution = solve(0.0)
    except InfeasibleError:  # budgets forbid float
        return None
    error = measure(solution)
    return Candidate(solution, error, 0.0) if error <= tolerance else None


def _next_scale(good: float, bad: float, error: float, tolerance: float) -> Any:
    """The next budget: outwards until both ends are known, then the geometric middle."""
    if good == 0.0:
        return bad / max(2.0, min(64.0, (error / tolerance) ** 2 * 1.1)) if bad > 1e-6 else None
    if bad == float("inf"):
        return good * 2 if good < 64 else None
    return (good * bad) ** 0.5 if bad / good > 1.1 else None


def _better(old: Candidate | None, new: Candidate) -> Candidate:
    if old is None:
        return new
    values = [tuple(c.solution.values[name] for name in c.solution.objective) for c in (old, new)]
    return new if values[1] < values[0] else old


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one variant: median, 10th and 90th percentile, and each call in turn."""

    median: float
    low: float
    high: float
    each: tuple[float, ...]


def race(
    variants: Mapping[str, Callable[[], Any]], *, rounds: int = 60, seconds: float = 10.0
) -> dict[str, Timing]:
    """Time variants in turn, so that drift of the machine hits all alike.

    Before a call is timed it is made once for nothing: the caches hold the other variants' data.  A
    call that reads more than caches hold, which takes long, is as slow the second time.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    last = {name: _milliseconds(call) for name, call in variants.items()}
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for name, call in variants.items():
            if last[name] < LONG:
                call()
            last[name] = _milliseconds(call)
            times[name].append(last[name])
    return {name: timing(seen) for name, seen in times.items()}


def pick(timings: Mapping[str, Timing], order: Sequence[str]) -> str:
    """The fastest variant; an earlier one of `order` wins unless a later is faster by MARGIN.

    And in more rounds at all than a coin would give: half of them and two standard deviations, of
    few rounds three quarters.
    """
    winner = order[0]
    for name in order[1:]:
        ratios = ratios_of(timings[name], timings[winner])
        count, faster = len(ratios), sum(ratio < 1 for ratio in ratios)
        is_sure = faster >= min(count / 2 + count**0.5, count * 3 // 4 + 1)
        if statistics.median(ratios) < 1 - MARGIN and is_sure:
            winner = name
    return winner


def ratios_of(one: Timing, other: Timing) -> list[float]:
    """ms(one) / ms(other) of each round, sorted: what slows a whole round down cancels."""
    return sorted(a / b for a, b in zip(one.each, other.each, strict=True))


def timing(each: Sequence[float]) -> Timing:
    """Calls in the order of their rounds -> Timing."""
    ordered = sorted(each)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], tuple(each))


def _milliseconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
