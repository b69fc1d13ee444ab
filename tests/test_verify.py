"""The race that decides what runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx import verify
from mpq_fx.verify import MARGIN, Timing, pick, race, timing


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
