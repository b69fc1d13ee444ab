"""The comparison of searches: equal budgets, unseen batches, seeds compared in pairs."""

from __future__ import annotations

import importlib
import sys
from dataclasses import astuple, fields
from pathlib import Path

import pytest
import torch

from mpq_fx import plugins

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Name -> module of bench/, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)
    plugins.forget()


def test_allocation_asks_every_search_within_equal_budgets(bench):
    """One small net, weights alone: what is kept of a plan is its error on calls nobody saw."""
    allocation, trained = bench("allocation"), bench("trained")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16), torch.nn.Linear(16, 4)
    ).eval()
    unseen = tuple((torch.randn(6, 12),) for _ in range(2))
    net = trained.Net(
        "tiny", model, (torch.randn(60, 12),), 6, unseen, torch.ones(1), lambda *y: 1.0, "none"
    )
    allocation.registered()
    with torch.no_grad():
        cells = list(allocation.compare(net, 0, ["measured"], "bits_only"))
    by = {(c.budget, c.search, c.metric): c for c in cells}
    assert {c.budget for c in cells} == {"2.5 bits", "3 bits", "4 bits", "5 bits", "6 bits"}
    mine = [by[f"{bits} bits", allocation.DEFAULT, "auto"] for bits in ("2.5", "4", "6")]
    assert mine[0].error > mine[1].error > mine[2].error > 0
    exact = by["4 bits", "uniform", "measured"]
    with torch.no_grad():
        task = allocation.task_of(net, 0, "bits_only")
        found = allocation.judged(net, task, 0).of(dict.fromkeys("023", "int4_row_asym*float32"))
    assert found == (pytest.approx(exact.error), 1.0)
    assert mine[1].error <= 1.05 * exact.error


def test_the_bar_of_allocation_is_a_paired_comparison(bench):
    table, allocation = bench("allocation_table"), bench("allocation")

    def cells(search: str, metric: str, errors) -> list:
        kept = zip(range(5), errors, strict=True)
        return [allocation.Cell("n", "4 bits", s, search, metric, e, 0.9, 8, 1) for s, e in kept]

    noisy = [0.1, 0.3, 0.2, 0.5, 0.4]  # what differs between seeds cancels within one
    worse = [1.1 * e for e in noisy]
    mixed = [e * f for e, f in zip(noisy, (0.9, 1.2, 0.95, 1.1, 1.0), strict=True)]
    mine = cells(table.DEFAULT, "auto", noisy)
    uniform = cells("uniform", "measured", worse)

    def asked(*others: list) -> dict:
        rows = [astuple(cell) for group in (mine, uniform, *others) for cell in group]
        columns = [each.name for each in fields(allocation.Cell)]
        about = {"score": "accuracy", "examples": 10, "run": ""}
        return {"n": {**about, "columns": columns, "rows": rows}}

    page = table.page(asked(cells("mpq-fx", "fisher", mixed), cells("NNCF", "x", [None] * 5)))
    assert "in 1 of 1 cells (100%). It is significantly worse than a uniform plan in 0." in page
    assert "| uniform | measured | 1.100 | 1 | 0 | 0 | 0 |" in page
    assert "| mpq-fx | fisher | 1.024 | 0 | 1 | 0 | 0 |" in page
    assert "| NNCF | x | inf | 0 | 0 | 0 | 1 | – |" in page
    beaten = table.page(asked(cells("mpq-fx", "fisher", [0.9 * e for e in noisy])))
    assert "in 0 of 1 cells (0%); not in n at 4 bits (fisher, 1.111)" in beaten
