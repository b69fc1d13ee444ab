"""The 18 published integer programs of HAWQ-V3 (arXiv 2011.10680): 17 answers are the optimum, and
one of them is one layer away from it.

Arrays from the authors' notebook (github.com/Zhen-Dong/HAWQ, MIT): trace, ‖ΔW‖², parameters,
operations and latencies of each layer in 4 and 8 bits.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpq_fx.passes.allocate import Problem, cp_sat

NETS = json.loads(Path(__file__).with_name("hawqv3.json").read_text())
CASES = [
    (net, *key.rsplit("_", 1)) for net in ("resnet18", "resnet50") for key in NETS[net]["expected"]
]


def problem(net: str, resource: str, share: float) -> Problem:
    """min Σ trace · ‖ΔW‖²  s.t.  cost <= cost(all 4) + share · (cost(all 8) - cost(all 4))"""
    data = NETS[net]
    costs = {
        "size": [(p / 2, p) for p in data["params_M_unit_as_in_notebook"]],
        "bops": [(b / 64, b / 16) for b in data["bops_fp_M"]],
        "lat": list(zip(data["lat4"], data["lat8"], strict=True)),
    }[resource]
    units = [f"u{k:02d}" for k in range(len(costs))]
    error, cost = {}, {}
    for k, unit in enumerate(units):
        for column, bits in enumerate("48"):
            error[unit, bits] = data["trace_avg"][k] * data[f"dw2_{bits}"][k]
            cost[unit, bits] = costs[k][column]
    low, high = (sum(pair[column] for pair in costs) for column in (0, 1))
    return Problem(
        options=dict.fromkeys(units, ("4", "8")),
        error=error,
        objective=("error",),
        resources={"cost": cost},
        budgets={"cost": low + share * (high - low)},
        ties=tuple(tuple(units[k] for k in tie) for tie in data["ties"]),
    )


@pytest.mark.parametrize(("net", "resource", "share"), CASES)
def test_a_published_problem_has_its_known_optimum(net, resource, share):
    asked = problem(net, resource, float(share))
    found = cp_sat.solve(asked)
    wanted = dict(zip(asked.options, NETS[net]["expected"][f"{resource}_{share}"], strict=True))
    best = sum(asked.error[key] for key in wanted.items())
    assert found.values["error"] == pytest.approx(best, rel=1e-9)
    assert found.status == "OPTIMAL"
    assert found.gap < 1e-6


def test_one_published_answer_is_one_layer_away_from_the_optimum():
    facts = NETS["published_differs"]["resnet50"]["size_0.25"]
    asked = problem("resnet50", "size", 0.25)
    published = dict(zip(asked.options, facts["published"], strict=True))
    found = cp_sat.solve(asked)
    away = [unit for unit in published if published[unit] != found.assignment[unit]]
    assert len(away) == 1
    assert sum(asked.error[key] for key in published.items()) == pytest.approx(
        facts["published_objective"], abs=1e-6
    )
    assert found.values["error"] == pytest.approx(facts["optimum_objective"], abs=1e-6)
    assert found.bound > 0.9 * found.values["error"]
