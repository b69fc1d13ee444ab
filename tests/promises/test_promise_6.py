"""A plan is a file: another process starts from it; it can be read, compared, solved again."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections import OrderedDict
from dataclasses import fields, replace

import pytest
import torch

import mpq_fx
from mpq_fx.facts import Choice
from mpq_fx.install import warn_of_machine
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.plan import load

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))
"""

SECOND = """
import sys
import torch
import mpq_fx
from net import Net
from mpq_fx.registry import bindings_of

model = Net().eval()
model.load_state_dict(torch.load("weights.pt"))
compiled = mpq_fx.apply(model, "plan.json")
x, y = torch.load("call.pt")
with torch.inference_mode():
    found = compiled(x)
((_, binding),) = bindings_of(compiled)
assert binding.installed is not None and binding.calls == 0, binding.reason
assert not torch.equal(y, model(x))
assert torch.equal(found, y), (found - y).abs().max()
print("same bits")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model tuned with static ranges, its plan and one call, on disk."""
    path = tmp_path_factory.mktemp("plan")
    (path / "net.py").write_text(NET)
    names: dict = {}
    exec(NET, names)
    torch.manual_seed(0)
    model = names["Net"]().eval()
    config = mpq_fx.Config(target="reference", tolerance=0.1, formats=["int8*uint8_tensor/static"])
    batches = [torch.randn(4, 32) for _ in range(5)]
    plan = mpq_fx.tune(model, batches, config=config, progress=False)
    plan.save(path / "plan.json")
    with torch.inference_mode():
        y = mpq_fx.apply(model, plan)(batches[0])
    torch.save((batches[0], y), path / "call.pt")
    torch.save(model.state_dict(), path / "weights.pt")
    return path, model, plan


def test_a_second_process_starts_without_calibration_and_gives_the_same_bits(folder):
    path, _, plan = folder
    assert {c.scaling for c in plan.choices.values()} == {"static"}
    assert second_process(path) == "same bits\n"


def second_process(path) -> str:
    """What a fresh process prints that applies plan.json to the weights beside it."""
    (path / "second.py").write_text(SECOND)
    done = subprocess.run(
        [sys.executable, "second.py"],
        cwd=path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_loaded_plan_is_the_saved_one(folder):
    path, _, plan = folder
    again = load(path / "plan.json")
    assert str(plan.diff(again)).startswith("no difference")
    for field in fields(plan):
        if field.name != "tensors":
            assert getattr(again, field.name) == getattr(plan, field.name), field.name
    assert all(torch.equal(again.tensors[name], t) for name, t in plan.tensors.items())


def test_a_person_can_read_the_file(folder):
    facts = json.loads((folder[0] / "plan.json").read_text())
    assert facts["choices"]["up"] == "int8*uint8_tensor/static"
    assert facts["tolerance"] == 0.1
    assert facts["tables"]["error"]["measure"] == "noise_power"


def test_the_plan_solves_again_for_another_budget_and_runs(isolated, folder):
    _, model, plan = folder
    tight = plan.resolve(tolerance=1e-6)
    assert {choice.name for choice in tight.choices.values()} == {"float32"}
    assert [unit for unit, *_ in plan.diff(tight).choices] == ["up", "down"]
    half = plan.resolve(objective="error", tolerance=None, max_size="0.7x")
    assert len({choice.name for choice in half.choices.values()}) == 2
    bits = plan.resolve(objective="error", tolerance=None, max_bits=21.0)
    assert bits.provenance["predicted"]["bits"] <= 21.0
    x = torch.randn(4, 32)
    with torch.inference_mode():
        assert torch.equal(mpq_fx.apply(model, tight)(x), model(x))
        assert not torch.equal(mpq_fx.apply(model, half)(x), model(x))


def test_the_frontier_is_in_the_plan_and_can_be_asked_for(folder):
    plan = folder[2]
    for resource in ("latency", "size"):
        errors = [point["error"] for point in plan.points if point["resource"] == resource]
        assert errors == sorted(errors, reverse=True)
        assert len(errors) > 1
    assert all(point["measured"] >= 0 for point in plan.points)
    sizes = plan.frontier("size")
    assert [p["size"] for p in sizes] == sorted(p["size"] for p in sizes)
    assert all(p["options"].get("objective", "size") == "size" for p in sizes)


def test_the_plan_of_another_model_is_refused(isolated, folder, world):
    model = world.Net().eval()
    compiled = mpq_fx.apply(model, folder[0] / "plan.json")
    for _ in range(2):  # a second try is refused as well, not answered in float
        with torch.inference_mode(), pytest.raises(mpq_fx.MpqError, match="has no site 'query'"):
            compiled(world.batch(0))


def test_a_plan_from_another_cpu_runs_with_a_warning(isolated, folder, caplog):
    plan = folder[2]
    facts = {**plan.provenance, "target": {"isa": "sse2"}}
    target = replace(REFERENCE, facts=lambda: {"isa": "avx2"})
    assert plan.target == "reference"
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        warn_of_machine(plan, target)
        assert not caplog.messages, "a plan that does not say is not suspected"
        warn_of_machine(replace(plan, provenance=facts), target)
    assert "another machine (isa sse2, here avx2)" in caplog.messages[0]


def test_a_plan_with_a_layer_more_than_the_model_is_refused_at_once(isolated):
    def blocks(depth: int) -> torch.nn.Module:
        return torch.nn.Sequential(
            OrderedDict(
                blocks=torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(depth)))
            )
        ).eval()

    config = mpq_fx.Config(target="reference", tolerance=0.1)
    batches = [torch.randn(4, 16) for _ in range(4)]
    plan = mpq_fx.tune(blocks(3), batches, config=config, progress=False)
    assert mpq_fx.apply(blocks(3), plan)
    with pytest.raises(mpq_fx.MpqError, match=r"has a layer 'blocks\.2', Sequential has not"):
        mpq_fx.apply(blocks(2), plan)


@pytest.mark.onednn
@pytest.mark.timeout(600)
def test_another_process_gives_the_same_bits_on_a_cpu(isolated, tmp_path):
    """In the mode of compilation that won here, whichever that is."""
    names: dict = {}
    exec(NET, names)
    model = names["Net"]().eval()
    config = mpq_fx.Config(target="cpu", tolerance=0.1, formats=["int8*uint8_tensor/static"])
    plan = mpq_fx.tune(
        model, [torch.randn(64, 32) for _ in range(5)], config=config, progress=False
    )
    (tmp_path / "net.py").write_text(NET)
    choices = {site: Choice("int8", "uint8_tensor", "static") for site in plan.choices}
    ledger = tuple(replace(row, mode="int8 templates") for row in plan.ledger)
    plan = replace(plan, choices=choices, ledger=ledger)  # so that float cannot have won
    plan.save(tmp_path / "plan.json")
    x = torch.randn(64, 32)
    with torch.inference_mode():
        y = mpq_fx.apply(model, plan)(x)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save((x, y), tmp_path / "call.pt")
    assert second_process(tmp_path) == "same bits\n"
