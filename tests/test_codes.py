"""A model on the meta device, filled from a plan, runs what the plan was measured as."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpq_fx
from tests.small import Tied


class Turned(nn.Module):
    """A weight that is stored [K, N], as GPT-2 has it; its columns differ in size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 32) * torch.logspace(0, 3, 32))
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Turned(), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def ids(seed: int) -> torch.Tensor:
    return torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(seed))


def rows(seed: int) -> torch.Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))


INT4, INT8, FLOAT = "int4_g32*float32", "int8/dynamic", "float32"
CASES = {  # model, its inputs, and what each site has to run in
    "one format each": (Tied, ids, {"table": INT4, "table#2": INT8, "block": FLOAT}),
    "the head in float": (Tied, ids, {"table": INT4, "table#2": FLOAT, "block": FLOAT}),
    "the table in float": (Tied, ids, {"table": FLOAT, "table#2": INT8, "block": FLOAT}),
    "a transpose": (Gpt, rows, {"first": INT8, "second": INT8}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_filled_model_computes_what_the_plan_did(isolated, case):
    kind, make, wanted = case
    model = kind().eval()
    rules = {site: [name] for site, name in wanted.items()}
    share = "0.3x" if FLOAT not in [*wanted.values()][:2] else "0.99x"
    wishes = {"objective": "error", "tolerance": None, "max_bits": share, "formats": rules}
    config = mpq_fx.Config(target="reference", **wishes)
    plan = mpq_fx.tune(model, [make(seed) for seed in range(4)], config=config, progress=False)
    assert {site: choice.name for site, choice in plan.choices.items()} == wanted
    with torch.device("meta"):
        empty = kind().eval()
    if kind is Tied:
        empty.head.weight = empty.table.weight
    filled, direct = mpq_fx.apply(empty, plan.with_codes(model)), mpq_fx.apply(model, plan)
    with torch.inference_mode():
        assert torch.equal(filled(make(9)), direct(make(9)))
    if kind is Tied:
        assert empty.head.weight is empty.table.weight
    assert all(not p.is_meta and p.requires_grad for p in empty.parameters())


def test_a_filled_model_is_no_view_of_the_plan():
    model = nn.Sequential(nn.Linear(32, 32))
    config = mpq_fx.Config(target="reference", tolerance=0.1, formats=[FLOAT])
    plan = mpq_fx.tune(model.eval(), list(map(rows, range(3))), config=config, progress=False)
    coded = plan.with_codes(model)
    empty = nn.Sequential(nn.Linear(32, 32, device="meta")).eval()
    mpq_fx.apply(empty, coded)
    with torch.no_grad():
        empty[0].weight.zero_()
    assert torch.equal(coded.tensors["state|0.weight|value"], model[0].weight)
