"""Bisection on a synthetic error, and the race that decides what runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx import verify
from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate import Solution
from mpq_fx.verify import MARGIN, ROUNDS, Timing, bisect, pick, race, timing

STEPS = 200


def solved(level: int) -> Solution:
    values = {"latency": float(STEPS - level), "error": float(level)}
    objective = ("latency", "error")
    return Solution({"a": str(level)}, values, "OPTIMAL", objective, dict(values), 0.0)


class World:
    """Level k costs STEPS - k ms and (k / STEPS)² of predicted noise; `true` is its real error."""

    def __init__(self, true, least: int = 0) -> None:
        self.true, self.least, self.asked = true, least, []

    def solve(self, budget: float) -> Solution:
        level = int(min(STEPS, budget**0.5 * STEPS + 1e-9))
        if level < self.least:
            raise InfeasibleError("budgets forbid it")
        return solved(level)

    def measure(self, solution: Solution) -> float:
        self.asked.append(int(solution.assignment["a"]))
        return self.true(self.asked[-1] / STEPS)

    def bisect(self, tolerance: float, **options):
        return bisect(self.solve, self.measure, tolerance, start=tolerance, **options)


@given(st.floats(0.2, 5.0), st.floats(0.02, 0.5))
def test_the_plan_meets_the_tolerance_and_nearly_uses_it(factor, tolerance):
    """Whatever constant factor the prediction is wrong by."""
    world = World(lambda error: factor * error)
    found = world.bisect(tolerance)
    assert found.error <= tolerance
    ideal = min(tolerance / factor, 1.0)
    assert int(found.solution.assignment["a"]) / STEPS >= 0.75 * ideal - 2 / STEPS
    assert len(world.asked) <= ROUNDS


def test_no_assignment_is_measured_twice():
    world = World(lambda error: 3 * error)
    world.bisect(0.1)
    assert len(world.asked) == len(set(world.asked))


def test_among_those_that_fit_the_best_objective_wins_not_the_last():
    found = World(lambda error: 0.0 if error < 0.3 else 1.0).bisect(0.1)
    assert found.error == 0.0
    assert found.solution.assignment["a"] in {str(k) for k in range(30, 60)}


def test_when_only_float_is_exact_enough_float_is_the_plan():
    found = World(lambda error: 0.0 if error == 0 else 9.0).bisect(0.1)
    assert found.solution.assignment == {"a": "0"}


def test_nothing_is_found_when_even_the_exact_plan_misses():
    assert World(lambda error: 9.0).bisect(0.1) is None


def test_budgets_that_forbid_a_smaller_error_end_in_their_own_words():
    with pytest.raises(InfeasibleError, match="budgets forbid it"):
        World(lambda error: 9.0, least=20).bisect(0.1)


def test_out_of_time_the_first_round_counts():
    world = World(lambda error: 0.5 * error)
    found = world.bisect(0.1, is_past=lambda: True)
    assert len(world.asked) == 1
    assert found.scale == 1.0


def test_out_of_time_without_a_plan_that_fits_it_looks_on():
    """A retry with a tighter tolerance used to end in float, however near a plan was."""
    world = World(lambda error: 3 * error)
    found = world.bisect(0.1, is_past=lambda: True)
    assert found.scale > 0
    assert 0 < found.error <= 0.1


def steady(ms: float) -> Timing:
    return timing([ms] * 3)


def test_the_earlier_variant_wins_unless_a_later_one_is_faster_by_the_margin():
    order = ["plan", "b", "c"]
    assert pick({"plan": steady(10), "b": steady(10), "c": steady(9.9)}, order) == "plan"
    assert pick({"plan": steady(10), "b": steady(9), "c": steady(8.95)}, order) == "b"
    assert pick({"plan": steady(10), "b": steady(9), "c": steady(8)}, order) == "c"
    assert pick({"plan": steady(10), "b": steady(10 * (1 - MARGIN))}, order[:2]) == "plan"


@given(
    slow=st.lists(st.floats(0.5, 50.0), min_size=3, max_size=9),
    share=st.floats(0.5, 1.5).filter(lambda share: abs(share - 1 + MARGIN) > 1e-6),
)
def test_what_slows_a_whole_round_down_changes_nothing(slow, share):
    """Medians of each alone would compare a slow round of one with a fast one of another."""
    times = {"a": timing(slow), "b": timing([share * ms for ms in slow])}
    assert pick(times, ["a", "b"]) == ("b" if share < 1 - MARGIN else "a")


def test_a_gain_within_the_spread_of_rounds_is_none():
    times = {"a": timing([10.0] * 8), "b": timing([9, 9, 9, 9, 9, 11, 11, 11])}
    assert pick(times, ["a", "b"]) == "a"
    times["b"] = timing([9, 9, 9, 9, 9, 9, 9, 11])
    assert pick(times, ["a", "b"]) == "b"


def test_of_many_rounds_fewer_have_to_agree():
    times = {"a": timing([10.0] * 60), "b": timing([9.0] * 40 + [11.0] * 20)}
    assert pick(times, ["a", "b"]) == "b"
    times["b"] = timing([9.0] * 35 + [11.0] * 25)
    assert pick(times, ["a", "b"]) == "a"


def test_one_slow_call_decides_nothing():
    times = {"a": timing([10, 10, 10, 10, 10]), "b": timing([9, 9, 90, 9, 9])}
    assert pick(times, ["a", "b"]) == "b"


@pytest.mark.parametrize("is_long", [False, True])
def test_a_race_warms_up_and_takes_turns(monkeypatch, is_long):
    """A call so long that it finds nothing in the caches is not made twice."""
    monkeypatch.setattr(verify, "LONG", 0.0 if is_long else 1e9)
    log = []
    found = race({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, rounds=4)
    assert log == [*"abab", *("ab" if is_long else "aabb") * 4]
    assert all(t.low <= t.median <= t.high for t in found.values())
    assert all(len(t.each) == 4 for t in found.values())


def test_a_race_that_runs_out_of_time_still_has_three_rounds():
    log = []
    race({"a": lambda: log.append("a")}, rounds=50, seconds=-1.0)
    assert len(log) == 2 + 2 * 3
