"""A window of mean bits and a limit of what is in memory at once, solved again from a plan."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from mpq_fx.activation_memory import changes, contenders, peak, stored_bytes
from mpq_fx.encoding import parse_choice
from mpq_fx.errors import ConfigError, InfeasibleError
from mpq_fx.facts import Table, Value
from mpq_fx.plan import load, save
from mpq_fx.problem import MEMORY, problem
from mpq_fx.resolve import resolve

FLOAT, HALF = "float32", "bfloat16"
STATIC, DYNAMIC = "int8*uint8_tensor/static", "int8/dynamic"
LIVE = ((Value(8000, 4, ("a",)), Value(1000, 4)), (Value(6000, 4, ("a", "b")),))


@pytest.fixture
def plan(small):
    """The plan of two units with what its bits and its values between ops are."""
    bits = {key: 16.0 if key[1] == FLOAT else 8.0 for key in small.tables["size"].values}
    tables = {**small.tables, "bits": Table("exact", "bits", bits)}
    baseline = {**small.baseline, MEMORY: 9000.0}
    return replace(small, tables=tables, baseline=baseline, live=LIVE, tolerance=None)


def named(plan):
    return {unit: choice.name for unit, choice in plan.choices.items()}


def test_a_window_of_bits_is_kept_from_below(plan):
    free = {"tolerance": None, "max_bits": 24.0}
    assert set(named(resolve(plan, **free)).values()) == {HALF}  # 16 bits, the fastest
    found = resolve(plan, **free, min_bits=20.0)
    assert sorted(named(found).values()) == [HALF, FLOAT]
    assert found.budgets == {"max_bits": 24.0, "min_bits": 20.0}
    assert named(resolve(found, max_bits=None, min_bits="1x")) == {"a": FLOAT, "b": FLOAT}


def test_a_floor_out_of_reach_is_named_with_the_largest_value_there_is(plan):
    with pytest.raises(InfeasibleError) as caught:
        resolve(plan, tolerance=None, max_size="0.7x", min_bits=30.0)
    assert str(caught.value).splitlines()[:3] == [
        "no plan meets max_size <= 7000 bytes and min_bits >= 30",
        "    within reach: max_size <= 6000 bytes, "
        "max_size <= 10000 bytes with the other budgets kept",
        "    within reach: min_bits >= 32, min_bits >= 16 with the other budgets kept",
    ]
    options = json.loads(caught.value.fix.removeprefix("options="))
    resolve(plan, **{"tolerance": None, "max_size": "0.7x", "min_bits": 30.0, **options})


def test_the_floor_that_a_message_says_can_be_typed(plan):
    bits = {key: value / 3 for key, value in plan.tables["bits"].values.items()}
    thirds = replace(plan, tables={**plan.tables, "bits": Table("exact", "bits", bits)})
    with pytest.raises(InfeasibleError) as caught:
        resolve(thirds, tolerance=None, min_bits=11.0)  # of 32 / 3
    assert caught.value.fix == 'options={"min_bits": 10.66}'
    resolve(thirds, tolerance=None, min_bits=10.66)


def test_a_window_between_two_plans_is_out_of_reach(plan):
    with pytest.raises(InfeasibleError) as caught:
        resolve(plan, tolerance=None, max_bits=23.0, min_bits=17.0)
    assert caught.value.what.startswith("no plan meets max_bits <= 23 and min_bits >= 17\n")


def test_memory_is_kept_and_predicted_as_it_is_reported(plan):
    found = resolve(plan, tolerance=None, objective="error", max_activation_memory=7000.0)
    assert named(found) == {"a": HALF, "b": FLOAT}
    predicted = found.provenance["predicted"][MEMORY]
    assert predicted == peak(LIVE, found.choices) == 6000.0
    assert found.budgets == {"max_activation_memory": 7000.0}
    tighter = resolve(plan, tolerance=None, objective="error", max_activation_memory="0.6x")
    assert named(tighter) == {"a": HALF, "b": HALF}


def test_memory_out_of_reach_is_named_in_bytes(plan):
    with pytest.raises(InfeasibleError) as caught:
        resolve(plan, tolerance=None, objective="error", max_activation_memory=100)
    assert caught.value.what.splitlines() == [
        "no plan meets max_activation_memory <= 100 bytes",
        "    within reach: max_activation_memory <= 5000 bytes",
    ]
    assert caught.value.fix == 'options={"max_activation_memory": 5000}'


def test_a_plan_without_values_between_ops_cannot_be_limited(plan):
    with pytest.raises(ConfigError, match="no table of activation_memory"):
        resolve(replace(plan, live=()), tolerance=None, max_activation_memory=100)


def test_values_between_ops_survive_the_file(plan, tmp_path):
    save(plan, tmp_path / "plan.json")
    assert load(tmp_path / "plan.json").live == LIVE


# --- the sum that the allocator sees is the function that reports ------------------------------

OFFERS = {
    "a": (FLOAT, HALF, STATIC, DYNAMIC),
    "b": (FLOAT, HALF, STATIC),
    "c": (FLOAT, STATIC, "int8*float32"),
}
CHOICES = {unit: tuple(map(parse_choice, names)) for unit, names in OFFERS.items()}
VALUES = (
    Value(4000, 4),
    Value(4000, 4, ("a",)),
    Value(4004, 4, ("a", "b")),
    Value(4000, 4, ("a", "b", "c")),
    Value(3000, 2, ("b", "c")),  # of a 16-bit model: in float32 it would take more
)
SETS = tuple(s for n in (1, 2, 3) for s in itertools.combinations(VALUES, n))


def plans():
    for chosen in itertools.product(*CHOICES.values()):
        yield dict(zip(CHOICES, chosen, strict=True))


def test_changes_add_up_to_the_stored_bytes_of_every_plan():
    for value, plan in itertools.product(VALUES, plans()):
        held = [
            change.bytes
            for change in changes(value, CHOICES)
            if all(plan[site].name in names for site, names in change.choices.items())
        ]
        assert value.bytes + sum(held) == stored_bytes(value, plan)
    every = [change for value in VALUES for change in changes(value, CHOICES)]
    assert all(names for change in every for names in change.choices.values())


@pytest.mark.parametrize("live", [SETS, SETS[:7], SETS[5:9], ()])
def test_contenders_have_the_peak_of_all_sets_under_every_plan(live):
    left = contenders(live, CHOICES)
    assert len(left) <= len(live)
    for plan in plans():
        assert peak(left, plan) == peak(live, plan)
    assert peak(left, {}) == peak(live, {})


def test_what_can_never_be_the_peak_is_left_out():
    small = (Value(100, 4, ("a",)), Value(10, 4))
    assert contenders((small, (Value(9000, 4),), small), CHOICES) == ((Value(9000, 1),),)


def test_the_problem_has_the_peak_of_every_plan():
    from mpq_fx.passes.allocate import value_of

    keys = [(unit, name) for unit, names in OFFERS.items() for name in names]
    table = Table("exact", "noise_power", dict.fromkeys(keys, 0.0))
    asked = problem(
        {"error": table, "latency": table}, objective="latency", budgets={}, baseline={}, live=SETS
    )
    for plan in plans():
        chosen = {unit: choice.name for unit, choice in plan.items()}
        assert value_of(asked, MEMORY, chosen) == peak(SETS, plan)
