"""One fp8 plan on the targets `reference` and `triton`: the same numbers, out of other callees."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.facts import Choice, Site
from mpq_fx.kernels.linear.triton_float8 import LONGEST
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.lower import triton as target
from tests.architectures import bert, llama, tokens

DYNAMIC = Choice("fp8_e4m3", "fp8_e4m3", "dynamic")
STATIC = Choice("fp8_e4m3", "fp8_e4m3_tensor", "static")
EACH = pytest.mark.parametrize("choice", [DYNAMIC, STATIC], ids=str)
KERNEL = "mpq_triton.float8_linear"
NETS = {"bert": bert, "llama": llama}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def graphs(monkeypatch):
    """The final graphs that the target compiled, as counts of their callees."""
    found = []

    def keeping(compile_graph):
        def compile_and_keep(gm, inputs, mode):
            found.append(Counter(str(node.target) for node in gm.graph.nodes))
            return compile_graph(gm, inputs, mode)

        return compile_and_keep

    for name in ("compile_eager", "compile_inductor"):  # in the interpreter, and on a GPU
        monkeypatch.setattr(target, name, keeping(getattr(target, name)))
    return found


def limit(layers: int, k: int) -> float:
    """Roundoff of float32 results and sums, and of a tensor core's sums, of independent layers."""
    in_core = 0.0 if DEVICE.type == "cpu" else math.sqrt(min(k, LONGEST)) * 2**-13
    return math.sqrt(layers) * ((1 + math.sqrt(k)) * 2**-24 + in_core)


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    ones = torch.ones(2, 8, dtype=torch.long, device=DEVICE)
    ids = tokens(2, 8).to(DEVICE)
    return [{"input_ids": ids.roll(k, 1), "attention_mask": ones} for k in range(count)]


def planned(model: nn.Module, choice: Choice, **options) -> mpq_fx.Plan:
    given = {"target": "reference", "tolerance": 0.5, "objective": "size", **options}
    config = mpq_fx.Config(formats=[choice.name], **given)
    return mpq_fx.tune(model, batches(), config=config, progress=False)


def outputs(model: nn.Module, plan: mpq_fx.Plan, name: str) -> torch.Tensor:
    torch.compiler.reset()
    compiled = mpq_fx.apply(model, plan, config=mpq_fx.Config(target=name))
    with torch.inference_mode():
        return compiled(**batches()[0])[0]


@EACH
@pytest.mark.parametrize("net", NETS)
def test_a_plan_gives_the_same_on_triton_as_on_the_reference(net, choice, graphs, isolated):
    model = NETS[net]()[0].to(DEVICE)
    plan = planned(model, choice)
    sites = [name for name, chosen in plan.choices.items() if chosen == choice]
    assert len(sites) >= 12
    want, got = outputs(model, plan, "reference"), outputs(model, plan, "triton")
    k = max(row.site.weight_shape[-1] for row in plan.ledger if row.site.name in sites)
    assert relative_rms(got, want) <= limit(len(sites), k)
    with torch.inference_mode():
        assert relative_rms(want, model(**batches()[0])[0]) > 1e-3, "not float"
    (found,) = graphs
    # query, key and value of a layer are one linear
    assert 0 < found["mpq_triton.float8_linear.default"] <= len(sites)
    assert not any(name.startswith("mpq.") for name in found), "nothing is left to the reference"
    passes = sum(count for name, count in found.items() if "quantize" in name)
    linears = found["mpq_triton.float8_linear.default"]
    if (net, choice) == ("bert", STATIC):
        assert 0 < passes < linears, "behind a gelu the linear itself writes the next one's codes"
    else:
        assert 0 < passes <= linears


@EACH
def test_a_plan_made_for_triton_names_its_kernel(choice, graphs, isolated):
    model = bert()[0].to(DEVICE)
    plan = planned(model, choice, target="triton")
    kernels = {row.kernel for row in plan.ledger if row.choice == choice.name}
    assert kernels == {KERNEL}
    names = {name for row in plan.ledger for name in row.refusals}
    assert not any(name.startswith("mpq_triton") for name in names), "kernels for other formats"


@EACH
def test_an_a100_says_why_it_has_no_fp8(choice):
    site = Site("fc", "linear", "fc", input_shape=(64, 256), weight_shape=(256, 256))
    reasons = {name: [*target.on(name).refuse(site, choice)] for name in ("a100", "h100", "l4")}
    assert reasons["h100"] == reasons["l4"] == []
    (said,) = [reason for reason in reasons["a100"] if reason.startswith("float8_linear")]
    assert said == "float8_linear: sm_80 multiplies no 8-bit floats; sm_89 and later do"


def test_a_roofline_counts_operations_in_fp8_where_both_operands_are():
    site = Site("fc", "linear", "fc", input_shape=(8192, 4096), weight_shape=(4096, 4096))
    h100 = target.on("h100")
    ms = {c: h100.measure(site, c) for c in (DYNAMIC, Choice("bfloat16", "bfloat16"))}
    assert ms[Choice("bfloat16", "bfloat16")] / ms[DYNAMIC] == pytest.approx(2, rel=0.05)
