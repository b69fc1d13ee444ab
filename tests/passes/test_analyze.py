"""Replays, statistics and the error table against the slow and obvious computation."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from mpq_fx.errors import CalibrationError
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.numerics import fake_quantize
from mpq_fx.passes.analyze import replay as replay_module
from mpq_fx.passes.analyze.cost import latency, sizes
from mpq_fx.passes.analyze.edges import find_edges
from mpq_fx.passes.analyze.metric import Task, on_pace
from mpq_fx.passes.analyze.metrics.measured_singles import measured_singles
from mpq_fx.passes.analyze.observe import (
    observe,
    static_scales,
    statistics,
)
from mpq_fx.passes.analyze.replay import output_error, run_in
from mpq_fx.passes.lower.aten_cost import attention
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.problem import total
from tests.architectures import values
from tests.passes.conftest import subject

FLOAT, BF16 = Choice("float32", "float32"), Choice("bfloat16", "bfloat16")
DYNAMIC, STATIC = Choice("int8", "int8", "dynamic"), Choice("int8", "uint8_tensor", "static")
LINEAR = Site("a", "linear", "a")
UINT8 = format_named("uint8_tensor")


def seen(x: torch.Tensor, op: str = "linear"):
    return statistics(x, replace(LINEAR, op=op))


# --- replay ------------------------------------------------------------------------------------


def test_a_replay_without_choices_is_the_graph(net):
    replay = net.replay()
    for call in net.calls:
        for found, wanted in zip(replay.run(call, {}), net.gm(*call), strict=True):
            assert torch.equal(found, wanted)


def test_a_replay_keeps_nothing_but_constants_and_outputs(net):
    replay = net.replay()
    env = replay.start(net.calls[0])
    for node in replay.gm.graph.nodes:
        if node.op != "output":
            replay.step(env, node, {})
    outputs = set(next(iter(reversed(replay.gm.graph.nodes))).all_input_nodes)
    assert set(env) <= outputs | set(replay.constants)


def test_a_choice_computes_its_site_as_fake_quantization_says(net):
    up, down = net.sites
    x, w_up, w_down, bias = net.calls[0]
    y = fake_quantize(x, format_named("int8")) @ fake_quantize(w_up, format_named("int8")).T
    wanted = torch.nn.functional.gelu(y) @ w_down.T + bias
    found = net.replay().run(net.calls[0], {up.name: DYNAMIC})
    torch.testing.assert_close(found[0], torch.relu(x + wanted))
    assert down.op == "linear"


def test_the_yardstick_is_the_function_in_bfloat16(net):
    x, *weights = net.calls[0]
    halves = net.gm(x.bfloat16(), *(w.bfloat16() for w in weights))
    found = run_in(net.replay(), net.calls[0], torch.bfloat16)
    assert torch.equal(found[0], halves[0])


def test_the_error_is_the_worst_over_floating_and_complex_outputs():
    ref = [torch.ones(4), torch.arange(3), torch.ones(2, dtype=torch.complex64), torch.empty(0)]
    off = [torch.ones(4) * 1.1, torch.arange(3) + 5, ref[2] * (1 + 0.2j), torch.empty(0)]
    assert output_error(off, ref) == pytest.approx(0.2)
    assert output_error(off, ref, frozenset({2})) == pytest.approx(0.1)
    assert output_error(off, ref, frozenset({0, 2})) == 0.0


# --- the error table ---------------------------------------------------------------------------


def test_singles_with_a_shared_prefix_equal_one_replay_per_choice(net):
    replay = net.replay()
    observed = observe(replay, net.calls)
    replay = replace(replay, scales=static_scales(observed, [UINT8]))
    options = {site.name: (FLOAT, BF16, DYNAMIC, STATIC) for site in net.sites}
    table = measured_singles(Task(replay, options, net.calls))
    for site in net.sites:
        for choice in options[site.name]:
            errors = [
                output_error(replay.run(call, {site.name: choice}), replay.run(call, {})) ** 2
                for call in net.calls
            ]
            key = site.name, choice.name
            assert table.values[key] == pytest.approx(sum(errors) / len(errors), rel=1e-9)
            assert table.spread[key] == pytest.approx(max(errors) - min(errors), rel=1e-9)
    assert all(table.values[site.name, FLOAT.name] == 0.0 for site in net.sites)
    assert all(table.values[site.name, DYNAMIC.name] > 0.0 for site in net.sites)
    assert table.provenance["records"] == 3


def test_tied_sites_are_measured_together_and_share_the_noise(net):
    tie = tuple(site.name for site in net.sites)
    options = dict.fromkeys(tie, (FLOAT, BF16))
    table = measured_singles(Task(net.replay(), options, net.calls, ties=[tie]))
    replay = net.replay()
    errors = [
        output_error(replay.run(call, dict.fromkeys(tie, BF16)), replay.run(call, {}))
        for call in net.calls
    ]
    joint = sum(error**2 for error in errors) / len(errors)
    assert sum(table.values[name, BF16.name] for name in tie) == pytest.approx(joint, rel=1e-9)


# --- the latency table -------------------------------------------------------------------------


def read_through(x, first, second, third):
    """first -> relu -> second is an edge; third reads what two others read as well."""
    y = functional.linear(torch.relu(functional.linear(x, first)), second)
    return (functional.linear(y, third) + y,)


def test_an_edge_joins_two_sites_where_nobody_else_reads_what_lies_between():
    net = subject(read_through, [values(32, 32) for _ in range(3)], 4, 32)
    first, second, _ = (site.name for site in net.sites)
    assert find_edges(net.gm, net.sites) == {second: first}


def test_conversions_are_single_terms_unless_they_lie_on_an_edge(net, tmp_path):
    first, second = net.sites
    target = replace(
        REFERENCE,
        measure=lambda site, choice: 2.0,
        convert=lambda site, before, after: (
            0.5 if before is None else 0.25 * (before.activation != after.activation)
        ),
    )
    options = {site.name: (FLOAT, BF16) for site in net.sites}
    edges = {second.name: first.name}
    table = latency(tuple(net.sites), options, target, edges=edges, cache_dir=tmp_path)
    assert {table.values[first.name, c.name] for c in (FLOAT, BF16)} == {2.5}
    assert {table.values[second.name, c.name] for c in (FLOAT, BF16)} == {2.0}
    assert table.pairs == {
        (first.name, FLOAT.name, second.name, BF16.name): 0.25,
        (first.name, BF16.name, second.name, FLOAT.name): 0.25,
    }
    again = latency(tuple(net.sites), options, target, edges=edges, cache_dir=tmp_path)
    assert (again.provenance["measured"], again.values) == (0, table.values)


def test_milliseconds_of_plug_ins_are_neither_kept_nor_taken_from_the_disk(net, tmp_path):
    sites, options = tuple(net.sites), {site.name: (FLOAT, BF16) for site in net.sites}

    def measured(ms: float, unkept: dict) -> dict:
        target = replace(REFERENCE, measure=lambda *_: ms, unkept=unkept)
        return latency(sites, options, target, cache_dir=tmp_path).values

    name, plug_in = sites[0].name, {"linear": (BF16,)}
    assert measured(2.0, {})[name, BF16.name] == 2.0
    with_plug_in = measured(1.0, plug_in)
    assert (with_plug_in[name, FLOAT.name], with_plug_in[name, BF16.name]) == (2.0, 1.0)
    assert measured(3.0, {})[name, BF16.name] == 2.0, "and what was kept stays"


def test_a_tensor_that_tied_sites_read_is_converted_once(net, tmp_path):
    target = replace(REFERENCE, measure=lambda *_: 1.0, convert=lambda *_: 0.5)
    options = {site.name: (FLOAT, BF16) for site in net.sites}
    tie = tuple(options)
    table = latency(tuple(net.sites), options, target, ties=[tie], cache_dir=tmp_path)
    assert [table.values[name, BF16.name] for name in tie] == [1.5, 1.0]


def test_past_the_deadline_the_table_rests_on_one_call_and_says_so(net):
    options = {site.name: (FLOAT, BF16) for site in net.sites}
    table = measured_singles(Task(net.replay(), options, net.calls, deadline=time.monotonic() - 1))
    assert (table.provenance["records"], table.provenance["of"]) == (1, 3)
    assert set(table.values) == {(s.name, c.name) for s in net.sites for c in (FLOAT, BF16)}


def test_without_time_the_first_of_each_kind_is_measured_and_the_rest_takes_its_error(net):
    options = {site.name: (FLOAT, BF16) for site in net.sites}
    first, *others = (site.name for site in net.sites)
    full = measured_singles(Task(net.replay(), options, net.calls[:1]))
    table = measured_singles(Task(net.replay(), options, net.calls, deadline=time.monotonic() - 1))
    assert table.provenance["estimated"] == sorted(others)
    assert others
    assert full.provenance["estimated"] == []
    assert {table.values[name, BF16.name] for name in options} == {full.values[first, BF16.name]}


def test_sites_are_left_out_evenly_when_time_is_short(monkeypatch):
    """Each measurement takes one tick, and there are ten for twenty units."""
    ticks = iter(range(100))
    kinds = {(f"s{k}",): ("linear",) for k in range(20)}
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    is_wanted = on_pace(kinds, 0.0, 10.0)
    taken = []
    for k, unit in enumerate(kinds):
        if is_wanted(unit):
            taken.append(k)
            now[0] = 1.0 + next(ticks)
    assert len(taken) == 11  # the first is measured whatever it takes
    assert max(b - a for a, b in itertools.pairwise(taken)) <= 3


# --- statistics --------------------------------------------------------------------------------


def test_statistics_are_those_of_all_calls_together(net):
    observed = observe(net.replay(), net.calls)
    first = net.sites[0]
    x = torch.cat([call[0] for call in net.calls])
    found = observed[first.name]
    assert (found.minimum, found.maximum) == (x.min().item(), x.max().item())
    assert found.mean == pytest.approx(x.mean().item(), abs=1e-6)
    assert found.variance == pytest.approx(x.var(correction=0).item(), rel=1e-5)
    assert torch.equal(found.channel_absmax, x.abs().amax(0))
    assert torch.equal(found.token_absmax, x.abs().amax(1))
    assert found.calls == 3
    assert set(observed) == {site.name for site in net.sites}


def test_channels_of_a_convolution_are_its_second_dimension():
    x = torch.ones(2, 3, 4, 4)
    x[:, 1] = 9.0
    found = seen(x, "conv")
    assert found.channel_absmax.tolist() == [1.0, 9.0, 1.0]
    assert found.token_absmax.shape == (2 * 4 * 4,)


def test_the_outlier_score_is_the_loudest_channel_over_the_median():
    x = torch.ones(5, 8)
    x[2, 3], x[1, 6] = -50.0, 7.0
    facts = seen(x).facts
    assert facts["outlier_score"] == 50.0
    assert facts["token_outlier_score"] == 50.0
    assert (facts["minimum"], facts["maximum"]) == (-50.0, 7.0)
    assert facts["mean"] == pytest.approx(x.mean().item())
    assert facts["standard_deviation"] == pytest.approx(x.std(correction=0).item())


def test_an_outlier_score_is_one_where_all_are_alike_and_infinite_over_silence():
    for x in (torch.ones(2, 4), torch.zeros(2, 4)):
        assert seen(x).facts["outlier_score"] == 1.0
    x = torch.zeros(2, 4)
    x[0, 0] = 1.0
    assert seen(x).facts["outlier_score"] == math.inf


def test_nan_in_an_activation_names_the_site():
    with pytest.raises(CalibrationError, match="the input of a holds NaN or inf"):
        seen(torch.tensor([[1.0, float("nan")]]))


# --- exact costs -------------------------------------------------------------------------------


def test_bytes_are_those_stored_and_bits_are_shares_of_the_mean(net):
    options = {site.name: (FLOAT, BF16, DYNAMIC) for site in net.sites}
    tables = sizes(tuple(net.sites), options)
    up, down = (site.name for site in net.sites)
    assert tables["size"].values[up, "float32"] == 4 * 24 * 16
    assert tables["size"].values[up, DYNAMIC.name] == 24 * 16 + 4 * 24  # codes, scale per row
    mean = sum(tables["bits"].values[name, "bfloat16"] for name in (up, down))
    assert mean == 16.0
    assert tables["bops"].values[up, DYNAMIC.name] == 5 * 24 * 16 * 64


def test_products_of_one_shape_by_others_are_measured_apart(tmp_path):
    """Only the work tells how many columns the second operand has."""
    narrow = Site("narrow", "matmul", "", input_shape=(4, 8), macs=4 * 8 * 2)
    wide = replace(narrow, name="wide", macs=4 * 8 * 100)
    target = replace(REFERENCE, measure=lambda site, choice: float(site.macs))
    options = {"narrow": (FLOAT,), "wide": (FLOAT,)}
    found = latency((narrow, wide), options, target, cache_dir=tmp_path)
    assert found.values == {("narrow", "float32"): 64.0, ("wide", "float32"): 3200.0}


def test_attention_is_timed_with_as_many_keys_as_it_has():
    seen = []
    site = Site("a", "attention", "", input_shape=(1, 2, 3, 4), macs=2 * 3 * 7 * (4 + 4))
    with Calls(seen):
        attention(site, FLOAT, torch.randn(1, 2, 3, 4))()
    assert seen == [[(1, 2, 3, 4), (1, 2, 7, 4), (1, 2, 7, 4)]]


class Calls(TorchDispatchMode):
    """Shapes of the operands of attentions."""

    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func):
            self.seen.append([tuple(x.shape) for x in args[:3]])
        return func(*args, **(kwargs or {}))


def shared(ops: str) -> tuple[tuple[Site, ...], dict[str, tuple[Choice, ...]]]:
    """Sites of one weight [8, 32], by the first letters of their ops."""
    names = {"e": "embedding", "l": "linear"}
    weight = {"weight": "w", "weight_shape": (8, 32), "dtype": "float32"}
    sites = tuple(Site(f"{op}#{k}", names[op], "", **weight) for k, op in enumerate(ops))
    return sites, dict.fromkeys((site.name for site in sites), (FLOAT, BF16, DYNAMIC))


@pytest.mark.parametrize("ops", ["ll", "el", "lll", "ell"])
def test_a_shared_weight_counts_once_for_each_form_it_is_stored_in(ops):
    sites, options = shared(ops)
    table = sizes(sites, options, (tuple(options),))["size"]
    bytes_of = {FLOAT: 4 * 256, BF16: 2 * 256, DYNAMIC: 256 + 4 * 8}
    for picks in itertools.product(*options.values()):
        forms = {(c, None if c == FLOAT else s.op) for s, c in zip(sites, picks, strict=True)}
        stored = sum(bytes_of[choice] for choice, _ in forms)
        found = total(table, {s: c.name for s, c in zip(options, picks, strict=True)})
        assert found >= stored, picks
        changes = sum(a != b for a, b in itertools.pairwise(picks))
        if len(ops) == 2 or (changes == len({*picks}) - 1 and ops == "lll"):
            assert found == stored, picks


@pytest.mark.parametrize("name", ["int8", "int4_g32", "int4_asym"])
def test_a_weight_quantized_some_rows_at_a_time_is_what_it_is_at_once(monkeypatch, name):
    monkeypatch.setattr(replay_module, "ROWS", 5)
    rows = torch.randn(13, 64)
    at_once = fake_quantize(rows, format_named(name))
    assert torch.equal(replay_module._fake_quantized(rows, format_named(name)), at_once)
