"""Models that are not in float32: in 16 bits themselves, and under autocast."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.lower import cpu
from mpq_fx.registry import bindings_of
from tests.small import Net, batch, compiled_of


def half(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    with torch.inference_mode(False):
        return batch(seed).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_16_bits_may_err_as_much_as_it_does_against_float32(isolated, dtype):
    model, wide = Net().eval().to(dtype), Net().eval()
    compiled = compiled_of(model, tolerance="bf16")
    with torch.inference_mode():
        for seed in range(4):
            compiled(half(seed, dtype))
        x = half(9, dtype)
        own = relative_rms(model(x).float(), wide(x.float()))
        found = compiled(x)
    ((_, binding),) = bindings_of(compiled)
    assert binding.installed is not None, binding.reason
    assert binding.plan.tolerance == pytest.approx(own, rel=0.5)
    assert found.dtype == dtype
    assert relative_rms(found.float(), model(x).float()) <= 1.5 * binding.plan.tolerance
    assert {row.site.dtype for row in binding.plan.ledger} == {str(dtype).removeprefix("torch.")}


def test_a_model_in_bfloat16_can_be_quantized(isolated):
    model = Net().eval().bfloat16()
    config = mpq_fx.Config(target="reference", tolerance=0.2, formats=["int8/dynamic"])
    plan = mpq_fx.tune(model, [half(k) for k in range(4)], config=config, progress=False)
    assert {choice.name for choice in plan.choices.values()} == {"int8/dynamic"}
    with torch.inference_mode():
        found, wanted = mpq_fx.apply(model, plan)(half(9)), model(half(9))
    assert found.dtype == torch.bfloat16
    assert 0.0 < relative_rms(found.float(), wanted.float()) < 0.2


@pytest.mark.parametrize("enabled", [True, False], ids=["autocast", "plain"])
def test_under_autocast_results_have_the_dtype_and_the_values_of_eager(isolated, enabled):
    model = Net().eval()
    compiled = compiled_of(model, formats=["int8/dynamic"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        for seed in range(4):
            compiled(batch(seed))
        found, wanted = compiled(batch(9)), model(batch(9))
    ((_, binding),) = bindings_of(compiled)
    assert binding.installed is not None, binding.reason
    assert found.dtype == wanted.dtype
    assert 0.0 < relative_rms(found.float(), wanted.float()) < 0.1
    dtype = "bfloat16" if enabled else "float32"
    assert {row.site.dtype for row in binding.plan.ledger} == {dtype}


def test_autocast_and_plain_calls_of_one_model_are_two_plans(isolated):
    model = Net().eval()
    compiled = compiled_of(model)
    for enabled in (True, False) * 4:
        context = torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()
        with torch.inference_mode(), context:
            wanted = model(batch(1))
            assert compiled(batch(1)).dtype == wanted.dtype
    assert len(bindings_of(compiled)) == 2


@pytest.mark.onednn
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_floats_that_onednn_packs_no_weights_of_run_by_pytorchs_own_ops(
    isolated, monkeypatch, dtype
):
    monkeypatch.setattr(cpu, "packs", lambda dtype: dtype == torch.float32)
    layers = nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 36, 20)
    model = nn.Sequential(*layers).eval().to(dtype)
    images = [torch.randn(2, 3, 8, 8).to(dtype) for _ in range(4)]
    config = mpq_fx.Config(target="cpu", formats=["float32"])
    plan = mpq_fx.tune(model, images, config=config, progress=False)
    assert {row.choice for row in plan.ledger} == {str(dtype).removeprefix("torch.")}
    with torch.inference_mode():
        found = mpq_fx.apply(model, plan)(images[0])
        assert relative_rms(found.float(), model(images[0]).float()) <= 0.01
