"""The target-neutral quantized form: one line per rewrite, and the numbers of the replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mpq_fx.facts import Choice
from mpq_fx.formats import format_named
from mpq_fx.graph import ops, run_passes, value
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.analyze.observe import observe, static_scales
from mpq_fx.passes.rewrite import rewrite
from mpq_fx.passes.rewrite.cancel_casts import cancel_casts, sink_casts
from mpq_fx.passes.rewrite.merge_linear import merge_linear
from mpq_fx.passes.rewrite.merge_quantize import merge_quantize
from tests.architectures import values
from tests.passes.conftest import BF16, DYNAMIC, STATIC, WEIGHT_ONLY, subject
from tests.toy_backend import graph_of

FLOAT = Choice("float32", "float32")
ITEMS = "getitem getitem getitem"
WEIGHT = f"mpq.quantize_weight {ITEMS}"
GOLDEN = {
    FLOAT: "linear gelu linear add relu argmax",
    BF16: "to to linear to gelu linear add relu argmax",
    DYNAMIC: f"mpq.quantize_dynamic {ITEMS} {WEIGHT} mpq.linear gelu linear add relu argmax",
    STATIC: f"mpq.quantize {WEIGHT} mpq.linear gelu linear add relu argmax",
    WEIGHT_ONLY: f"to {WEIGHT} mpq.linear gelu linear add relu argmax",
}


def scales_of(subject):
    formats = [format_named(name) for name in ("uint8_tensor", "int8_tensor")]
    return static_scales(observe(subject.replay(), subject.calls), formats)


def rewritten(subject, choices, scales=None):
    gm = subject.copy
    rewrite(gm, subject.sites, choices, scales or {})
    return gm


@pytest.mark.parametrize("choice", GOLDEN, ids=str)
def test_one_site_becomes_its_quantized_form(net, choice):
    first = net.sites[0].name
    gm = rewritten(net, {first: choice}, scales_of(net))
    assert ops(gm) == GOLDEN[choice]


@pytest.mark.parametrize("choice", GOLDEN, ids=str)
def test_the_quantized_form_computes_what_the_replay_predicts(net, choice):
    scales = scales_of(net)
    choices = {site.name: choice for site in net.sites}
    gm = rewritten(net, choices, scales)
    replay = replace(net.replay(), scales=scales)
    for call in net.calls:
        found, predicted, exact = gm(*call)[0], replay.run(call, choices)[0], net.gm(*call)[0]
        assert relative_rms(found, predicted) < 2e-6
        assert (relative_rms(found, exact) > 1e-5) == (choice != FLOAT)


def test_the_number_of_sites_changed_is_returned_and_float_is_no_change(net):
    up, down = (site.name for site in net.sites)
    assert rewrite(net.copy, net.sites, {up: DYNAMIC, down: FLOAT}, {}) == 1
    assert rewrite(net.copy, net.sites, {up: DYNAMIC, down: BF16}, {}) == 2


def test_a_result_keeps_the_dtype_that_its_readers_saw(net):
    for choice in (BF16, DYNAMIC, WEIGHT_ONLY):
        gm = rewritten(net, {site.name: choice for site in net.sites})
        assert [y.dtype for y in gm(*net.calls[0])] == [torch.float32, torch.int64]


# --- q/k/v -------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [BF16, DYNAMIC, STATIC, WEIGHT_ONLY], ids=str)
def test_merged_linears_equal_the_unmerged_ones_bit_for_bit(qkv, choice, monkeypatch):
    scales = {
        (s.name, "uint8_tensor"): v for s, v in zip(qkv.sites, [shared(qkv)] * 3, strict=True)
    }
    choices = {site.name: choice for site in qkv.sites}
    merged = rewritten(qkv, choices, scales)
    monkeypatch.setattr("mpq_fx.passes.rewrite.merge_linear", lambda *_: 0)
    apart = rewritten(qkv, choices, scales)
    assert ops(merged).count("linear") == 1
    assert ops(apart).count("linear") == 3
    for call in qkv.calls:
        for found, wanted in zip(merged(*call), apart(*call), strict=True):
            assert torch.equal(found, wanted)


def shared(qkv):
    return next(iter(scales_of(qkv).values()))


def test_linears_that_choose_differently_or_stay_float_are_not_merged(qkv):
    q, k, v = (site.name for site in qkv.sites)
    for choices in ({q: DYNAMIC, k: BF16}, {q: FLOAT, k: FLOAT, v: FLOAT}, {}):
        assert merge_linear(qkv.copy, qkv.sites, choices) == 0
    gm = qkv.copy
    for node in gm.graph.nodes:
        node.meta.setdefault("mpq_site", (node.name,))
    assert merge_linear(gm, qkv.sites, {q: DYNAMIC, v: DYNAMIC, k: BF16}) == 1


def test_one_tensor_is_quantized_once_for_all_its_readers(qkv, monkeypatch):
    monkeypatch.setattr("mpq_fx.passes.rewrite.merge_linear", lambda *_: 0)
    choices = {site.name: DYNAMIC for site in qkv.sites}
    assert ops(rewritten(qkv, choices)).count("mpq.quantize_dynamic") == 1
    q, k, _ = (site.name for site in qkv.sites)
    scales = {(q, "uint8_tensor"): shared(qkv), (k, "uint8_tensor"): shared(qkv)}
    line = ops(rewritten(qkv, {q: STATIC, k: STATIC}, scales))
    assert line.split().count("mpq.quantize") == 1
    scale, zero = shared(qkv)
    scales[k, "uint8_tensor"] = scale * 2, zero
    line = ops(rewritten(qkv, {q: STATIC, k: STATIC}, scales))
    assert line.split().count("mpq.quantize") == 2, "other scales are other codes"


# --- casts -------------------------------------------------------------------------------------

HALF, WIDE = torch.bfloat16, torch.float32
to = torch.ops.aten.to.dtype
CASTS = {
    "there and back": (lambda x: to(to(x, WIDE), HALF) * 2, "mul"),
    "behind views": (
        lambda x: to(to(x, WIDE).view(4, -1).transpose(0, 1), HALF) * 2,
        "view transpose mul",
    ),
    "narrowed to another": (lambda x: to(to(x, WIDE), torch.float16) * 2, "to to mul"),
    "read in between": (lambda x: to(to(x, WIDE).exp(), HALF) * 2, "to exp to mul"),
}


@pytest.mark.parametrize(("function", "line"), CASTS.values(), ids=CASTS)
def test_a_widening_cast_that_is_narrowed_again_goes_away(function, line):
    x = values(8, 6).to(HALF)
    gm = graph_of(lambda x: (function(x),), [x])
    wanted = gm(x)[0]
    run_passes(gm, (sink_casts, cancel_casts))
    assert ops(gm) == line
    assert torch.equal(gm(x)[0], wanted)
    assert cancel_casts(gm) == sink_casts(gm) == 0


def test_narrowing_and_widening_again_loses_bits_and_stays():
    gm = graph_of(lambda x: (to(to(x, HALF), WIDE) * 2,), [values(4, 4)])
    assert run_passes(gm, (sink_casts, cancel_casts)) == [("sink_casts", 0), ("cancel_casts", 0)]
    assert ops(gm) == "to to mul"


def test_equal_casts_of_one_tensor_become_one():
    gm = graph_of(
        lambda x: (to(x, HALF) * 2, to(x, HALF) * 3, to(x, torch.float16)), [values(4, 4)]
    )
    run_passes(gm, (merge_quantize,))
    assert ops(gm).split().count("to") == 2


def attended(x, query, key, value):
    heads = (
        torch.nn.functional.linear(x, w).unflatten(-1, (4, 8)).transpose(0, 1)
        for w in (query, key, value)
    )
    return (torch.nn.functional.scaled_dot_product_attention(*heads),)


def test_the_casts_of_attention_move_in_front_of_the_slices_into_one(isolated):
    net = subject(attended, [values(32, 32) + k for k in range(3)], 4, 32)
    choices = {s.name: BF16 if s.op == "attention" else STATIC for s in net.sites}
    gm = rewritten(net, choices, scales_of(net))
    (joined,) = [n for n in gm.graph.nodes if n.target is torch.ops.mpq.linear.default]
    (cast,) = joined.users
    assert value(cast).dtype == torch.bfloat16
    assert len(cast.users) == 3
    exact = net.gm(*net.calls[0])[0]
    assert relative_rms(gm(*net.calls[0])[0], exact) < 0.05
