"""Distilled inputs have the statistics that batch norms ask for, and the model never notices."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.errors import CalibrationError, ConfigError, MpqError, WeightError
from mpq_fx.registry import bindings_of
from mpq_fx.synthetic import distilled
from mpq_fx.synthetic.distill import Target, distance
from tests.synthetic.nets import DEVIATIONS, MEANS, Identity

SHAPE = (8, 3, 6, 6)


def few(model, **options):
    return distilled(model, SHAPE, **{"count": 1, "steps": 3, **options})


def everything(model: nn.Module):
    """All that could be changed by running a model, and what is not in its state."""
    return {
        "values": copy.deepcopy(model.state_dict()),
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "ids": [id(t) for t in (*model.parameters(), *model.buffers())],
        "wishes": [(p.requires_grad, p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
    }


def assert_same(one, other) -> None:
    values, others = one.pop("values"), other.pop("values")
    assert one == other
    assert all(torch.equal(values[name], others[name]) for name in values)


def test_the_optimum_behind_an_identity_has_the_statistics_of_the_batch_norm():
    ((x,),) = distilled(Identity().eval(), SHAPE, count=1)
    channels = x.transpose(0, 1).flatten(1)
    assert torch.allclose(channels.mean(1), torch.tensor(MEANS), atol=1e-2)
    assert torch.allclose(channels.std(1), torch.tensor(DEVIATIONS), atol=1e-2)


def test_the_loss_falls_at_least_tenfold_from_noise():
    (batch,) = distilled(Identity().eval(), SHAPE, count=1)
    first, last = batch.origin.facts["loss"]
    assert 0 <= last <= first / 10


def test_the_loss_that_is_told_is_that_of_the_batch():
    model = Identity().eval()
    (batch,) = few(model, steps=20)
    target = Target("norm", torch.tensor(MEANS), torch.tensor(DEVIATIONS))
    assert batch.origin.facts["loss"][1] == pytest.approx(float(distance(batch[0], target)), 1e-4)


def test_more_steps_never_end_in_a_worse_batch_even_where_steps_are_too_long():
    model = Identity().eval()
    runs = [few(model, steps=steps, learning_rate=20.0)[0] for steps in (1, 2, 4, 8, 16)]
    target = Target("norm", torch.tensor(MEANS), torch.tensor(DEVIATIONS))
    losses = [float(distance(x, target)) for (x,) in runs]
    assert losses == sorted(losses, reverse=True)
    assert losses == pytest.approx([run.origin.facts["loss"][1] for run in runs], rel=1e-4)


def test_the_distance_is_that_of_mean_and_deviation_over_batch_and_positions():
    x = torch.randn(4, 3, 2, 5)
    target = Target("", torch.tensor(MEANS), torch.tensor(DEVIATIONS))
    wanted = 0.0
    for channel in range(3):
        values = x[:, channel].flatten().double()
        mean = values.sum() / 40
        deviation = ((values - mean).square().sum() / 39).sqrt()
        wanted += (mean - MEANS[channel]) ** 2 + (deviation - DEVIATIONS[channel]) ** 2
    assert float(distance(x, target)) == pytest.approx(float(wanted), rel=1e-4)


def test_one_value_per_channel_has_no_deviation():
    target = Target("", torch.zeros(3), torch.full((3,), 1e-3))
    assert float(distance(torch.zeros(1, 3), target)) == pytest.approx(0.0, abs=1e-9)


def test_the_input_is_held_to_the_mean_and_deviation_that_it_is_normalized_to():
    model = Identity().eval()
    nn.init.zeros_(model.conv.weight)  # the batch norm asks nothing of the input
    wanted = {"mean": (5.0, 0.0, -5.0), "std": (2.0, 1.0, 0.5)}
    ((start,),) = few(model, steps=1, learning_rate=1e-9, **wanted)
    ((x,),) = few(model, steps=100, **wanted)
    for found, tolerance in ((start, 0.5), (x, 2e-2)):
        channels = found.transpose(0, 1).flatten(1)
        assert torch.allclose(channels.mean(1), torch.tensor(wanted["mean"]), atol=tolerance)
        assert torch.allclose(channels.std(1), torch.tensor(wanted["std"]), atol=tolerance)


def test_the_same_seed_gives_the_same_batches_and_a_longer_run_begins_with_them():
    model = Identity().eval()
    state = torch.get_rng_state()
    one, two, longer = few(model, count=2), few(model, count=2), few(model, count=3)
    assert torch.equal(torch.get_rng_state(), state), "the user's random numbers are left alone"
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, longer, strict=False))
    assert not torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], few(model, seed=1)[0][0])


class Counting(Identity):
    """Forward writes a buffer in place, replaces another, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.fails = False

    def forward(self, x):
        self.calls += 1
        self.last = x.sum().detach()
        y = super().forward(x)
        if self.fails:
            raise KeyError("the user's own")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_also_after_its_own_error(fails):
    model = Counting()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    model.fails = fails
    before = everything(model)
    if fails:
        with pytest.raises(KeyError, match="the user's own"):
            few(model)
    else:
        few(model)
    assert before["modes"].count(True) == 3
    assert_same(before, everything(model))


