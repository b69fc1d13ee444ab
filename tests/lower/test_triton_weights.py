"""Plans with few-bit weights on the targets `reference` and `triton`: the same numbers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import mpq_fx
from mpq_fx.facts import Choice, Site
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.lower import triton as target
from mpq_fx.passes.lower.reference import REFERENCE
from tests.architectures import llama, tokens

KERNELS = {
    Choice("int8", "bfloat16"): "weight_only_linear",
    Choice("int4", "bfloat16"): "weight_only_linear",
    Choice("int4_g32", "bfloat16"): "weight_only_linear",
    Choice("int4_asym", "bfloat16"): "weight_only_linear",
    Choice("int4_progressive", "int8", "dynamic"): "int4_linear",
    Choice("int4", "int8", "dynamic"): "int4_linear",
    Choice("int4", "int4_row", "dynamic"): "int4_linear",
    Choice("int4", "int4", "dynamic"): "int4_linear",
}
PLANNED = [  # a symmetric and an asymmetric weight alone, and all ways of int4 by integers
    Choice("int8", "bfloat16"),
    Choice("int4_asym", "bfloat16"),
    *[choice for choice in KERNELS if choice.scaling == "dynamic"],
]
TABLES = [Choice("int8", "float32"), Choice("int4_g32", "float32")]
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


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    ones = torch.ones(2, 8, dtype=torch.long, device=DEVICE)
    ids = tokens(2, 8).to(DEVICE)
    return [{"input_ids": ids.roll(k, 1), "attention_mask": ones} for k in range(count)]


def planned(model: nn.Module, *choices: Choice, name: str = "reference") -> mpq_fx.Plan:
    allowed = [choice.name for choice in choices]
    config = mpq_fx.Config(formats=allowed, target=name, tolerance=0.9, objective="size")
    return mpq_fx.tune(model, batches(), config=config, progress=False)


def outputs(model: nn.Module, plan: mpq_fx.Plan, name: str) -> torch.Tensor:
    torch.compiler.reset()
    compiled = mpq_fx.apply(model, plan, config=mpq_fx.Config(target=name))
    with torch.inference_mode():
        return compiled(**batches()[0])[0]


def limit(layers: int, k: int) -> float:
    """Roundoff of float32 results and sums of independent layers."""
    return math.sqrt(layers) * (1 + math.sqrt(k)) * 2**-24


@pytest.mark.parametrize("choice", PLANNED, ids=str)
def test_a_plan_gives_the_same_on_triton_as_on_the_reference(choice, graphs, isolated):
    model = llama()[0].to(DEVICE)
    plan = planned(model, choice, TABLES[1])
    sites = [name for name, chosen in plan.choices.items() if chosen == choice]
    tables = [name for name, chosen in plan.choices.items() if chosen == TABLES[1]]
    assert len(sites) >= 12
    assert len(tables) == 1
    want, got = outputs(model, plan, "reference"), outputs(model, plan, "triton")
    k = max(row.site.weight_shape[-1] for row in plan.ledger if row.site.name in sites)
    assert relative_rms(got, want) <= limit(len(sites), k)
    with torch.inference_mode():
        assert relative_rms(want, model(**batches()[0])[0]) > 1e-3, "not float"
    (found,) = graphs
    assert found[f"mpq_triton.{KERNELS[choice]}.default"] > 0
    assert found["mpq_triton.embedding.default"] == 1
    assert not any(name.startswith("mpq.") for name in found), "nothing is left to the reference"
    assert not any("pack" in name for name in found), "weights were packed once"


def test_a_plan_made_for_triton_names_its_kernels(graphs, isolated):
    choice = Choice("int4_progressive", "int8", "dynamic")
    plan = planned(llama()[0].to(DEVICE), choice, TABLES[0], name="triton")
    kernels = {row.choice: row.kernel for row in plan.ledger}
    assert kernels[choice.name] == "mpq_triton.int4_linear"
    assert kernels[TABLES[0].name] == "mpq_triton.embedding"


@pytest.mark.parametrize("choice", [*KERNELS, *TABLES], ids=str)
def test_every_choice_exists_on_the_reference_too(choice):
    op = "embedding" if choice in TABLES else "linear"
    assert choice in target.CHOICES[op]
    assert choice in REFERENCE.choices[op]


@pytest.mark.parametrize("choice", KERNELS, ids=str)
def test_every_device_runs_them(choice):
    site = Site("fc", "linear", "fc", input_shape=(64, 256), weight_shape=(250, 200))
    for name in ("a100", "rtx3090", "l4", "h100", "b200", "rtx5090"):
        assert not [*target.on(name).refuse(site, choice)]


def test_a_roofline_of_one_row_counts_the_bits_of_a_weight():
    site = Site("fc", "linear", "fc", input_shape=(1, 65536), weight_shape=(65536, 65536))
    h100 = target.on("h100")
    half = h100.measure(site, Choice("bfloat16", "bfloat16"))
    assert half / h100.measure(site, Choice("int4", "bfloat16")) == pytest.approx(16 / 4.125, 0.01)
