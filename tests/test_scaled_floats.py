"""Eight-bit floats with a scale, end to end: what they cost, that a plan with them is a plan, and
that one more of them is one value.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mpq_fx
import mpq_fx.kernels
from mpq_fx import passes, plugins
from mpq_fx.demo import nets
from mpq_fx.errors import PlanError
from mpq_fx.facts import Choice
from mpq_fx.formats import FORMATS, Float, Format, format_named
from mpq_fx.numerics import dequantize, fake_quantize, quantize, quantize_weight, relative_rms
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.reference import FP8, REFERENCE

fp8_e5m2 = Format("fp8_e5m2", Float(5, 2), scale=torch.float32)  # the one line of a further format


@pytest.fixture(scope="module")
def subject():
    return nets.on_digits("vit", "a small ViT", lambda: nets.Vit(width=32, depth=1), epochs=2)


def tune(subject, formats, target="reference", **options):
    given = {"tolerance": 0.2, "objective": "size", **options}
    config = mpq_fx.Config(target=target, formats=formats, **given)
    return mpq_fx.tune(subject.model, subject.calibration, config=config, progress=False)


def in_fp8(plan) -> int:
    return sum(choice.weight == "fp8_e4m3" for choice in plan.choices.values())


# --- what the numbers cost


@pytest.mark.parametrize("choice", FP8, ids=str)
def test_a_trained_net_keeps_the_three_bits_of_the_mantissa(subject, choice, isolated):
    plan, halves = tune(subject, [choice.name]), tune(subject, ["bfloat16"])
    assert in_fp8(plan) >= 6
    # Unit roundoffs of 2^-4 and 2^-8: 16 times the error, of operands that are all in fp8.
    assert 2 * halves.error < plan.error < 16 * halves.error


def test_int8_rows_are_finer_without_outliers_and_coarser_with_them():
    x = torch.randn(64, 256)
    outlying = torch.cat([x, torch.full((64, 1), 500.0)], 1)
    errors = {
        (name, kind): relative_rms(fake_quantize(rows, FORMATS[name])[:, :256], x)
        for name in ("int8", "fp8_e4m3")
        for kind, rows in (("even", x), ("outlying", outlying))
    }
    assert errors["int8", "even"] < 0.01 < errors["fp8_e4m3", "even"] < 2**-5
    assert errors["fp8_e4m3", "outlying"] < 2**-5 < 0.5 < errors["int8", "outlying"]


# --- a plan is a plan


@pytest.fixture(scope="module")
def plan(subject):
    return tune(subject, ["fp8_e4m3"])


def test_a_saved_plan_runs_as_it_was_tuned(subject, plan, tmp_path, isolated):
    plan.save(tmp_path / "plan.json")
    loaded = mpq_fx.Plan.load(tmp_path / "plan.json")
    assert loaded.choices == plan.choices
    (x,) = subject.measured[0]
    with torch.inference_mode():
        want = mpq_fx.apply(subject.model, plan)(x)
        torch.compiler.reset()
        got = mpq_fx.apply(subject.model, loaded)(x)
        assert torch.equal(got, want)
        assert not torch.equal(want, subject.model(x))
    assert str(mpq_fx.explain(mpq_fx.apply(subject.model, plan))).count("fp8_e4m3") > 1


def test_codes_of_floats_fill_a_model_on_the_meta_device(subject, plan, tmp_path, isolated):
    plan.with_codes(subject.model).save(tmp_path / "plan.json")
    loaded = mpq_fx.Plan.load(tmp_path / "plan.json")
    codes = [t for name, t in loaded.tensors.items() if name.endswith("|codes")]
    assert len(codes) == in_fp8(plan)
    assert all(t.dtype == torch.float8_e4m3fn for t in codes)
    with torch.device("meta"):
        empty = nets.Vit(width=32, depth=1).eval()
    (x,) = subject.measured[0]
    with torch.inference_mode():
        want = mpq_fx.apply(subject.model, plan)(x)
        torch.compiler.reset()
        torch.testing.assert_close(mpq_fx.apply(empty, loaded)(x), want)


def test_all_fp8_is_a_plan_to_beat_where_it_is_offered(isolated, monkeypatch):
    monkeypatch.setattr(passes, "TARGETS", (replace(REFERENCE, is_timed=True),))
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    batches = [torch.randn(4, 16) for _ in range(4)]
    found = {}
    for formats in (["fp8_e4m3"], ["bfloat16"]):
        config = mpq_fx.Config(target="reference", formats=formats, tolerance=0.2, time_budget=0.1)
        found[formats[0]] = mpq_fx.tune(model, batches, config=config, progress=False).errors
    assert "all fp8" not in found["bfloat16"]
    assert found["fp8_e4m3"]["all fp8"] > 0.01


def test_a_site_in_no_format_of_the_table_has_its_plans_to_beat(isolated, monkeypatch):
    monkeypatch.setattr(passes, "TARGETS", (replace(REFERENCE, is_timed=True),))
    model = nn.Sequential(nn.Linear(16, 16)).double().eval()
    batches = [torch.randn(4, 16, dtype=torch.float64) for _ in range(4)]
    config = mpq_fx.Config(target="reference", tolerance=0.2, time_budget=0.1)
    plan = mpq_fx.tune(model, batches, config=config, progress=False)
    assert "all fp8" not in plan.errors
    assert plan.choices["0"].weight == "float64"


def test_the_cpu_says_why_it_has_none(subject, plan, isolated):
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    batches = [torch.randn(4, 64) for _ in range(4)]
    options = mpq_fx.Config(target="cpu", tolerance=0.1, formats=["bfloat16"], time_budget=0.1)
    (row,) = mpq_fx.tune(model, batches, config=options, progress=False).ledger
    for choice in FP8:
        reason, *_ = row.refusals[choice.name]
        assert reason == "this CPU multiplies no 8-bit floats; int8 takes as many bytes"
    here = replace(plan, target="cpu")
    said = pytest.raises(PlanError, match="cannot run on cpu here: this CPU multiplies no 8-bit")
    with said, torch.inference_mode():
        mpq_fx.apply(subject.model, here)(subject.measured[0][0])
    assert all(choice in ONEDNN.choices["linear"] for choice in FP8)


# --- one more format


@pytest.fixture
def e5m2():
    """The format in the table, and a target that offers it wherever a site has a weight."""
    plugins.add("formats", "fp8_e5m2", f"{__name__}:fp8_e5m2")
    offered = {
        "linear": (Choice("fp8_e5m2", "fp8_e5m2", "dynamic"),),
        "conv": (Choice("fp8_e5m2", "fp8_e4m3_tensor", "static"),),
        "embedding": (Choice("fp8_e5m2", "float32"),),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "TARGETS", (replace(REFERENCE, choices=offered),))
        yield format_named("fp8_e5m2")
    plugins.forget()


def test_codes_of_one_more_format_are_the_casts_of_torch(e5m2):
    x = torch.randn(5, 70) * torch.logspace(-6, 3, 70)
    q = quantize_weight(x, e5m2)
    assert q.scale.shape == (5, 1)
    assert torch.equal(q.scale, x.abs().amax(1, keepdim=True) / 57344)
    want = (x / q.scale).clamp(-57344, 57344).to(torch.float8_e5m2)
    assert torch.equal(q.codes.view(torch.uint8), want.view(torch.uint8))
    assert e5m2.storage_bits((5, 70)) == 5 * (70 * 8 + 32)


def test_the_ops_take_one_more_format(e5m2):
    x, w = quantize(torch.randn(4, 36), e5m2), quantize_weight(torch.randn(6, 36), e5m2)
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero)
    got = torch.ops.mpq.linear(*parts, None, e5m2.name, e5m2.name, torch.float32)
    values = dequantize(x, e5m2).double(), dequantize(w, e5m2).double()
    assert relative_rms(got, values[0] @ values[1].T) < 2**-24 * (1 + 36**0.5)
    table = (torch.tensor([5, 0]), w.codes, w.scale, w.zero, e5m2.name, torch.float32)
    assert torch.equal(torch.ops.mpq.embedding(*table), dequantize(w, e5m2)[[5, 0]])


class Pooled(nn.Module):
    """An embedding of bins, a convolution that reads what a pooling made, a linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(17, 8)
        self.first, self.conv = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, bins: torch.Tensor) -> torch.Tensor:
        x = self.first(self.table(bins).movedim(-1, 1)).relu()
        x = self.conv(nn.functional.max_pool2d(x, 2))
        return self.head(x.amax((2, 3)))


def test_a_net_is_planned_saved_and_run_in_one_more_format(e5m2, tmp_path, isolated):
    model = Pooled().eval()
    batches = [torch.randint(0, 17, (2, 12, 12)) for _ in range(4)]
    config = mpq_fx.Config(target="reference", tolerance=0.5, objective="size")
    plan = mpq_fx.tune(model, batches, config=config, progress=False)
    assert [c.weight for c in plan.choices.values()] == ["fp8_e5m2"] * 4
    plan.with_codes(model).save(tmp_path / "plan.json")
    loaded = mpq_fx.Plan.load(tmp_path / "plan.json")
    with torch.inference_mode():
        want = mpq_fx.apply(model, plan)(batches[0])
        torch.compiler.reset()
        assert torch.equal(mpq_fx.apply(model, loaded)(batches[0]), want)
        assert 0.001 < relative_rms(want, model(batches[0])) < 0.5
