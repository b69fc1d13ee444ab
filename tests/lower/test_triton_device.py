"""The target `triton` and devices: which one it is for, plans for absent ones, rooflines."""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import mpq_fx
from mpq_fx import passes
from mpq_fx.errors import ConfigError, UnsupportedError
from mpq_fx.facts import Choice, Site
from mpq_fx.graph import ops
from mpq_fx.passes import TARGETS, target_named
from mpq_fx.passes.lower import triton
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.passes.lower.target import available, placed
from mpq_fx.passes.lower.triton import TRITON
from mpq_fx.passes.lower.triton_device import DEVICES, LAUNCH, RESOLUTION, device_called, roofline
from mpq_fx.registry import bindings_of
from mpq_fx.report import headline, report_of
from tests.lowered import Lowered

BF16 = Choice("bfloat16", "bfloat16")
STATIC = Choice("int8", "uint8_tensor", "static")
DYNAMIC = Choice("int8", "int8", "dynamic")


def net_of() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 33), nn.Linear(33, 5)).eval()


def test_a_plan_for_an_absent_device_is_predicted_and_says_so(isolated, caplog, tmp_path):
    net, cache = net_of(), tmp_path / "cache"
    cache.mkdir()
    batches = [torch.randn(16, 24) for _ in range(4)]
    config = mpq_fx.Config(target="triton", device="h200", tolerance=0.05, cache_dir=cache)
    plan = mpq_fx.tune(net, batches, config=config, progress=False)
    assert "latency is predicted by a roofline of h200, not measured" in plan.notes
    assert plan.provenance["target"]["device"] == "h200"
    assert plan.provenance["target"]["latency"].startswith("roofline")
    assert plan.tables["latency"].metric == "a roofline of h200"
    assert not plan.latency_ms, "no race without the device"
    report = report_of([("graph 0", plan, "")])
    assert "End to end, without a race" in str(report)
    page = report.to_html(tmp_path / "report.html").read_text()
    assert "Each site predicted, not measured: " in page
    assert "timed alone" not in page
    assert "of the layers alone" in page
    assert "runs now: " in page, "the frontier shows where the plan is"
    assert " ms predicted, in float " in headline(plan)
    assert not list((tmp_path / "cache").iterdir()), "a prediction is no measurement to be kept"
    caplog.set_level(logging.WARNING, logger="mpq_fx")
    config = mpq_fx.Config(target="triton", device="a100")
    with torch.inference_mode():
        mpq_fx.apply(copy.deepcopy(net), plan, config=config)(batches[0])
    assert "device h200, here a100" in caplog.text


def test_a_predicted_plan_is_measured_where_the_device_is(isolated, monkeypatch, tmp_path):
    net, batches = net_of(), [torch.randn(16, 24) for _ in range(4)]
    wishes = {"tolerance": 0.05, "objective": "size", "formats": [DYNAMIC.name]}
    config = mpq_fx.Config(target="triton", device="h100", **wishes)
    plan = mpq_fx.tune(net, batches, config=config, progress=False)
    timed = replace(triton.on(), is_timed=True, predicted="", on=None, convert=lambda *sites: 0.5)
    timed = replace(timed, measure=lambda site, choice: 2.0 if choice == DYNAMIC else 3.0)
    monkeypatch.setattr(passes, "TARGETS", (timed,))
    compiled = mpq_fx.apply(net, plan, config=mpq_fx.Config(target="triton", cache_dir=tmp_path))
    with torch.inference_mode():
        compiled(batches[0])
    (found,) = {id(b.plan): b.plan for _, b in bindings_of(compiled)}.values()
    assert [row.ms_after for row in found.ledger] == [2.5, 2.0, 2.0]
    assert found.baseline["latency"] == 9.5, "the first layer also pays for a pass over its input"
    assert found.choices == plan.choices, "what a plan says is not changed by applying it"
    assert "measured here; predicted were" in found.notes[-1]
    assert not any("predicted by" in note for note in found.notes)
    assert found.resolve(objective="latency", tolerance=0.05).choices
    assert list(tmp_path.iterdir()), "what was measured is kept"


