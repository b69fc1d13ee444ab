"""Plans of several graphs as one: what is added, what counts by its worst, and solving it again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.facts import SolverFacts, Table
from mpq_fx.merged import merged
from mpq_fx.problem import total


class Halves(nn.Module):
    """Two graphs, the second with five times the weights of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 160)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        torch._dynamo.graph_break()  # noqa: TID251 -- there is no public spelling
        return self.second(x)


@pytest.fixture
def two(small):
    """The small plan, and the same of other sites with twice the error budget and weights."""
    size = {key: value / 250 for key, value in small.tables["size"].values.items()}
    bits = Table("exact", "bits", size)
    one = replace(
        small,
        tables={**small.tables, "bits": bits},
        baseline={**small.baseline, "bits": 32.0, "weights": 2000.0, "activation_memory": 5.0},
        budgets={"tolerance": 0.01, "max_size": 5000.0, "max_bits": 20.0},
        solver=SolverFacts("OPTIMAL", ("latency", "error"), 7.0, 7.0, 0.0, 0.1),
        latency_ms={"plan": 7.0, "all bfloat16": 5.0, "inductor float": 12.0},
        errors={"plan": 0.009, "all bfloat16": 0.02},
        error_scale=1.0,
    )
    names = {"a": "c", "b": "d"}
    other = replace(
        one,
        choices={names[site]: choice for site, choice in one.choices.items()},
        ledger=tuple(replace(r, site=replace(r.site, name=names[r.site.name])) for r in one.ledger),
        tables={
            n: replace(t, values={(names[u], o): v for (u, o), v in t.values.items()}, spread={})
            for n, t in one.tables.items()
        },
        baseline={**one.baseline, "weights": 6000.0, "activation_memory": 9.0},
        budgets={"tolerance": 0.03, "max_size": 7000.0, "max_bits": 28.0},
        fingerprint={"sites": {names[n]: f for n, f in one.fingerprint["sites"].items()}},
        latency_ms={"plan": 9.0, "plan, templates": 6.0, "inductor float": 12.0},
        errors={"plan": 0.01, "plan, templates": 0.012},
        winner="plan, templates",
        tolerance=0.03,
        error_scale=2.0,
    )
    return one, other


def test_one_plan_stays_as_it_is(small):
    assert merged([small]) is small


def test_budgets_of_sums_add_up_and_of_tolerances_the_larger_counts(two):
    whole = merged(two)
    assert whole.budgets["max_size"] == 5000.0 + 7000.0
    assert whole.budgets["max_bits"] == 20.0 * 0.25 + 28.0 * 0.75
    assert whole.budgets["tolerance"] == whole.tolerance == 0.03
    assert whole.baseline["size"] == 2 * two[0].baseline["size"]
    assert whole.baseline["bits"] == 32.0
    assert whole.baseline["activation_memory"] == 9.0


def test_noise_powers_of_graphs_compare_whatever_each_was_scaled_by(two):
    whole = merged(two)
    values = whole.tables["error"].values
    assert whole.error_scale == 1.0
    assert values["a", "bfloat16"] == two[0].tables["error"].values["a", "bfloat16"]
    assert values["c", "bfloat16"] == two[1].tables["error"].values["c", "bfloat16"] / 2.0


def test_times_are_those_of_variants_that_all_graphs_have_and_of_what_runs(two):
    whole = merged(two)
    assert whole.winner == "plan"
    assert whole.latency_ms == {"plan": 7.0 + 6.0, "inductor float": 24.0}
    assert whole.errors == {"plan": 0.012}


def test_what_is_proved_of_each_graph_is_proved_of_the_sum(two):
    late = replace(
        two[1], solver=SolverFacts("FEASIBLE", ("latency", "error"), 9.0, 5.0, 4 / 9, 1.0)
    )
    assert merged(two).solver == replace(two[0].solver, value=14.0, bound=14.0, seconds=0.2)
    found = merged([two[0], late]).solver
    assert (found.status, found.value, found.bound, found.gap) == ("FEASIBLE", 16.0, 12.0, 0.25)


def test_the_plan_of_two_graphs_is_solved_again_within_its_own_budgets(isolated):
    model, generator = Halves().eval(), torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 32, generator=generator) for _ in range(4)]
    wishes = {"target": "reference", "objective": "error", "tolerance": None, "max_size": "0.5x"}
    plan = mpq_fx.tune(model, batches, config=mpq_fx.Config(**wishes), progress=False)
    assert plan.budgets["max_size"] == plan.baseline["size"] / 2
    again = plan.resolve()
    assert again.budgets == plan.budgets
    taken = {site: choice.name for site, choice in again.choices.items()}
    biases = 4 * (32 + 160)
    assert total(again.tables["size"], taken) + biases <= plan.budgets["max_size"]
    largest = max(point["size"] for point in plan.points)
    assert largest == pytest.approx(plan.baseline["size"])  # of all graphs, not of the first
