"""The comparison that makes a plan never worse than simpler ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpq_fx.passes.lower.microbenchmark import finish

MARGIN = 0.02  # a simpler plan has to be faster by this share to win
LEAST_ROUNDS = 3  # of a race, however long they take
LONG = 20.0  # ms of a call that finds little in the caches anyway


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
    finish()
    begin = time.perf_counter()
    call()
    finish()
    return (time.perf_counter() - begin) * 1e3
