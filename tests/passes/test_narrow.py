"""bfloat16 between sites: what changes, what must not, and that it is `model.bfloat16()`."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mpq_fx.capture import capture
from mpq_fx.graph import arguments, clone, mark_weights, output_of, value
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.analyze.observe import observe, static_scales
from mpq_fx.passes.analyze.replay import run_in
from mpq_fx.passes.rewrite import rewrite
from mpq_fx.passes.rewrite.narrow import narrow
from tests.architectures import values
from tests.passes.conftest import BF16, STATIC, UINT8, Subject, subject


def block(x, norm, up, down):
    y = functional.layer_norm(x, (16,), norm)
    y = functional.linear(functional.silu(functional.linear(y, up)), down)
    return (torch.softmax(x + y, -1), y.argmax(-1))


@pytest.fixture
def net() -> Subject:
    return subject(block, (values(16), values(24, 16), values(16, 24)), 5, 16)


def narrowed(net: Subject, choice):
    gm, sites = net.copy, net.sites
    own = {node.name for node in gm.graph.nodes}
    scales = static_scales(observe(net.replay(), net.calls), [UINT8])
    rewrite(gm, sites, {site.name: choice for site in sites}, scales)
    wide, _ = clone(gm)
    return gm, wide, narrow(gm, torch.bfloat16, own)


def test_every_value_between_sites_is_narrow_and_the_signature_stays(net):
    gm, wide, changed = narrowed(net, BF16)
    assert changed > 0
    floats = [n for n in gm.graph.nodes if n.op == "call_function" and is_float(n)]
    results = set(arguments(output_of(gm))[0])
    assert {value(n).dtype for n in floats if n not in results} == {torch.bfloat16}
    for mine, other in zip(gm(*net.calls[0]), wide(*net.calls[0]), strict=True):
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape


def test_it_is_the_model_in_bfloat16(net):
    gm, _, _ = narrowed(net, BF16)
    for call in net.calls:
        wanted = run_in(net.replay(), call, torch.bfloat16)[0]
        assert wanted.dtype == torch.bfloat16
        assert torch.equal(gm(*call)[0], wanted.float())


def test_codes_are_rounded_from_the_float_weight_and_scales_stay(net):
    gm, wide, _ = narrowed(net, STATIC)
    weights = [n for n in gm.graph.nodes if "quantize_weight" in str(n.target)]
    assert len(weights) == 2
    assert {value(n.args[0]).dtype for n in weights} == {torch.float32}
    scales = [n for n in gm.graph.nodes if n.op == "get_attr" and is_float(n)]
    assert {value(n).dtype for n in scales} == {torch.float32}
    call = net.calls[0]
    exact = net.gm(*call)[0]
    assert relative_rms(gm(*call)[0], exact) < relative_rms(wide(*call)[0], exact) + 0.02


def test_a_cast_of_the_user_stays_and_what_it_widens_is_wide():
    def upcast(x, w):
        y = functional.linear(x.to(torch.bfloat16), w)
        return (torch.tanh(y.to(torch.float32)).to(torch.bfloat16),)

    net = subject(upcast, (values(16, 16).bfloat16(),), 5, 16)
    gm, own = net.copy, {node.name for node in net.gm.graph.nodes}
    narrow(gm, torch.bfloat16, own)
    (tanh,) = (n for n in gm.graph.nodes if "tanh" in str(n.target))
    assert value(tanh).dtype == torch.float32
    assert torch.equal(gm(*net.calls[0])[0], net.gm(*net.calls[0])[0])


def test_an_input_that_is_written_keeps_its_dtype():
    def cached(x, kept):
        kept.copy_(x * 2)
        return (x.relu(),)

    seen = []
    torch.compile(cached, backend=lambda gm, inputs: seen.append((gm, inputs)) or gm.forward)(
        torch.randn(3), torch.zeros(3)
    )
    captured = capture(*seen[0])
    mark_weights(captured.gm, ())
    narrow(captured.gm, torch.bfloat16, {n.name for n in captured.gm.graph.nodes})
    x, kept = torch.randn(3), torch.zeros(3)
    given = {"x": x, "kept": kept}
    names = [n.name for n in captured.gm.graph.find_nodes(op="placeholder")]
    order = [next(v for k, v in given.items() if k in name) for name in names]
    outputs = captured.gm(*order)
    assert all(y is None or y.dtype == torch.float32 for y in outputs)
    assert relative_rms(kept, x * 2) < 0.01


def is_float(node) -> bool:
    return isinstance(value(node), torch.Tensor) and value(node).is_floating_point()
