"""What a kernel takes over: a residual is added in place only where nobody reads it afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from mpq_fx.graph import ops
from mpq_fx.passes.lower import onednn
from mpq_fx.passes.lower.inductor import INT8, compile_frozen
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.onednn_choices import BF16, STATIC
from tests.lowered import Lowered

pytestmark = pytest.mark.onednn
LIMIT = 0.01  # codes of 8 bits differ by one where the reference rounds to bfloat16 on the way


class Bottleneck(nn.Module):
    def __init__(self, activation, is_first: bool) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.down = nn.Conv2d(16, 16, 1) if is_first else nn.Identity()
        self.activation = activation

    def forward(self, x):
        y = self.wide(relu(self.narrow(x)))
        return self.activation(y + self.down(x))


class Residual(nn.Module):
    """A stem, three blocks, and a head that may also read what the first two blocks read."""

    def __init__(self, activation=relu, later: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 1)
        self.blocks = nn.ModuleList(Bottleneck(activation, k == 0) for k in range(3))
        self.side = nn.Conv2d(16, 12, 1) if later else None

    def forward(self, x):
        x = relu(self.stem(x))
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        y = self.head(x)
        return y if self.side is None else y + self.side(kept[0])


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 12, 12)


def sums(lowered: Lowered) -> list[str]:
    """How each integer matmul adds a residual: "sum" in place, "add" beside it."""
    target = torch.ops.onednn.qlinear_pointwise.binary
    return [
        node.args[13]
        for node in lowered.folded.gm.graph.find_nodes(op="call_function", target=target)
    ]


@pytest.mark.parametrize("activation", [relu, nn.Identity()], ids=["relu", "none"])
def test_an_integer_matmul_adds_into_the_codes_of_its_residual(isolated, image, activation):
    lowered = Lowered(Residual(activation), image, STATIC)
    assert sums(lowered) == ["add", "sum", "sum"]  # the first block's residual has just been made
    assert "sub" not in ops(lowered.folded.gm).split()  # no residual is widened
    assert lowered.error() < LIMIT


@pytest.mark.parametrize("later", [False, True])
def test_compiled_it_computes_what_it_computes_uncompiled(isolated, image, later):
    lowered = Lowered(Residual(later=later), image, STATIC)
    with torch.no_grad():
        expected = lowered.folded.gm(*lowered.arguments)[0]
        run = compile_frozen(lowered.folded.gm, lowered.arguments, "").run
        for _ in range(2):  # nothing of a call may be left in a buffer that the next one reads
            torch.testing.assert_close(run(*lowered.arguments)[0], expected)


def test_a_residual_that_is_read_later_is_not_overwritten(isolated, image):
    lowered = Lowered(Residual(later=True), image, STATIC)
    assert sums(lowered) == ["add", "sum"]  # the second block would overwrite what `side` reads
    assert lowered.error() < LIMIT


def test_a_kernel_does_not_overwrite_what_it_multiplies(isolated, image):
    class Direct(Residual):
        def forward(self, x):
            x = relu(self.stem(x))
            for _ in range(3):
                x = relu(x + self.head(x))
            return x + 1

    model = Direct()
    model.head = nn.Conv2d(16, 16, 1)
    lowered = Lowered(model, image, STATIC)
    assert sums(lowered) == []
    assert lowered.error() < LIMIT


def test_an_addend_in_another_layout_is_left_to_inductor(isolated):
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(16, 15), nn.Linear(15, 15)

        def forward(self, x):
            turned = x[:, :, :15].transpose(1, 2)
            return self.last(self.layer(x) + turned.bfloat16().float())

    lowered = Lowered(Turned(), torch.randn(2, 15, 16), STATIC)
    assert sums(lowered) == []
    assert lowered.error() < LIMIT


def test_a_residual_in_bfloat16_is_read_by_the_kernel(isolated, image):
    lowered = Lowered(Residual(), image, {"": STATIC, "residual": BF16})
    assert sums(lowered) == ["add", "add", "add"]
    assert lowered.error() < LIMIT


def test_a_template_leaves_the_sum_to_inductor(isolated, image):
    assert sums(Lowered(Residual(), image, STATIC, INT8)) == []


@pytest.mark.parametrize("bug", ["scale", "zero", "post"])
def test_the_comparison_bites(isolated, image, monkeypatch, bug):
    right = onednn.sum_tail_of

    def wrong(node, posts):
        tail = right(node, posts)
        if tail is None or tail.addend is None or tail.addend.scale is None:
            return tail
        if bug == "post":
            return replace(tail, post=onednn.Post("relu"))
        other = tail.quantize.args[1]  # the scale of the result; as a zero point it is 0
        return replace(tail, addend=replace(tail.addend, **{bug: other}))

    monkeypatch.setattr(onednn, "sum_tail_of", wrong)
    assert Lowered(Residual(nn.Identity()), image, STATIC).error() > LIMIT


@pytest.mark.parametrize(
    "plus", [lambda y: y + 1.5, lambda y: 2 + y, lambda y: y + y], ids=["1.5", "2", "itself"]
)
def test_what_is_added_to_a_bfloat16_linear_compiles(plus):
    """Inductor takes a packed linear in front of a plus for one of its own, and asserts it."""

    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 48)

        def forward(self, x):
            return plus(self.fc(x))

    made = Lowered(Plus(), torch.randn(8, 64), BF16)
    inputs = [n.meta["val"] for n in made.folded.gm.graph.find_nodes(op="placeholder")]
    compiled = ONEDNN.compile(made.folded.gm, inputs, "")
    assert made.error(compiled.run) <= 2**-8


class Block(nn.Module):
    """A transformer's block with its attention written out, so that matmuls of values stand in it.

    The residual is read by the norm behind the sum alone, and three bfloat16 layers are around.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(64, 64), nn.Linear(64, 64)
        self.wide, self.narrow = nn.Linear(64, 128), nn.Linear(128, 64)
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)

    def forward(self, x):
        seen = torch.softmax(self.query(x) @ x.transpose(-1, -2), -1) @ x
        x = self.first(self.out(seen) + x)
        return self.second(self.narrow(torch.relu(self.wide(x))) + x)


