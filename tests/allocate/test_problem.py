"""What a Problem refuses, and how it reads ties and forced choices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate import Problem, cp_sat, is_feasible, values_of
from mpq_fx.passes.allocate.groups import groups_of
from mpq_fx.passes.allocate.problem import Condition, Term
from mpq_fx.passes.allocate.quantity import Quantity
from mpq_fx.passes.allocate.rows import row_of

OFFERS = {"a": ("w8", "w4"), "b": ("w8", "w4"), "c": ("w4", "w2")}
KEYS = [(u, o) for u, offers in OFFERS.items() for o in offers]
ERROR = {("a", "w8"): 1.0, ("a", "w4"): 2.0, ("b", "w8"): 1.0, ("b", "w4"): 3.0}
PROBLEM = Problem(
    options=OFFERS,
    error={**ERROR, ("c", "w4"): 1.0, ("c", "w2"): 5.0},
    objective=("error",),
    resources={"size": {key: float(key[1][1:]) for key in KEYS}},
)

REFUSED = {
    "unknown objective": ({"objective": ("speed",)}, "objective names 'speed'"),
    "no objective": ({"objective": ()}, "is empty"),
    "objective twice": ({"objective": ("error", "error")}, "twice"),
    "unknown budget": ({"budgets": {"latency": 1.0}}, "budgets names 'latency'"),
    "negative budget": ({"budgets": {"size": -1.0}}, "budget of 'size' is -1.0"),
    "infinite budget": ({"budgets": {"size": float("inf")}}, "is inf"),
    "budget that is no number": ({"budgets": {"size": float("nan")}}, "is nan"),
    "no option": ({"options": {**OFFERS, "a": ()}}, "'a' has no option"),
    "option twice": ({"options": {**OFFERS, "a": ("w8", "w8")}}, "twice"),
    "unmeasured unit": ({"options": {**OFFERS, "d": ("w8",)}}, "missing"),
    "unknown unit": ({"error": {**PROBLEM.error, ("d", "w8"): 1.0}}, "unknown"),
    "nan": ({"error": {**PROBLEM.error, ("a", "w8"): float("nan")}}, "value nan"),
    "infinity": ({"resources": {"size": dict.fromkeys(KEYS, float("inf"))}}, "value inf"),
    "error as resource": ({"resources": {"error": dict.fromkeys(KEYS, 1.0)}}, "not a resource"),
    "edges of nothing": ({"edges": {"latency": {}}}, "edges names 'latency'"),
    "pair with itself": ({"pairs": {("a", "w8", "a", "w4"): 1.0}}, "joins 'a'"),
    "pair of unknown option": ({"pairs": {("a", "w3", "b", "w4"): 1.0}}, "joins 'a'='w3'"),
    "infinite pair": ({"pairs": {("a", "w8", "b", "w4"): float("inf")}}, "value inf"),
    "tie of unknown unit": ({"ties": (("a", "z"),)}, "ties names 'z'"),
    "forced unknown unit": ({"forced": {"z": "w8"}}, "forced names 'z'"),
    "forced unknown option": ({"forced": {"a": "w2"}}, "forced but not offered"),
    "forced apart": ({"ties": (("a", "b"),), "forced": {"a": "w8", "b": "w4"}}, "in common"),
    "floor of nothing": ({"floors": {"latency": 1.0}}, "floors names 'latency'"),
    "floor of a peak": ({"peaks": {"memory": ()}, "floors": {"memory": 1.0}}, "names 'memory'"),
    "floor that is no number": ({"floors": {"size": float("nan")}}, "floor of 'size' is nan"),
    "peak twice": ({"peaks": {"size": ()}}, "is that of two"),
    "a minus": ({"peaks": {"-size": ()}}, "cannot be the name"),
    "error as peak": ({"peaks": {"error": ()}}, "not a resource"),
    "peak of unknown unit": (
        {"peaks": {"m": ((Term(1.0, (Condition("z", ("w8",)),)),),)}},
        "asks for 'z'",
    ),
    "peak of unknown option": (
        {"peaks": {"m": ((Term(1.0, (Condition("a", ("w2",)),)),),)}},
        "asks for 'a' in",
    ),
    "infinite peak": ({"peaks": {"m": ((Term(float("inf")),),)}}, "value inf"),
    "link of unknown unit": ({"links": (("a", "z"),)}, "links names 'z'"),
    "class of unknown option": ({"classes": {("a", "w2"): "x"}}, "classes names"),
    "link without common class": ({"links": (("a", "c"),), "forced": {"a": "w8"}}, "no class"),
    "tie without common option": ({"ties": (("a", "c"),), "forced": {"a": "w8"}}, "in common"),
}


@pytest.mark.parametrize(("change", "text"), REFUSED.values(), ids=REFUSED)
def test_refuses(change, text):
    with pytest.raises(ConfigError, match=text) as caught:
        replace(PROBLEM, **change)
    assert caught.value.fix


def test_ties_that_share_a_unit_are_one_and_keep_the_common_options():
    (group,) = groups_of(replace(PROBLEM, ties=(("c", "b"), ("a", "b"))))
    assert group.members == ("a", "b", "c")
    assert group.options == ("w4",)


def test_pairs_inside_a_tie_count_once_both_take_the_option():
    pairs = {("a", "w4", "b", "w4"): -9.0, ("a", "w8", "b", "w4"): -99.0}
    found = cp_sat.solve(replace(PROBLEM, ties=(("a", "b"),), pairs=pairs))
    assert found.assignment == {"a": "w4", "b": "w4", "c": "w4"}
    assert found.values["error"] == 2.0 + 3.0 + 1.0 - 9.0


def test_values_and_feasibility_of_an_assignment():
    problem = replace(PROBLEM, budgets={"size": 16.0}, ties=(("a", "b"),), forced={"c": "w2"})
    good = {"a": "w4", "b": "w4", "c": "w2"}
    assert values_of(problem, good) == {"error": 10.0, "size": 10.0}
    assert is_feasible(problem, good)
    assert not is_feasible(problem, {**good, "a": "w8"}), "a tie is broken"
    assert not is_feasible(problem, {**good, "c": "w4"}), "a forced choice is ignored"
    assert not is_feasible(problem, {**good, "a": "w8", "b": "w8"}), "18 bytes"
    assert not is_feasible(problem, {"a": "w4", "b": "w4"}), "a unit is missing"


def test_a_budget_is_met_whatever_the_order_of_its_sum():
    tenths = dict.fromkeys(KEYS, 0.1)
    problem = replace(PROBLEM, resources={"size": tenths}, budgets={"size": 0.1 + 0.1 + 0.1})
    assert cp_sat.solve(problem).status == "OPTIMAL"
    problem = replace(problem, budgets={"size": 0.3})
    assert cp_sat.solve(problem).status == "OPTIMAL"


def test_a_problem_without_units_has_the_empty_plan():
    found = cp_sat.solve(Problem({}, {}, ("error",), budgets={"error": 0.0}))
    assert found.assignment == {}
    assert found.values == {"error": 0.0}


def test_a_term_beyond_the_limit_never_fits_the_row():
    quantity = Quantity(((0, 5, 10**30), (0, 3)), {}, shift=0)
    row = row_of(quantity, 7.0, bits=4)
    assert row.limit is not None
    assert row.single[0][2] > row.limit >= row.single[0][1]


def test_numbers_with_a_common_divisor_lose_nothing():
    row = row_of(Quantity(((4096, 12288), (0, 8192)), {}, shift=0), 16384.0, bits=4)
    assert row.single == ((0, 1), (0, 1))
    assert (row.base, row.step, row.scale) == (4096, 8192, 1 / 8192)


def test_rounding_down_admits_all_that_floats_admit_and_rounding_up_no_more():
    quantity = Quantity(((0, 333), (0, 334), (0, 335)), {}, shift=0)
    down, up = (row_of(quantity, 668.0, bits=5, up=up) for up in (False, True))
    assert sum(row[1] for row in down.single[:2]) <= down.limit
    assert sum(row[1] for row in up.single) > up.limit
