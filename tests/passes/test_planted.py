"""Nets whose errors are planted: two layers that err alike, or against each other.

y = [W₁ x + W₂ x, W₃ x] with W₂ = ±W₁, so that the noise of layers 1 and 2 in int4 is 1 and 1
alone (in units of the first), 4 or 0 together, and adds up with that of layer 3.  What singles
say of the pair is wrong by 2.  Each search does what theory says of it, on measured errors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional

from mpq_fx.facts import Choice
from mpq_fx.numerics import noise_power
from mpq_fx.passes import METRICS
from mpq_fx.passes.allocate import SEARCHES, Evaluator, Problem, cp_sat
from mpq_fx.passes.allocate.search import remembered
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.mixture import Mixture, mixed
from tests.architectures import values
from tests.passes.conftest import Subject, subject

FLOAT, LOW = Choice("float32", "float32"), Choice("int4", "float32")
UNITS = "123"
AMPLIFY, CANCEL, CHEAP_THIRD = (1.0, 1.5), (-1.0, 1.5), (-1.0, 0.5)  # sign of W₂, noise of W₃


def branches(x, one, two, three):
    both = functional.linear(x, one) + functional.linear(x, two)
    return (torch.cat([both, functional.linear(x, three)], -1),)


class Planted:
    """The net, the noise of each set of layers in int4, and what a search is asked."""

    def __init__(self, sign: float, third: float) -> None:
        one, three = values(12, 16), values(12, 16, 3)[..., 0]
        alone = Planted.noises(subject(branches, (one, sign * one, three), 5, 16))
        # Not quite exactly: the scales of int4 are rounded.
        three = three * (third * alone["1"] / alone["3"]) ** 0.5
        self.net = subject(branches, (one, sign * one, three), 5, 16)
        self.sites = [site.name for site in self.net.sites]
        self.noise = Planted.noises(self.net)
        self.unit = self.noise["1"]

    @staticmethod
    def noises(net: Subject) -> dict[str, float]:
        """{"13": noise of layers 1 and 3 in int4, …}, on the first call"""
        replay, call = net.replay(), net.calls[0]
        reference = replay.run(call, {})[0]
        found = {}
        for count in range(4):
            for low in itertools.combinations(range(3), count):
                plan = {net.sites[k].name: LOW for k in low}
                key = "".join(UNITS[k] for k in low)
                found[key] = noise_power(replay.run(call, plan)[0], reference)
        return found

    def low(self, plan: Mapping[str, str]) -> str:
        return "".join(u for u, s in zip(UNITS, self.sites, strict=True) if plan[s] == LOW.name)

    def found(self, search: str, metric: str, limit: float = math.inf) -> str | None:
        """The layers that a search leaves in int4: under a limit of the noise as many as it can, or
        two of three with the least noise.
        """
        problem, evaluator = self.problem(metric, limit), self.evaluator(limit)
        best = SEARCHES[search].run(problem, evaluator)
        return None if best is None else self.low(best.solution.assignment)

    def problem(self, metric: str, limit: float) -> Problem:
        options = dict.fromkeys(self.sites, (FLOAT, LOW))
        table = METRICS[metric](Task(self.net.replay(), options, self.net.calls[:1]))
        names = (FLOAT.name, LOW.name)
        cost = {(s, n): 1.0 + (n == names[0]) for s in self.sites for n in names}
        is_free = math.isinf(limit)
        return Problem(
            options=dict.fromkeys(self.sites, names),
            error=dict(table.values),
            pairs=dict(table.pairs),
            resources={"size": cost},
            objective=("error",) if is_free else ("size", "error"),
            budgets={"size": 4.0} if is_free else {},
        )

    def evaluator(self, limit: float) -> Evaluator:
        replay, call = self.net.replay(), self.net.calls[0]
        options = dict.fromkeys(self.sites, (FLOAT, LOW))
        reference = replay.run(call, {})

        def gradient(shares, k):
            return mixed(Mixture(replay, options, shares), call, reference, frozenset())

        most = math.sqrt(limit * self.unit)
        return Evaluator(
            error=remembered(lambda plan: self.noise[self.low(plan)] ** 0.5),
            limit=most,
            yardstick=0.0 if math.isinf(most) else most,
            exponent=2,
            gradient=gradient,
            solve=cp_sat.solve,
            is_past=lambda share=1.0: False,
        )


@pytest.fixture(params=[AMPLIFY, CANCEL, CHEAP_THIRD], ids=["amplify", "cancel", "cheap third"])
def planted(request) -> tuple[tuple[float, float], Planted]:
    return request.param, Planted(*request.param)


def test_the_noise_is_what_was_planted(planted):
    (sign, third), net = planted
    joint = 4.0 if sign > 0 else 0.0
    expected = {"": 0.0, "1": 1.0, "2": 1.0, "3": third, "12": joint}
    expected |= {"13": 1 + third, "23": 1 + third, "123": joint + third}
    for low, noise in net.noise.items():
        assert noise / net.unit == pytest.approx(expected[low], rel=5e-3, abs=1e-6)


PAIRS = {AMPLIFY: ("13", "23"), CANCEL: ("12",), CHEAP_THIRD: ("12",)}  # the best two of three


MISLED = {AMPLIFY: ("12",), CANCEL: ("12",), CHEAP_THIRD: ("13", "23")}


def test_singles_mislead_the_solver(planted):
    """Where the third is dearer alone they take the pair, right or wrong; else never."""
    case, net = planted
    assert net.low(cp_sat.solve(net.problem("measured", math.inf)).assignment) in MISLED[case]


@pytest.mark.parametrize("metric", ["measured_pairs", "interlayer_hessian"])
def test_with_pairs_the_solver_is_exact(planted, metric):
    case, net = planted
    assert net.low(cp_sat.solve(net.problem(metric, math.inf)).assignment) in PAIRS[case]


@pytest.mark.parametrize("metric", ["measured", "measured_pairs"])
def test_the_search_around_the_solver_mends_what_singles_miss(planted, metric):
    case, net = planted
    assert net.found("solver", metric) in PAIRS[case]


def test_rco_finds_the_pair_by_its_gradient_whatever_the_tables_say(planted):
    case, net = planted
    assert net.found("rco", "measured") in PAIRS[case]


def test_the_greedy_ratio_sees_what_its_next_step_does_and_no_further(planted):
    """It begins with the least single: of a cancelling pair only where no other is less."""
    case, net = planted
    assert (
        net.found("greedy_ratio", "measured")
        in {
            AMPLIFY: ("13", "23"),
            CANCEL: ("12",),
            CHEAP_THIRD: ("13", "23"),
        }[case]
    )


@pytest.mark.parametrize(
    ("metric", "case", "limit", "longest"),
    [
        ("measured_pairs", AMPLIFY, 2.6, ("13", "23")),
        ("measured", AMPLIFY, 2.6, ("1", "2")),  # 1, 2, 3: the second is too much
        ("measured_pairs", CANCEL, 0.6, ("12",)),
        ("measured_pairs", CHEAP_THIRD, 0.6, ("3",)),  # 3, 1, 2: all would fit, two do not
    ],
)
def test_bisection_finds_the_longest_prefix_where_errors_grow(metric, case, limit, longest):
    assert Planted(*case).found("bisection", metric, limit) in longest


@pytest.mark.parametrize(
    ("search", "limit", "low"),
    [("greedy", 0.6, ("",)), ("greedy_ratio", 0.6, ("",)), ("greedy", 1.1, ("12",))],
)
def test_one_by_one_a_cancelling_pair_is_out_of_reach_unless_its_first_is_allowed(
    search, limit, low
):
    assert Planted(*CANCEL).found(search, "measured_pairs", limit) in low


@pytest.mark.parametrize(
    ("metric", "case", "limit", "found"),
    [
        ("measured_pairs", AMPLIFY, 2.6, ("13", "23")),
        ("measured", AMPLIFY, 2.6, ("13", "23")),  # 12 is too much, which corrects the singles
        ("measured_pairs", CHEAP_THIRD, 0.6, ("123",)),
        ("measured", CHEAP_THIRD, 0.6, ("3",)),  # no sum of singles but this one is allowed
    ],
)
def test_under_a_tolerance_the_default_search_needs_pairs_or_what_plans_tell(
    metric, case, limit, found
):
    assert Planted(*case).found("solver", metric, limit) in found