def test_gradients_reach_the_input_only_under_any_grad_mode():
    model = Identity().eval()
    with torch.inference_mode():
        ((x,),) = few(model)
    with torch.no_grad():
        ((again,),) = few(model)
    assert not x.is_inference()
    assert not x.requires_grad
    assert torch.equal(x, again)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_made_in_inference_mode_is_distilled_like_any_other():
    with torch.inference_mode():
        model = Identity().eval()
    assert torch.equal(few(model)[0][0], few(Identity().eval())[0][0])


def test_a_compiled_model_is_run_as_it_is_and_nothing_compiled(isolated):
    model, graphs = Identity().eval(), []
    wanted = few(model)
    model.compile(backend=lambda gm, inputs: graphs.append(gm) or gm.forward)
    for each in (model, torch.compile(model, backend="mpq")):
        assert torch.equal(few(each)[0][0], wanted[0][0])
    assert not graphs
    assert bindings_of(model) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batches_have_the_type_of_the_model(dtype):
    model = Identity().eval().to(dtype)
    (batch,) = few(model, steps=30)
    assert batch[0].dtype == dtype
    assert batch.origin.facts["loss"][1] < batch.origin.facts["loss"][0] * 0.9
    assert model(*batch).dtype == dtype


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), (16, 5)),
        (nn.Sequential(nn.Conv1d(2, 7, 3), nn.BatchNorm1d(7)), (4, 2, 9)),
        (nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4)), (2, 1, 3, 3, 3)),
    ],
    ids=["rows", "sequences", "volumes"],
)
def test_any_shape_of_input_is_distilled(model, shape):
    with torch.no_grad():
        model[1].running_mean.fill_(0.3)
    (batch,) = distilled(model.eval(), shape, count=1, steps=40)
    assert batch[0].shape == shape
    assert batch.origin.facts["loss"][1] < batch.origin.facts["loss"][0]


def test_a_batch_norm_that_runs_twice_counts_twice_and_one_that_does_not_run_not_at_all():
    class Twice(Identity):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)) + self.norm(self.conv(x))

    once, twice = few(Identity().eval(), steps=1), few(Twice().eval(), steps=1)
    assert twice[0].origin.facts["loss"][0] == pytest.approx(2 * once[0].origin.facts["loss"][0])


def test_a_frozen_batch_norm_of_another_library_is_known_by_its_buffers():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.full((3,), 4.0))
            self.register_buffer("running_var", torch.full((3,), 0.25))

        def forward(self, x):
            scale = (self.running_var + 1e-5).rsqrt()
            return (x - self.running_mean[:, None, None]) * scale[:, None, None]

    ((x,),) = distilled(Frozen().eval(), SHAPE, count=1)
    assert x.mean() == pytest.approx(4.0, abs=0.02)
    assert x.std() == pytest.approx(0.5, abs=0.02)