def test_how_another_target_compiled_a_plan_means_nothing_here(isolated, monkeypatch):
    net, batches, modes = net_of(), [torch.randn(16, 24) for _ in range(3)], []
    config = mpq_fx.Config(target="triton", device="h100", tolerance=0.05)
    plan = mpq_fx.tune(net, batches, config=config, progress=False)
    ledger = tuple(replace(row, mode="int8 templates") for row in plan.ledger)
    target = triton.on("h100")

    def compile_in(gm, inputs, mode):
        modes.append(mode)
        return target.compile(gm, inputs, mode)

    monkeypatch.setattr(passes, "TARGETS", (replace(target, on=None, compile=compile_in),))
    moved = replace(plan, target="cpu", ledger=ledger)
    with torch.inference_mode():
        mpq_fx.apply(net, moved, config=mpq_fx.Config(target="triton"))(batches[0])
    assert modes == [""]


def test_a_report_says_that_a_plan_runs_on_another_target(isolated, tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    config = mpq_fx.Config(target="triton", device="h100", tolerance=0.05)
    plan = mpq_fx.tune(model, [torch.randn(4, 64) for _ in range(4)], config=config, progress=False)
    compiled = mpq_fx.apply(model, plan, config=mpq_fx.Config(target="reference"))
    with torch.inference_mode():
        compiled(torch.randn(4, 64))
    report = mpq_fx.explain(compiled)
    said = "runs on target reference here; kernels and milliseconds below are those of triton"
    assert said in " ".join(str(report).split())
    assert said in report.to_html(tmp_path / "report.html").read_text()
    assert said in report.to_json()
    (entry,) = report.entries
    assert entry.plan is plan, "what is saved is the plan as it was made"
    assert not replace(entry, place="").elsewhere


def test_without_interpreter_and_gpu_a_named_device_is_planned_on_the_reference(
    isolated, monkeypatch
):
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target = target_named("triton", "h100")
    assert not target.unavailable()
    found = Lowered(net_of(), torch.randn(3, 24), DYNAMIC, target=target)
    assert "mpq.linear" in ops(found.folded.gm)
    assert "mpq_triton" not in ops(found.folded.gm)
    assert set(found.kernels.values()) == {"mpq_triton.int8_linear"}, "it would run there"
    assert found.error() == 0.0
    reason = target_named("triton").unavailable()
    assert "PyTorch sees no NVIDIA GPU" in reason
    assert '"device": "h100"' in reason
    assert "TRITON_INTERPRET=1" in reason
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET"):
        available(target_named("triton"))


@pytest.mark.parametrize("on_error", ["raise", "float"])
def test_a_target_that_cannot_run_here_is_refused_at_the_first_call(
    isolated, monkeypatch, on_error
):
    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"target": "triton", "on_error": on_error}
    compiled = torch.compile(net_of(), backend="mpq", options=options)
    refused = (
        pytest.raises(UnsupportedError, match="no NVIDIA GPU") if on_error == "raise" else None
    )
    with torch.inference_mode(), refused or nullcontext():
        compiled(torch.randn(3, 24))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": "triton", "device": "h10"}, "unknown device 'h10'"),
        ({"target": "triton", "device": ""}, "unknown device ''"),
        ({"target": "cpu", "device": "h100"}, "target 'cpu' plans for the machine at hand only"),
        ({"target": "reference", "device": "h100"}, "target 'reference' plans for the machine"),
        ({"device": "h100"}, "plans for the machine at hand only"),
    ],
)
def test_a_device_has_to_be_known_and_of_a_target_that_plans_for_it(isolated, options, error):
    config = mpq_fx.Config(**options)
    with pytest.raises(ConfigError, match=error) as found:
        mpq_fx.tune(net_of(), [torch.randn(2, 24)], config=config, progress=False)
    assert "h100" in found.value.fix


