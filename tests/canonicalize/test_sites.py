"""Sites: names a user knows, shapes, work, and who reads the same tensor."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mpq_fx.passes.analyze.sites import shared_weights
from tests.architectures import ARCHITECTURES, values
from tests.toy_backend import Toy, called


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)), q @ k.transpose(-1, -2)


class Shared(nn.Module):
    """One weight read twice, and a folded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, ids):
        x = self.norm(self.conv(self.table(ids).mT)).mT
        return functional.linear(x, self.table.weight)


def sites_of(net, *inputs):
    toy = Toy()
    compiled = toy.compile(net.eval())
    with torch.no_grad():
        for given in inputs:
            called(compiled, given)
    return toy.sites


def test_sites_of_attention():
    sites = sites_of(Attention(), (values(2, 5, 8),))
    assert {name: site.op for name, site in sites.items()} == {
        "q": "linear",
        "k": "linear",
        "v": "linear",
        "attention": "attention",
        "out": "linear",
        "matmul": "matmul",
    }
    assert sites["q"].group == sites["k"].group == sites["v"].group
    assert sites["q"].group is not None
    assert sites["out"].group is None
    assert sites["q"].macs == 2 * 5 * 8 * 8
    assert sites["attention"].macs == 2 * (2 * 2 * 5 * 5 * 4)
    assert sites["matmul"].macs == 2 * 2 * 5 * 5 * 4
    assert sites["q"].source.startswith("test_sites.py:")
    assert (sites["q"].input_shape, sites["q"].weight_shape) == ((2, 5, 8), (8, 8))
    assert sites["q"].path == "q"
    assert sites["matmul"].weight is None


def test_a_shared_weight_gives_two_sites_and_a_folded_one_keeps_its_root():
    sites = sites_of(Shared(), (torch.arange(10).view(2, 5),))
    assert list(sites) == ["table", "conv", "table#2"]
    assert sites["table"].weight == sites["table#2"].weight
    assert [site.op for site in sites.values()] == ["embedding", "conv", "linear"]
    conv = sites["conv"]
    assert conv.weight is not None
    assert "conv" in conv.weight
    assert "weight" in conv.weight
    assert conv.weight_shape == (6, 3, 3)
    assert conv.attributes == ([1], [1], [1], 2)
    assert conv.macs == 2 * 6 * 5 * 3 * 3
    assert sites["table"].macs == 0


class TwoNorms(nn.Module):
    """One convolution in front of two norms: folded, it has two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(6, 6, 3), nn.Linear(6, 6)
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(2))

    def forward(self, x):
        x, y = (norm(self.conv(x)).mT for norm in self.norms)
        return self.linear(self.linear(x)) + y


def test_weights_are_shared_where_they_are_one_value_of_the_graph():
    toy = Toy()
    with torch.no_grad():
        called(toy.compile(Shared().eval()), (torch.arange(10).view(2, 5),))
        assert shared_weights(toy.graph, [*toy.sites.values()]) == (("table", "table#2"),)
        called(toy.compile(TwoNorms().eval()), (values(2, 6, 9),))
    assert [site.op for site in toy.sites.values()].count("conv") == 2
    assert shared_weights(toy.graph, [*toy.sites.values()]) == (("linear", "linear#2"),)


def test_symbolic_sizes_are_strings_and_work_is_counted_at_the_size_seen():
    net = nn.Sequential(nn.Linear(8, 4))
    (site,) = sites_of(net, (values(3, 8),), (values(7, 8),)).values()
    assert isinstance(site.input_shape[0], str)
    assert site.input_shape[1] == 8
    assert site.macs == 7 * 8 * 4


def test_low_precision_models_say_so():
    (site,) = sites_of(nn.Linear(4, 4).bfloat16(), (values(3, 4).bfloat16(),)).values()
    assert site.dtype == "bfloat16"


def test_stacked_experts_are_grouped_sites():
    net, inputs = ARCHITECTURES["mixtral"]()
    sites = sites_of(net, inputs[0])
    grouped = [site for site in sites.values() if site.op == "grouped_matmul"]
    assert {site.name.rsplit(".", 1)[1] for site in grouped} == {"gate_up_proj", "down_proj"}
    assert all(len(site.weight_shape) == 3 for site in grouped)
    assert all(site.macs > 0 for site in grouped)
