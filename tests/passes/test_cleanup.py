"""The clean-up behind a rewrite: each pass alone changes no value, and what it is there for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mpq_fx.graph import check, clone, ops, remove_dead, signature_of
from mpq_fx.passes.analyze.observe import observe, static_scales
from mpq_fx.passes.rewrite import CLEANUP, rewrite
from mpq_fx.passes.rewrite.cancel_quantize import cancel_quantize
from mpq_fx.passes.rewrite.hoist import hoist_narrowing
from tests.architectures import values
from tests.passes.conftest import BF16, STATIC, UINT8, subject


def pooled(x, first, second):
    """A pooling and a view between two convolutions."""
    y = functional.max_pool2d(torch.relu(functional.conv2d(x, first)), 2)
    return (functional.conv2d(y, second),)


def residual(x, first, second, third):
    """A sum that the next convolution and the next sum both read."""
    y = torch.relu(functional.conv2d(x, first) + x)
    return (torch.relu(functional.conv2d(y, second) + y), functional.conv2d(y, third))


def chain(x, up, down):
    return (functional.linear(functional.linear(x, up).unflatten(-1, (2, 12)).flatten(-2), down),)


WEIGHT = values(4, 4, 1, 1)
SUBJECTS = {
    "pooled": subject(pooled, (values(6, 4, 3, 3), values(5, 6, 1, 1)), 2, 4, 12, 12),
    "residual": subject(residual, (WEIGHT, WEIGHT * 0.5, WEIGHT - 0.1), 2, 4, 6, 6),
    "chain": subject(chain, (values(24, 16), values(16, 24)), 5, 16),
}


def rewritten(net, choice, monkeypatch):
    """With no clean-up at all."""
    names = ",".join({apply.__name__ for apply in CLEANUP})
    with torch.no_grad():
        scales = static_scales(observe(net.replay(), net.calls), [UINT8])
    gm = net.copy
    with monkeypatch.context() as patch:
        patch.setenv("MPQ_SKIP", names)
        rewrite(gm, net.sites, {site.name: choice for site in net.sites}, scales)
    return gm


@pytest.mark.parametrize("apply", dict.fromkeys(CLEANUP), ids=lambda apply: apply.__name__)
@pytest.mark.parametrize("choice", [BF16, STATIC], ids=str)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_pass_alone_changes_no_value(name, choice, apply, monkeypatch):
    net = SUBJECTS[name]
    gm = rewritten(net, choice, monkeypatch)
    before, _ = clone(gm)
    signature = signature_of(gm)
    apply(gm)
    remove_dead(gm)
    check(gm, signature, apply.__name__)
    with torch.no_grad():
        for call in net.calls:
            for got, want in zip(gm(*call), before(*call), strict=True):
                assert torch.equal(got, want)


def test_a_quantization_moves_in_front_of_the_pooling(monkeypatch):
    gm = rewritten(SUBJECTS["pooled"], STATIC, monkeypatch)
    assert "max_pool2d mpq.quantize" in ops(gm)
    assert hoist_narrowing(gm) == 1
    remove_dead(gm)
    assert "mpq.quantize max_pool2d" in ops(gm)


def test_a_site_reads_the_codes_of_a_residual_that_is_stored_in_its_own_format(monkeypatch):
    net = SUBJECTS["residual"]
    gm = rewritten(net, STATIC, monkeypatch)
    before = ops(gm).count("mpq.quantize ")
    assert cancel_quantize(gm) > 0
    remove_dead(gm)
    assert ops(gm).count("mpq.quantize ") < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_residual_that_is_stored_as_codes_keeps_its_dtype(dtype, monkeypatch):
    weights = [w.to(dtype) for w in (WEIGHT, WEIGHT * 0.5, WEIGHT - 0.1)]
    net = subject(lambda x, *w: residual(x.to(dtype), *w), weights, 2, 4, 6, 6)
    kept = {site.name: STATIC for site in net.sites if site.op == "residual"}
    scales = static_scales(observe(net.replay(), net.calls), [UINT8])
    gm = net.copy
    assert rewrite(gm, net.sites, kept, scales) == len(kept) > 0
    predicted = net.replay(scales=scales)
    for call in net.calls:
        for got, want in zip(gm(*call), predicted.run(call, kept), strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, want)
    assert cancel_quantize(rewritten(net, STATIC, monkeypatch)) > 0
