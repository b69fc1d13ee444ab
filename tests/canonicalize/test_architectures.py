"""Every architecture: captured whole, canonical, equal to eager, for two shapes of its inputs."""

from __future__ import annotations

import pytest
import torch

from mpq_fx.graph import ops
from mpq_fx.passes import CANONICALIZE
from tests.architectures import ARCHITECTURES, decode
from tests.toy_backend import Toy, called, worst

KINDS = {  # kinds of sites that must be found, and how many
    "bert": {"linear": 13, "attention": 2, "embedding": 3},
    "vit": {"linear": 13, "attention": 2, "conv": 1},
    "swin": {"linear": 19, "attention": 3, "conv": 1},
    "resnet": {"conv": 12},
    "mobilenet": {"conv": 52},
    "llama": {"linear": 15, "attention": 2, "embedding": 1},
    "qwen": {"linear": 15, "attention": 2, "embedding": 1},
    "mixtral": {"linear": 11, "attention": 2, "embedding": 1, "grouped_matmul": 4},
    "gpt2": {"linear": 9, "attention": 2, "embedding": 2},
    "whisper": {"linear": 12, "attention": 2, "conv": 2},
    "mamba": {"linear": 4, "conv": 1, "embedding": 1},
    "unet": {"linear": 4, "conv": 11, "conv_transpose": 1},
}
GONE = {"addmm", "dropout", "detach", "alias", "batch_norm", "convolution", "contiguous_format"}


@pytest.mark.parametrize("name", KINDS)
def test_captured_whole_and_equal_to_eager(name):
    net, inputs = ARCHITECTURES[name]()
    toy = Toy()
    compiled = toy.compile(net)
    with torch.no_grad():
        for given in inputs:
            assert worst(called(compiled, given), called(net, given)) <= 1e-6
    assert len(toy.captured) == len(inputs), "one graph per shape, no graph breaks"
    assert not GONE & {*ops(toy.graph).split()}
    assert [apply(toy.graph) for apply in CANONICALIZE] == [0] * len(CANONICALIZE)
    found = [site.op for site in toy.sites.values()]
    assert {kind: found.count(kind) for kind in KINDS[name]} == KINDS[name]
    symbols = [n for n in toy.graph.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]
    assert symbols, "the second shape must give a graph with symbolic sizes"


def test_a_decode_loop_writes_its_cache():
    net, steps = decode()
    toy = Toy()
    compiled, cache, expected = toy.compile(net), net.new_cache(), net.new_cache()
    with torch.no_grad():
        for (ids,) in steps:
            assert worst([compiled(ids, cache)], [net(ids, expected)]) <= 1e-6
            for got, want in zip(cache.layers, expected.layers, strict=True):
                assert worst([got.keys, got.values], [want.keys, want.values]) <= 1e-6
    assert not [captured.refusal for captured in toy.captured if captured.refusal]
    assert len(toy.captured[-1].mutated) >= 4, "keys and values of two layers"
    calls = ops(toy.graph).split()
    assert calls.count("copy_") == len(toy.captured[-1].mutated)


def test_an_lstm_keeps_its_values_whatever_dynamo_captures_of_it():
    net, inputs = ARCHITECTURES["lstm"]()
    compiled = Toy().compile(net)
    with torch.no_grad():
        for given in inputs:
            assert worst(called(compiled, given), called(net, given)) == 0
