"""A plan that was compiled without data is compared with its own operations on its first call."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import passes
from mpq_fx.errors import MpqError
from mpq_fx.passes.lower.reference import REFERENCE

MODE = "second"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.fixture
def compilers(monkeypatch):
    """A target with one mode; `factors[mode]` is what that compiler multiplies results by, and
    `factors["runs"]` counts calls of what it compiled.
    """
    factors = {"": 1.0, MODE: 1.0, "runs": 0}

    def compile_in_mode(gm, inputs, mode):
        made = REFERENCE.compile(gm, inputs, mode)

        def run(*args):
            factors["runs"] += 1
            return [factors[mode] * y for y in made.run(*args)]

        return replace(made, run=run)

    target = replace(
        REFERENCE, is_timed=True, modes=lambda planned: (MODE,), compile=compile_in_mode
    )
    monkeypatch.setattr(passes, "TARGETS", (target,))
    return factors


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def plan(isolated, compilers, net):
    options = {"tolerance": 0.05, "calibration_calls": 3, "objective": "size"}
    config = mpq_fx.Config(target="reference", **options)
    batches = [torch.randn(4, 32) for _ in range(4)]
    found = mpq_fx.tune(net, batches, config=config, progress=False)
    # Also where float won that race: this is about what a plan with a mode does.
    return replace(found, ledger=tuple(replace(row, mode=MODE) for row in found.ledger))


def test_a_right_plan_is_compared_once(plan, net, compilers, caplog):
    compiled, x = mpq_fx.apply(net, plan), torch.randn(4, 32)
    compilers["runs"] = 0
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        first = compiled(x)
        assert compilers["runs"] == 2  # for the comparison, and for the caller
        torch.testing.assert_close(compiled(x), first, rtol=0, atol=0)
    assert compilers["runs"] == 3
    assert not caplog.records
    assert 0 < (first - net(x)).norm() / net(x).norm() < 0.05


def test_a_plan_that_a_compiler_got_wrong_is_built_again(plan, net, compilers, caplog):
    compilers[MODE] = 1.5
    compiled, x = mpq_fx.apply(net, plan), torch.randn(4, 32)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            assert (compiled(x) - net(x)).norm() < 0.05 * net(x).norm()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"with {MODE} the plan computes something else than its operations do: 0.5; it is compiled"
    )


def test_so_is_one_for_another_shape(plan, net, compilers, caplog):
    compilers[MODE] = 1.5
    compiled = mpq_fx.apply(net, plan)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for x in (torch.randn(4, 32), torch.randn(3, 5, 32)):
            assert (compiled(x) - net(x)).norm() < 0.05 * net(x).norm()
    assert len(caplog.records) == 2


def test_weights_that_were_freed_cannot_be_built_again(plan, net, compilers):
    compilers[MODE] = 1.5
    compiled = mpq_fx.apply(net, plan, release=True)
    with pytest.raises(MpqError, match="apply the plan without release=True"), torch.no_grad():
        compiled(torch.randn(4, 32))


def test_weights_that_were_freed_are_not_looked_at_after_the_comparison(plan, net, compilers):
    x = torch.randn(4, 32)
    expected = net(x).detach()
    compiled = mpq_fx.apply(net, plan, release=True)
    with torch.no_grad():
        for _ in range(3):
            assert (compiled(x) - expected).norm() < 0.05 * expected.norm()


def test_weights_edited_before_the_first_call_count(plan, net):
    compiled, x = mpq_fx.apply(net, plan), torch.randn(4, 32)
    with torch.no_grad():
        compiled(x)
        net.down.weight.mul_(2)
        assert (compiled(x) - net(x)).norm() < 0.05 * net(x).norm()


def test_two_threads_make_the_first_call_together(plan, net, compilers):
    compilers[MODE] = 1.5
    compiled, x = mpq_fx.apply(net, plan), torch.randn(4, 32)
    found: list[torch.Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.append(compiled(x))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert all((y - net(x)).norm() < 0.05 * net(x).norm() for y in found)
        assert len(found) == 2
