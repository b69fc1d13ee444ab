"""Nothing silent: every site has a row and a reason; what Dynamo did not hand over is counted."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.report import coverage

limit = partial(torch._dynamo.config.patch, "recompile_limit")  # noqa: TID251

SITES = {"query", "key", "value", "up", "down"}


def test_every_site_has_a_row_with_its_choice_or_the_reason(isolated, world):
    compiled = world.quantized(world.Net(), formats={"*": ["int8", "bfloat16"], "key": []})
    rows = {row.site.name: row for row in mpq_fx.explain(compiled).rows}
    assert set(rows) >= SITES
    assert any(row.site.op == "attention" for row in rows.values())
    assert rows["key"].choice == "float32"
    assert rows["key"].reason == "no other choice is possible here"
    assert rows["key"].refusals["bfloat16"] == ("options allow only  here",)
    for row in rows.values():
        assert row.choice != "float32" or row.reason
        assert row.kernel
        assert row.site.source.startswith("conftest.py:")


def test_coverage_adds_up_to_all_weights_and_all_macs(isolated, world):
    model = world.Net()
    report = mpq_fx.explain(world.quantized(model))
    shares = coverage(report)
    assert sum(share.weights for share in shares) == pytest.approx(1.0)
    assert sum(share.macs or 0.0 for share in shares) == pytest.approx(1.0)
    numel = sum(p.numel() for p in model.parameters())
    sites = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    glue = next(share for share in shares if share.choice.startswith("no site"))
    assert glue.weights == pytest.approx((numel - sites) / numel)


def test_parameters_that_no_graph_reads_are_not_captured(isolated, world):
    model = world.Net()
    model.unused = nn.Linear(32, 32)
    shares = {s.choice: s for s in coverage(mpq_fx.explain(world.quantized(model)))}
    numel = sum(p.numel() for p in model.parameters())
    assert shares["not captured"].weights == pytest.approx(1056 / numel)


def test_before_and_without_a_plan_the_sites_stand_in_the_ledger_too(isolated, world):
    compiled = world.compiled(world.Net())
    world.calibrate(compiled, 1)
    report = mpq_fx.explain(compiled)
    assert {row.site.name for row in report.rows} >= SITES
    assert {(row.choice, row.reason) for row in report.rows} == {("float32", "observing")}
    assert "float: observing" in str(report)
    assert coverage(report)[0].choice == "float32"
    assert '"reason": "observing"' in report.to_json()


def test_a_graph_break_is_reported(isolated, world):
    text = str(mpq_fx.explain(world.quantized(world.Broken())))
    assert "graph break (1×)" in text
    assert "graph 1" in text


def test_calls_beyond_the_recompile_limit_are_reported(isolated, world):
    class Named(world.Net):
        def forward(self, x, name):
            return super().forward(x) * len(name)

    compiled = world.compiled(Named())
    with torch.inference_mode(), limit(2):
        for k in range(4):
            compiled(world.batch(0), "a" * k)
    report = mpq_fx.explain(compiled)
    assert report.dynamo["recompile_limit"] == 1
    text = " ".join(str(report).split())
    assert "recompile limit hit 1×: those calls run eager, without mpq" in text
    assert "1 of 3 frames were skipped by Dynamo and run eager" in text


def test_an_input_that_cannot_be_captured_is_a_reason(isolated, world):
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(32, 32)

        def forward(self, x):
            return self.out(x.real)

    model = Spectrum()
    compiled = world.compiled(model)
    x = torch.complex(world.batch(0), world.batch(1))
    with torch.inference_mode():
        assert torch.equal(compiled(x), model(x))
    assert "float: input x has complex values" in str(mpq_fx.explain(compiled))


def test_a_plan_counts_once_however_many_shapes_run_it(isolated, world):
    compiled = world.quantized(world.Net())
    with torch.inference_mode():
        compiled(world.batch(0, 7))
    report = mpq_fx.explain(compiled)
    assert [entry.label for entry in report.entries] == ["graphs 0, 1"]
    assert len(report.rows) == len({row.site.name for row in report.rows})
