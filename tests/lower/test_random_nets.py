"""Random residual nets, random choices: compiled they compute what they compute uncompiled."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention, silu

from mpq_fx.numerics import relative_rms
from mpq_fx.passes.lower.inductor import ALL, INT8
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.onednn_choices import BF16, DYNAMIC, STATIC
from tests.lowered import Lowered

pytestmark = pytest.mark.onednn
WIDTH, HEADS, STEPS = 32, 4, 10
LIMIT = 0.03  # codes of 8 bits that round the other way, through up to STEPS layers
LINEARS = {"linear": 1, "sum": 1, "mlp": 2, "attention": 3}
OPS = (*LINEARS, "linear", "linear", "add", "add", "norm", "activation", "gate", "join", "view")


def attention(x: Tensor, *layers: nn.Module) -> Tensor:
    q, k, v = (f(x).view(len(x), -1, HEADS, WIDTH // HEADS).transpose(1, 2) for f in layers)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def scores(x: Tensor, *layers: nn.Module) -> Tensor:
    q, k, v = (f(x) for f in layers)
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class RandomNet(nn.Module):
    """Each step reads one or two of the values so far; the last value and any other come out."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.steps, self.layers = [], nn.ModuleList()
        for count in range(1, STEPS + 1):
            op = draw.choice(OPS)
            x = draw.choice([count - 1] * 3 + list(range(count)))  # most often the last value
            self.steps.append((op, x, draw.randrange(count), draw.random()))
            widths = [WIDTH, 2 * WIDTH, WIDTH] if op == "mlp" else [WIDTH] * 4
            made = [
                nn.Linear(widths[k], widths[k + 1], bias=draw.random() < 0.7)
                for k in range(LINEARS.get(op, 0))
            ]
            self.layers.append(nn.ModuleList([nn.LayerNorm(WIDTH)] if op == "norm" else made))
        self.also = draw.randrange(1, STEPS + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for layers, (op, a, b, chance) in zip(self.layers, self.steps, strict=True):
            values.append(step(op, values[a], values[b], chance, list(layers)))
        return values[-1], values[self.also]


def step(op: str, x: Tensor, y: Tensor, chance: float, layers: list[nn.Module]) -> Tensor:
    activation = (relu, gelu, silu, torch.tanh)[int(chance * 4)]
    half = WIDTH // 2
    results = {
        "linear": lambda: layers[0](x),
        "norm": lambda: layers[0](x),
        "sum": lambda: relu(layers[0](x) + y),
        "mlp": lambda: x + layers[1](activation(layers[0](x))),
        "attention": lambda: (attention if chance < 0.5 else scores)(x, *layers),
        "add": lambda: x + y,
        "activation": lambda: activation(x),
        "gate": lambda: x * torch.sigmoid(y),
        "join": lambda: torch.cat([x[..., half:], y[..., :half]], -1),
        "view": lambda: x.transpose(1, 2).reshape(x.shape) if chance < 0.5 else x.flip(1),
    }
    return results[op]()


def random_choices(net: RandomNet, draw: random.Random) -> dict:
    names = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    drawn = {name: draw.choice((STATIC, STATIC, DYNAMIC, BF16, None)) for name in names}
    drawn["residual"] = draw.choice((STATIC, BF16, None))
    drawn["attention"] = draw.choice((BF16, None))
    return {name: choice for name, choice in drawn.items() if choice is not None}


FEW, MANY = range(4), range(4, 60)


@pytest.mark.parametrize("mode", ["", INT8, ALL])
@pytest.mark.parametrize(
    "seed", [*FEW, *(pytest.param(seed, marks=pytest.mark.slow) for seed in MANY)]
)
def test_a_random_net_computes_compiled_what_it_computes_uncompiled(isolated, seed, mode):
    net, draw = RandomNet(seed), random.Random(seed)
    torch.manual_seed(seed)
    x = torch.randn(draw.choice((1, 3)), draw.choice((8, 7, 33)), WIDTH)
    made = Lowered(net, x, random_choices(net, draw), mode)
    inputs = [n.meta["val"] for n in made.folded.gm.graph.find_nodes(op="placeholder")]
    run = ONEDNN.compile(made.folded.gm, inputs, mode).run
    with torch.no_grad():
        expected, reference = made.folded.gm(*made.arguments), made.reference(*made.inputs)
        for _ in range(2):  # the second call finds what the first left in its buffers
            for got, want, exact in zip(run(*made.arguments), expected, reference, strict=True):
                assert relative_rms(got, want) < LIMIT
                assert relative_rms(want, exact) < LIMIT