MIX = {"1.out": STATIC, "query": BF16, "wide": BF16, "narrow": BF16}


@pytest.mark.parametrize("wanted", [STATIC, MIX], ids=["int8", "mix"])
@pytest.mark.parametrize("mode", ["", INT8])
def test_a_sum_behind_an_integer_linear_shares_no_memory_with_what_is_read_later(
    isolated, wanted, mode
):
    """As a template with the sum inside, Inductor gave the memory of the residual away twice."""
    made = Lowered(
        nn.Sequential(*(Block() for _ in range(3))), torch.randn(4, 16, 64), wanted, mode
    )
    run = compile_frozen(made.folded.gm, made.arguments, mode).run
    assert made.error(run) < LIMIT


def test_the_factor_of_a_sum_is_kept(isolated):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            y = torch.add(self.layer(x), x, alpha=3)
            return torch.add(torch.add(x.sin(), self.layer(y), alpha=2), 1, alpha=2)

    for wanted in (STATIC, BF16, {"": STATIC, "residual": STATIC}):
        made = Lowered(Scaled(), torch.randn(8, 64), wanted)
        assert made.error(compile_frozen(made.folded.gm, made.arguments, "").run) < LIMIT


@pytest.mark.parametrize("choice", [BF16, None], ids=["bf16", "float"])
@pytest.mark.parametrize("fold", [lambda y: y.relu(), lambda y: y], ids=["relu", "plain"])
def test_a_linear_between_two_views_compiles(isolated, choice, fold):
    """As windows of pixels are projected to heads; torch 2.13 asserts that the view is a matrix."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Linear(16, 48)

        def forward(self, x):
            windows = x.sin().view(2, 4, 4, 16).transpose(1, 2).reshape(8, 4, 16)
            return fold(self.heads(windows)).reshape(8, 4, 3, 2, 8).permute(2, 0, 3, 1, 4)

    made = Lowered(Windows(), torch.randn(2, 16, 16), {} if choice is None else choice)
    assert made.error(compile_frozen(made.folded.gm, made.arguments, "").run) < LIMIT
