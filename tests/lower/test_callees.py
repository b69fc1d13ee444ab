"""Target "cpu": convolutions of every kind, embeddings, attention and matmuls have their callee."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq_fx.facts import Choice
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.onednn_choices import BF16, STATIC
from tests.lowered import Lowered

pytestmark = pytest.mark.onednn
LIMIT = 2**-8 + 1024**0.5 * 2**-24
CONVOLUTIONS = {
    "1d": (nn.Conv1d(8, 12, 3, padding=1), (2, 8, 20)),
    "1d, strided and dilated": (nn.Conv1d(8, 12, 3, stride=2, dilation=2), (2, 8, 21)),
    "groups": (nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 9)),
    "depthwise": (nn.Conv2d(12, 12, 3, groups=12, padding=1), (2, 12, 9, 9)),
    "same": (nn.Conv2d(8, 12, 3, padding="same"), (2, 8, 9, 9)),
    "circular": (nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 9, 9)),
    "reflect": (nn.Conv2d(8, 12, 3, padding=2, padding_mode="reflect"), (2, 8, 9, 9)),
    "no bias": (nn.Conv2d(8, 12, (1, 3), bias=False), (1, 8, 7, 9)),
}


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.transpose(1, 2).clone()


@pytest.mark.parametrize("is_last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("choice", [STATIC, BF16], ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_computed_by_onednn(isolated, kind, choice, is_last):
    layer, shape = CONVOLUTIONS[kind]
    x = torch.randn(shape)
    if is_last:
        x = channels_last(x)
        x = x if x.dim() == 4 else x.transpose(1, 2)
    made = Lowered(nn.Sequential(layer, nn.ReLU()), x, choice)
    callee = "onednn.qconv_pointwise" if choice is STATIC else "mkldnn._convolution_pointwise"
    assert set(made.kernels.values()) == {callee}
    assert made.error() <= LIMIT


@pytest.mark.timeout(300)
@pytest.mark.parametrize("choice", [STATIC, BF16], ids=str)
def test_a_convolution_of_a_signal_compiles_is_timed_and_is_refreshed(isolated, choice):
    """What oneDNN has in PyTorch knows images alone, and says so only when a graph is made."""
    net = nn.Sequential(nn.Conv1d(8, 12, 3, padding=1), nn.GELU(), nn.Conv1d(12, 10, 3, stride=2))
    made = Lowered(net, torch.randn(2, 8, 20), choice)
    compiled = ONEDNN.compile(made.folded.gm, made.arguments, "")
    assert made.error(compiled.run) <= 2 * LIMIT
    assert all(ONEDNN.measure(site, choice) > 0 for site in made.sites)
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.mul_(-1.5)
        made.refresh()
    assert made.error(compiled.run) <= 2 * LIMIT


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 32), nn.Linear(32, 16)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(words))


@pytest.mark.parametrize("choice", [Choice("int8", "float32"), BF16], ids=str)
def test_an_embedding_gathers_codes_or_16_bits(isolated, choice):
    made = Lowered(Words(), torch.randint(50, (3, 7)), {"table": choice})
    gather = {"table": "inductor gather"} if choice.weight == "int8" else {}
    assert made.kernels == {**gather, "out": "mkldnn._linear_pointwise"}
    assert made.error() <= LIMIT
    weights = [b for b in made.folded.gm.buffers() if b.shape == (50, 32)]
    assert [b.dtype for b in weights] == [torch.int8 if choice.weight == "int8" else torch.bfloat16]


class Heads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.scaled_dot_product_attention(x, x, x)
        return y @ y.transpose(-1, -2)


def test_attention_and_matmuls_read_16_bits(isolated):
    made = Lowered(Heads(), torch.randn(2, 4, 9, 8), BF16)
    dtypes = {
        node.name: {n.meta["val"].dtype for n in node.all_input_nodes}
        for node in made.folded.gm.graph.nodes
        if "attention" in node.name or "matmul" in node.name
    }
    assert len(dtypes) == 2
    assert set().union(*dtypes.values()) == {torch.bfloat16}
    assert made.error() <= LIMIT
