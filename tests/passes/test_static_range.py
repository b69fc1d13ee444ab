"""Static ranges: the sample stands for every value, and the range has the least noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.formats import format_named
from mpq_fx.numerics import fake_quantize, scale_and_zero
from mpq_fx.passes.analyze.static_range import SAMPLE, expecting, join, least_noise, noise, take

FORMATS = [format_named(name) for name in ("uint8_tensor", "int7_tensor")]
UINT8 = FORMATS[0]
shapes = st.lists(st.integers(1, 48), min_size=1, max_size=4)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> float:
    return (fake_quantize(x, UINT8, scale, zero) - x).square().sum().item()


@given(shapes, st.integers(0, 99))
def test_the_weights_count_every_value_once(shape, seed):
    x = normal(*shape, seed=seed)
    sample = take(x)
    assert sample.weights.sum().item() == pytest.approx(x.numel())
    assert sample.values.min() == x.min()
    assert sample.values.max() == x.max()


def test_a_small_activation_is_its_own_sample():
    x = normal(40, 30)
    sample = take(x)
    assert torch.equal(sample.values.sort().values, x.flatten().sort().values)
    assert sample.weights.unique().tolist() == [1.0]


@pytest.mark.parametrize("shape", [(128, 768), (8, 64, 56, 56), (1024, 1024)])
def test_every_channel_is_in_the_sample(shape):
    """A step that divides the row would see a few channels only."""
    channel = torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2)).expand(shape)
    sample = take(channel.float())
    assert len(sample.values.unique()) == shape[1]
    assert len(sample.values) <= 3 * SAMPLE


def test_an_outlier_weighs_as_much_as_it_does_among_all_values():
    """Were the ends part of the sample with the weight of the rest, clipping would seem to cost
    a hundred times what it does.
    """
    x = normal(1024, 1024)
    x[3, 5] = 9.0
    sample = take(x)
    ends = (x.min().item(), 4.6)
    assert noise(sample, UINT8, ends) == pytest.approx(
        error(x, *scale_and_zero(torch.tensor(ends), UINT8)), rel=0.02
    )


@given(st.floats(1.0, 200.0), st.integers(0, 99), st.sampled_from(FORMATS))
def test_minmax_has_no_less_noise(loud, seed, fmt):
    x = normal(40, 8, seed=seed)
    x[0, 0] = loud
    sample = take(x)
    scale, zero = least_noise(sample, fmt)
    found = (fake_quantize(x, fmt, scale, zero) - x).square().sum().item()
    assert found <= noise(sample, fmt, (x.min().item(), x.max().item())) * (1 + 1e-5)


@pytest.mark.parametrize(
    "activation", [torch.relu, torch.nn.functional.gelu, torch.tanh, torch.exp]
)
def test_the_range_is_as_good_as_the_best_of_a_fine_grid(activation):
    """Both ends move alone: a GELU's minimum stays where its maximum is cut."""
    x = activation(normal(512, 64) * 2)
    sample = take(x)
    grid = torch.linspace(0.3, 1.0, 36).tolist()
    low, high = x.min().item(), x.max().item()
    best = min(noise(sample, UINT8, (low * a, high * b)) for a in grid for b in grid)
    assert error(x, *least_noise(sample, UINT8)) <= 1.03 * best


def test_a_lone_outlier_is_cut_off_where_that_costs_less():
    calls = [normal(256, 64, seed=k) for k in range(10)]
    quiet, _ = least_noise(join(list(map(take, calls))), UINT8)
    calls[3][0, 0] = 30.0
    scale, _ = least_noise(join(list(map(take, calls))), UINT8)
    assert quiet * 0.9 < scale < 30.0 / 255


def test_few_values_leave_room_for_those_to_come():
    """Over many draws, ranges that were fitted to few values clip less of the next ones than
    min/max, and have less noise there; where much was seen there is nothing to gain.
    """
    fitted = clipped = 0.0
    for seed in range(40):
        seen, coming = normal(4, 64, seed=seed), normal(4, 64, seed=1000 + seed)
        fitted += error(coming, *least_noise(expecting(take(seen)), UINT8))
        clipped += error(coming, *scale_and_zero(seen.flatten(), UINT8))
    assert fitted < 0.8 * clipped


def test_nothing_is_expected_beyond_a_bound():
    x = normal(64, 64).clamp(-1, 2)
    scale, zero = least_noise(expecting(take(x)), UINT8)
    wanted = scale_and_zero(torch.tensor([-1.0, 2.0]), UINT8)
    assert scale.item() == pytest.approx(wanted[0].item())
    assert zero == wanted[1]


def test_calls_count_by_their_values():
    calls = [normal(rows, 16, seed=rows) for rows in (1, 20, 300)]
    joined, ends = join(list(map(take, calls))), (-2.0, 2.5)
    both = torch.cat(calls)
    wanted = error(both, *scale_and_zero(torch.tensor(ends), UINT8))
    assert noise(joined, UINT8, ends) == pytest.approx(wanted, rel=1e-4)


def test_zeros_have_the_scale_one():
    assert least_noise(take(torch.zeros(4, 4)), UINT8)[0].item() == 1.0