def test_a_target_made_of_another_does_not_turn_into_that_one_on_a_device():
    made = replace(TRITON, name="mine", choices={"linear": (BF16,)})
    for device in (None, "h100"):
        with pytest.raises(ConfigError, match="'mine' has the `on` of target 'triton'"):
            placed(made, device)
    alone = replace(made, on=None)
    assert placed(alone, None) is alone


def test_auto_takes_a_target_that_computes_where_the_model_is(monkeypatch):
    assert target_named("auto").name == "cpu"
    assert target_named("auto", tensors="cuda").name in ("triton", "reference")
    with pytest.raises(UnsupportedError, match="'cpu' computes on cpu, and the model is on cuda"):
        available(ONEDNN, "cuda")
    assert available(REFERENCE, "cuda") is REFERENCE
    assert [target.name for target in TARGETS] == ["cpu", "triton", "reference"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_at_hand_is_known_by_its_name(words, name):
    found = device_called(words)
    assert (found and found.name) == name


def site(m=64, n=4096, k=4096, op="linear", **facts) -> Site:
    return Site(op, op, op, input_shape=(m, k), weight_shape=(n, k), macs=m * n * k, **facts)


def test_a_roofline_is_bound_by_memory_for_few_rows_and_by_arithmetic_for_many():
    h100 = DEVICES["h100"]
    few, many = (roofline(site(m), BF16, h100) - LAUNCH for m in (1, 8192))
    assert few == pytest.approx(2 * 4096**2 / 3352e9 * 1e3, abs=RESOLUTION)
    assert many == pytest.approx(2 * 8192 * 4096**2 / 989e12 * 1e3, rel=0.01)
    for m in (1, 64, 8192):
        for device in DEVICES.values():
            fast, slow = (roofline(site(m), c, device) for c in (DYNAMIC, BF16))
            if device.name != "b200" or m < 8192:
                assert fast < slow, (m, device.name)
    once = replace(site(64), input_shape=(1, 4096))
    assert roofline(once, BF16, h100) == roofline(site(1), BF16, h100), "the rows of this call"
    assert roofline(site(1, 16, 512), DYNAMIC, h100) == roofline(site(1, 16, 512), BF16, h100)
    h200 = DEVICES["h200"]
    assert roofline(site(1), BF16, h200) < roofline(site(1), BF16, h100)
    assert roofline(site(8192), BF16, h200) == roofline(site(8192), BF16, h100)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", triton.CHOICES)
def test_every_choice_of_every_op_has_a_predicted_time(device, op):
    target = target_named("triton", device)
    for choice in target.choices[op]:
        if refused := list(target.refuse(site(op=op), choice)):
            assert choice.weight == "fp8_e4m3", refused
            assert "float8" not in DEVICES[device].peak
            continue
        assert 0 < target.measure(site(op=op), choice) < 100
        assert target.convert(site(op=op), None, choice) >= 0


def test_codes_that_a_linear_writes_cost_no_pass():
    target = target_named("triton", "h100")
    assert target.convert(site(), STATIC, STATIC) == 0.0
    assert target.convert(site(), None, BF16) == 0.0
    assert target.convert(site(), STATIC, DYNAMIC) > 0.0
    assert target.convert(site(), BF16, STATIC) > 0.0
    assert target.convert(site(8192), None, STATIC) > target.convert(site(8192), BF16, STATIC)


@pytest.mark.parametrize(
    ("choice", "facts", "reason"),
    [
        (
            Choice("int4_asym", "int8", "dynamic"),
            {},
            "triton has no kernel for linear in int4_asym",
        ),
        (STATIC, {"dtype": "float64"}, "a site in float64 stays as it is"),
        (STATIC, {"k": 70_000}, "int8_linear: int32 sums of 70000 products"),
    ],
)
def test_what_no_kernel_runs_is_refused_with_the_reason(choice, facts, reason):
    refused = list(target_named("triton", "h100").refuse(site(**facts), choice))
    assert any(reason in said for said in refused)
