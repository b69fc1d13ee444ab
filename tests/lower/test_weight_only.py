"""int8 or int4 weights alone: the kernel equals the reference on the same codes, refreshed too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq_fx.facts import Choice, Site
from mpq_fx.graph import ops
from mpq_fx.passes.lower.inductor import ALL
from mpq_fx.passes.lower.inductor import INT8 as INT8_TEMPLATES
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.weight_only import FEW_ROWS, INT4, INT8
from tests.lowered import Lowered

pytestmark = pytest.mark.onednn
K = 256
LIMIT = 2**-8 + K**0.5 * 2**-24  # style R9: x is bfloat16 in both, the kernel sums in float32
BITES = 2**-8 * 4
CALLEES = {"int8": "_weight_int8pack_mm", "int4": "_weight_int4pack_mm_for_cpu"}


class Pair(nn.Module):
    """Two linears, K a multiple of every group; the second without a bias."""

    def __init__(self, hidden: int = K) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, hidden), nn.Linear(hidden, 48, bias=False)
        for linear in (self.up, self.down):  # so that a scale is not as good as the next one
            linear.weight.data *= torch.linspace(0.1, 2, linear.in_features)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def lowered(choice: Choice, *shape: int) -> Lowered:
    torch.manual_seed(0)
    return Lowered(Pair(), torch.randn(*shape, K), choice)


@pytest.mark.parametrize("choice", [INT8, *INT4], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (2, 2), (1, 1, 1)], ids=str)
def test_it_runs_in_its_callee_and_equals_the_reference(isolated, choice, shape):
    made = lowered(choice, *shape)
    callee = CALLEES[choice.weight.partition("_")[0]]
    assert ops(made.folded.gm).count(callee) == 2
    assert "mpq." not in ops(made.folded.gm)
    assert made.error() <= LIMIT


def test_rows_with_strides_are_read_as_they_are(isolated):
    torch.manual_seed(0)
    x = torch.randn(K, 3).t()
    for choice in (INT8, *INT4):
        assert Lowered(Pair(), x, choice).error() <= LIMIT


@pytest.mark.parametrize("choice", INT4, ids=str)
@pytest.mark.parametrize("bug", ["nibbles", "group", "zero", "block"])
def test_the_comparison_bites(isolated, choice, bug):
    """Swapped nibbles, the next group's scale, a zero point off by one, a block left out."""
    made = lowered(choice, 3)
    packed = next(t for t in made.folded.gm.buffers() if t.dtype == torch.uint8)
    pairs = next(t for t in made.folded.gm.buffers() if t.dim() == 3)
    with torch.no_grad():
        if bug == "nibbles":
            packed.copy_((packed >> 4) | (packed << 4))
        elif bug == "group":
            pairs.copy_(pairs.roll(1, 0))
        elif bug == "zero":
            pairs[..., 1] += pairs[..., 0]
        else:
            pairs[-1] = 0
    assert made.error() > BITES


@pytest.mark.parametrize("choice", [INT8, *INT4], ids=str)
def test_every_constant_follows_its_weight(isolated, choice):
    made = lowered(choice, 2)
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.mul_(-1.5)
        assert made.error() > BITES
        made.refresh()
    assert made.error() <= LIMIT


@pytest.mark.parametrize(
    ("rows", "n", "k", "reason"),
    [
        (FEW_ROWS + 1, 64, 256, "pay for up to 4 rows"),
        (1, 64, 192, "K is 192"),
        (1, 40, 256, "there are 40"),
    ],
)
def test_it_is_refused_where_the_kernel_cannot_or_does_not_pay(rows, n, k, reason):
    site = Site("a", "linear", "a", input_shape=(rows, k), weight_shape=(n, k))
    assert any(reason in text for text in ONEDNN.refuse(site, INT4[0]))


@pytest.mark.parametrize("choice", INT4, ids=str)
def test_its_time_is_that_of_its_kernel(choice):
    site = Site("a", "linear", "a", input_shape=(1, 256), weight_shape=(64, 256))
    assert not list(ONEDNN.refuse(site, choice))
    assert ONEDNN.measure(site, choice) > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["", INT8_TEMPLATES, ALL], ids=["calls", "int8", "all"])
@pytest.mark.parametrize("choice", [INT8, INT4[0]], ids=str)
def test_compiled_in_any_mode_it_equals_the_reference_and_is_refreshed(isolated, choice, mode):
    made = lowered(choice, 2)
    compiled = ONEDNN.compile(made.folded.gm, made.arguments, mode)
    assert made.error(compiled.run) <= LIMIT
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.mul_(-1.5)
        made.refresh()
        for redo in compiled.derived:
            redo()
    assert made.error(compiled.run) <= LIMIT
