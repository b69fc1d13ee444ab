"""mpq tune --synthetic: one command without data, and a plan that says so."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import mpq_fx.cli
from mpq_fx.plan import load
from tests.synthetic.nets import Identity


def made_inputs(monkeypatch):
    """mpq_fx.synthetic's methods replaced by a record of their arguments."""
    from mpq_fx import synthetic

    calls = []
    for method in synthetic.METHODS:

        def make(*args, method=method, **given):
            calls.append((method, *args, given))
            return [f"made by {method}"]

        monkeypatch.setitem(synthetic.METHODS, method, make)
    return calls


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ("distilled:32x3x8x8", (32, 3, 8, 8)),
        ("sampled:8x128", (8, 128)),
        ("random_tokens:4x16", (4, 16)),
    ],
)
@pytest.mark.parametrize("made", ["nets:net", "nets:both"])
def test_tune_without_data_makes_its_batches(run, tuned, nets, monkeypatch, made, given, shape):
    calls = made_inputs(monkeypatch)
    done = run("-q", "tune", made, "-o", "p.json", "--synthetic", given)
    assert done.exit_code == 0, done.output
    method = given.partition(":")[0]
    assert calls == [(method, "model", shape, {"progress": False})]
    assert tuned[0][1] == [f"made by {method}"], "and not the factory's own batches"


def test_one_command_without_data_writes_a_plan_that_says_so(run, monkeypatch, tmp_path):
    module = ModuleType("digits")
    module.make = lambda: Identity().eval()
    monkeypatch.setitem(sys.modules, "digits", module)
    options = ("--target", "reference", "--tolerance", "0.1")
    given = ("digits:make", "-o", "p.json", "--synthetic", "distilled:2x3x4x4")
    done = run("-q", "tune", *given, *options)
    assert done.exit_code == 0, done.output
    assert "on synthetic inputs" in done.stdout
    assert "calibrated without data: 4 of 4 batches" in " ".join(done.stderr.split())
    assert load(tmp_path / "p.json").without_data
    assert "calibrated without data" in " ".join(run("show", "p.json").stdout.split())


def test_the_methods_that_help_names_are_those_there_are():
    from mpq_fx.synthetic import METHODS

    assert list(mpq_fx.cli.SYNTHETIC_METHODS) == list(METHODS)
