"""A plan as large as that of BERT-base, with made-up but plausible numbers; no model is run."""

from __future__ import annotations

import random
import sys
from types import ModuleType

import pytest
from click.testing import CliRunner

from mpq_fx.cli import main
from mpq_fx.encoding import parse_choice
from mpq_fx.facts import Plan, Row, Site, SolverFacts, Table

FLOAT = "float32"
CHOICES = {  # name -> (relative ms, noise power, bits)
    FLOAT: (1.0, 0.0, 32.0),
    "bfloat16": (0.25, 1.2e-6, 16.0),
    "int8*uint8_tensor/static": (0.13, 4e-5, 8.04),
    "int8*int8/dynamic": (0.19, 9e-6, 8.04),
}
REFUSALS = {
    "int4*float32": ("weight-only int4 needs one row, this site has 128",),
    "int8*int8_tensor/static": ("oneDNN takes uint8 activations here",),
}


def bert_sites() -> list[Site]:
    sites = [linear_like("embeddings.word_embeddings", "embedding", (30522, 768), 0)]
    for layer in range(12):
        block = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            sites.append(linear_like(f"{block}.attention.self.{name}", "linear", (768, 768), 1))
        sites.append(linear_like(f"{block}.attention.output.dense", "linear", (768, 768), 1))
        sites.append(linear_like(f"{block}.intermediate.dense", "linear", (3072, 768), 1))
        sites.append(linear_like(f"{block}.output.dense", "linear", (768, 3072), 1))
    return [*sites, linear_like("pooler.dense", "linear", (768, 768), 0)]


def linear_like(name: str, op: str, shape: tuple[int, int], tokens: int) -> Site:
    rows = 128 if tokens else 1
    return Site(
        name=name,
        op=op,
        node=name.replace(".", "_"),
        weight=f"p_{name}",
        input_shape=(1, rows, shape[1]),
        weight_shape=shape,
        output_shape=(1, rows, shape[0]),
        macs=0 if op == "embedding" else rows * shape[0] * shape[1],
        path=name,
        source="modeling_bert.py:178",
    )


def tables_of(sites: list[Site]) -> dict[str, Table]:
    draw = random.Random(0)
    error, ms, size, bits = {}, {}, {}, {}
    total = sum(site.weight_numel for site in sites)
    for depth, site in enumerate(sites):
        whole = max(site.macs / 1.6e8, 0.02)
        for name, (cost, noise, width) in CHOICES.items():
            if site.op == "embedding" and "*" in name:
                continue
            key = site.name, name
            error[key] = noise * draw.uniform(0.2, 3.0) * (1 + (depth % 6) / 3)
            ms[key] = whole * cost * draw.uniform(0.9, 1.1) if cost < 1 else whole
            size[key] = round(site.weight_numel * width / 8)
            bits[key] = width * site.weight_numel / total
    spread = {key: value / 10 for key, value in error.items()}
    return {
        "error": Table(
            "measured",
            "noise_power",
            error,
            spread=spread,
            provenance={"records": 2, "seconds": 14.2},
        ),
        "latency": Table("measured", "ms", ms),
        "size": Table("exact", "bytes", size),
        "bits": Table("exact", "bits", bits),
    }


@pytest.fixture(scope="session")
def bert() -> Plan:
    from mpq_fx.resolve import frontier, resolve

    sites = bert_sites()
    tables = tables_of(sites)
    floats = {
        name: sum(v for (_, c), v in table.values.items() if c == FLOAT)
        for name, table in tables.items()
    }
    plan = Plan(
        choices={},
        target="onednn",
        tables=tables,
        ledger=tuple(
            Row(
                site,
                FLOAT,
                refusals=REFUSALS if site.op == "linear" else {},
                ms_before=tables["latency"].values[site.name, FLOAT],
                kernel="onednn.qlinear_pointwise",
            )
            for site in sites
        ),
        baseline={**floats, "latency": floats["latency"] + 6.0, "size": floats["size"] + 1.5e6},
        ties=tuple(
            tuple(f"encoder.layer.{k}.attention.self.{n}" for n in ("query", "key", "value"))
            for k in range(12)
        ),
        error_scale=1.3,
        fingerprint={
            "sites": {
                s.name: {"op": s.op, "weight_shape": list(s.weight_shape), "dtype": s.dtype}
                for s in sites
            }
        },
        provenance={"packages": {"mpq-fx": "0.1.0", "torch": "2.13.0"}},
    )
    solved = resolve(plan, tolerance=0.02)
    return measured(solved, (*frontier(solved, points=9), *frontier(solved, "size", points=5)))