def test_a_bar_is_shown_only_if_asked_for(capsys):
    few(Identity().eval())
    assert capsys.readouterr() == ("", "")


def test_statistics_of_a_new_model_are_warned_of_once(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        few(model)
        few(Identity().eval())
    (message,) = caplog.messages
    assert "was it trained?" in message


# --- what cannot be distilled ------------------------------------------------------------------


class Two(Identity):
    def forward(self, x, scale):
        return super().forward(x * scale)


class Cut(Identity):
    def forward(self, x):
        with torch.no_grad():
            x = self.conv(x)
        return self.norm(x)


class Elsewhere(Identity):
    def forward(self, x):
        return self.conv(x)


class Untracked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3))


@pytest.mark.parametrize(
    ("model", "kind", "message", "fix"),
    [
        (nn.Linear(6, 6), CalibrationError, "Linear has no batch norm", "tune(model, batches)"),
        (Untracked(), CalibrationError, "has no batch norm with running", "random_tokens"),
        (Two(), ConfigError, "Two.forward needs 2 inputs (x, scale)", "a module of one input"),
        (Cut(), CalibrationError, "no gradient of the batch norms", "torch.no_grad() or detach()"),
        (Elsewhere(), CalibrationError, "calls none of the batch norms: norm", "your own"),
    ],
)
def test_a_model_that_cannot_be_distilled_says_why_and_what_to_do(model, kind, message, fix):
    with pytest.raises(MpqError) as caught:
        few(model.eval())
    assert type(caught.value) is kind
    assert message in caught.value.what
    assert fix in caught.value.fix


def test_instance_norm_is_no_batch_norm_though_it_has_running_statistics():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True))
    with pytest.raises(CalibrationError, match="no batch norm with running statistics"):
        few(model.eval())


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite_are_named(buffer):
    model = Identity().eval()
    getattr(model.norm, buffer)[1] = float("nan")
    with pytest.raises(WeightError, match=f"{buffer} of the batch norm norm holds NaN or inf"):
        few(model)


def test_values_that_stop_being_finite_name_the_layer():
    class Log(Identity):
        def forward(self, x):
            return self.norm(torch.log(self.conv(x)))

    with pytest.raises(CalibrationError, match="NaN or inf at the batch norm norm") as caught:
        few(Log().eval())
    assert "a smaller learning_rate" in caught.value.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0 must be above 0"),
        ({"steps": -1}, "steps=-1 must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"mean": (0.0, 1.0)}, "mean has 2 numbers for 3 channels"),
        ({"mean": 0.0, "std": 0.0}, "std=0.0 must be above 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        few(Identity().eval(), **options)
    assert caught.value.what == message
    assert caught.value.fix


@pytest.mark.parametrize("shape", [8, (8,), (8, 0), (8, 3.0), (True, 3), ()])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ConfigError, match="is not the size of a batch and of what is in it"):
        distilled(Identity().eval(), shape)


def test_a_shape_that_the_model_refuses_is_told_in_its_own_words():
    model = Identity().eval()
    before = everything(model)
    with pytest.raises(CalibrationError, match="Identity refuses an input of shape") as caught:
        distilled(model, (2, 5, 4, 4))
    assert "channels" in caught.value.what
    assert "a shape that it takes" in caught.value.fix
    assert_same(before, everything(model))


def test_a_model_without_values_is_refused():
    with pytest.raises(ConfigError, match="meta device"):
        few(Identity().eval().to("meta"))


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_distilled_there_from_the_same_start():
    (batch,) = few(Identity().eval().cuda())
    (wanted,) = few(Identity().eval())
    assert batch[0].is_cuda
    assert torch.allclose(batch[0].cpu(), wanted[0], atol=1e-3)


def test_distilled_batches_go_into_tune_unchanged(isolated):
    model = Identity().eval()
    config = mpq_fx.Config(target="reference", tolerance=0.1)
    plan = mpq_fx.tune(model, few(model, count=3), config=config, progress=False)
    assert set(plan.choices) >= {"conv", "head"}
