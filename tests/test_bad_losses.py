"""Losses that tell nothing, that nobody asks, or of models whose calls are not one graph."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq_fx
from mpq_fx.errors import CalibrationError, ConfigError, UnsupportedError
from mpq_fx.loss import checked
from mpq_fx.registry import bindings_of
from tests.losses import Net, batches, config, cross_entropy, tune


def test_a_loss_and_the_metric_that_asks_it_belong_together(isolated):
    model = Net().eval()
    with pytest.raises(ConfigError, match="a loss was given, and sensitivity='auto'") as caught:
        tune(model, sensitivity="auto")
    assert caught.value.fix == 'mpq_fx.Config(sensitivity="interlayer_loss")'
    with pytest.raises(ConfigError, match="needs a loss, and none was given") as caught:
        tune(model, loss=None)
    assert "loss=f" in caught.value.fix
    compiled = torch.compile(model, backend="mpq", options={"sensitivity": "interlayer_loss"})
    with torch.inference_mode(), pytest.raises(ConfigError, match="needs a loss"):
        compiled(batches()[0]["x"])
    with pytest.raises(ConfigError, match="belongs to tune"):
        mpq_fx.Config(sensitivity="interlayer_loss", loss=cross_entropy)


@pytest.mark.parametrize("on_error", ["raise", "float"])
def test_labels_that_a_batch_lacks_are_the_users_own_error_with_his_line(isolated, on_error):
    given = [{"x": b["x"]} if k == 2 else b for k, b in enumerate(batches())]
    with pytest.raises(KeyError, match="labels") as caught:
        tune(Net(), given, on_error=on_error)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.name, last.line) == (
        "cross_entropy",
        'return functional.cross_entropy(output, batch["labels"])',
    )


def test_labels_that_a_metric_lacks_are_the_users_own_error_too(isolated):
    def accuracy(net):
        batch = {"x": batches()[0]["x"]}
        return float((net(batch["x"]).argmax(-1) == batch["labels"]).float().mean())

    given = [b["x"] for b in batches()]
    with pytest.raises(KeyError, match="labels") as caught:
        mpq_fx.tune(
            Net().eval(),
            given,
            metric=accuracy,
            max_drop=0.1,
            config=config(sensitivity="auto"),
            progress=False,
        )
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "accuracy"


@pytest.mark.parametrize(
    ("loss", "kind", "match"),
    [
        (lambda o, b: o, ConfigError, r"batch 0 is a torch.float32 tensor of shape \(6, 4\)"),
        (lambda o, b: float(o.sum()), ConfigError, "batch 0 is float, not"),
        (lambda o, b: o.argmax(), ConfigError, "a torch.int64 tensor"),
        (lambda o, b: o.sum() / 0.0, CalibrationError, "batch 0 is -?inf on the float model"),
        (lambda o, b: o.sum() * torch.nan, CalibrationError, "is nan on the float model"),
        (lambda o, b: o.detach().sum(), ConfigError, "does not depend on the outputs"),
        (lambda o, b: (0 * o).sum(), CalibrationError, "the loss is flat"),
        (lambda o, b: b["x"].sum(), ConfigError, "does not depend on the outputs"),
    ],
    ids=["vector", "float", "integer", "inf", "nan", "detached", "flat", "of the batch alone"],
)
def test_a_loss_that_tells_nothing_is_refused(isolated, loss, kind, match):
    model = Net()
    with pytest.raises(kind, match=match) as caught:
        tune(model, loss=loss)
    assert caught.value.fix
    assert bindings_of(model) == []


def test_a_loss_of_one_number_in_any_shape_is_a_scalar():
    assert checked(lambda o, b: torch.ones(1, 1), None, None, 0).shape == ()


class Broken(Net):
    """Two graphs with sites in one call."""

    def forward(self, x):
        y = self.up(x)
        torch._dynamo.graph_break()  # noqa: TID251
        return self.down(y)


class Looped(nn.Module):
    """One graph, called twice with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x):
        for _ in range(2):
            torch._dynamo.graph_break()  # noqa: TID251
            x = self.step(x)
            torch._dynamo.graph_break()  # noqa: TID251
        return x

    def step(self, x):
        return functional.gelu(self.inner(x))


@pytest.mark.parametrize(("model", "match"), [(Broken, "2 graphs"), (Looped, "2 graphs|2 times")])
def test_a_call_of_several_graphs_is_refused(isolated, model, match):
    with pytest.raises(UnsupportedError, match=match) as caught:
        tune(model(), loss=lambda o, b: o.sum())
    assert 'sensitivity="interlayer_hessian"' in caught.value.fix