def measured(plan: Plan, points) -> Plan:
    """What a run on a machine would have added."""
    from dataclasses import replace

    ledger = tuple(
        replace(
            row,
            kernel={"bfloat16": "mkldnn._linear_pointwise", FLOAT: "inductor"}.get(
                row.choice, "onednn.qlinear_pointwise"
            ),
            reason="the error is better spent elsewhere" if row.choice == FLOAT else "",
        )
        for row in plan.ledger
    )
    return replace(
        plan,
        ledger=ledger,
        error=0.0187,
        points=points,
        latency_ms={"plan": 13.1, "float": 47.0, "inductor float": 46.0, "all bfloat16": 17.2},
        errors={"plan": 0.0192, "float": 0.0, "all bfloat16": 0.011, "all int8": 0.093},
        solver=SolverFacts("OPTIMAL", ("latency", "error"), 9.87, 9.87, 0.0, 0.41),
        timings={
            "observe": 3.1,
            "error table": 14.2,
            "latency table": 6.6,
            "solve and verify": 8.9,
            "compile": 11.8,
            "race": 6.0,
            "frontier": 1.0,
        },
        provenance={"packages": {"mpq-fx": "0.1.0", "torch": "2.13.0"}, "threads": 4},
        notes=("time_budget of 60 s: errors measured on 2 of 4 calls",),
    )


def _rows(first: Site, second: Site) -> tuple[Row, Row]:
    """One site in bfloat16, one that stays in float."""
    reason = "float is the fastest here"
    measured = {"predicted_error": 0.01, "ms_before": 4.0, "ms_after": 1.0}
    return (
        Row(first, "bfloat16", kernel="k", weight_bytes=2000, **measured),
        Row(second, FLOAT, reason=reason, ms_before=6.0, ms_after=6.0, weight_bytes=4000),
    )


@pytest.fixture
def small() -> Plan:
    """Two units, one budget, numbers that can be checked by hand."""
    error = {("a", FLOAT): 0.0, ("a", "bfloat16"): 1e-4, ("b", FLOAT): 0.0, ("b", "bfloat16"): 4e-4}
    ms = {("a", FLOAT): 4.0, ("a", "bfloat16"): 1.0, ("b", FLOAT): 6.0, ("b", "bfloat16"): 2.0}
    size = {key: 4000.0 if key[1] == FLOAT else 2000.0 for key in ms}
    sites = [
        Site(name, "linear", name, weight=f"p_{name}", weight_shape=(10, 100), macs=1000)
        for name in "ab"
    ]
    return Plan(
        choices={"a": parse_choice("bfloat16"), "b": parse_choice(FLOAT)},
        target="reference",
        ledger=_rows(*sites),
        error=0.009,
        tolerance=0.01,
        budgets={"tolerance": 0.01},
        latency_ms={"plan": 12.0, "float": 15.0},
        errors={"plan": 0.01, "float": 0.0},
        baseline={"latency": 15.0, "size": 10000.0, "bits": 32.0},
        tables={
            "error": Table("measured", "noise_power", error),
            "latency": Table("measured", "ms", ms),
            "size": Table("exact", "bytes", size),
        },
        fingerprint={
            "sites": {
                s.name: {"op": "linear", "weight_shape": [10, 100], "dtype": "float32"}
                for s in sites
            }
        },
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda *args: CliRunner().invoke(main, list(map(str, args)))


@pytest.fixture
def tuned(monkeypatch, small):
    """mpq_fx.tune replaced by a record of its arguments."""
    import mpq_fx

    calls = []

    def tune(model, batches, **given):
        calls.append((model, batches, given))
        return small

    monkeypatch.setattr(mpq_fx, "tune", tune, raising=False)
    return calls


@pytest.fixture
def nets(monkeypatch):
    """A user's module of factories."""
    module = ModuleType("nets")
    module.net = lambda: "model"
    module.both = lambda: ("model", ["batch"])
    module.data = lambda: ["other"]
    module.rows = ["row"]
    module.score = lambda model: 0.9
    module.broken = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "nets", module)
    return module
