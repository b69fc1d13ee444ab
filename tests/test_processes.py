"""Processes of torch.distributed tune one model as one process does, and end together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpq_fx.launched import launched
from mpq_fx.passes.allocate.problem import NOISE
from mpq_fx.plan import load
from tests import losses
from tests.test_checkpoint import numbers, tune

ROOT = Path(__file__).parents[1]
SECONDS = 150  # that a test waits for its processes: a hang fails it

NETS = """
from tests.test_checkpoint import Net, batches

def make():
    return Net().eval(), batches()
"""

# Run by each process; argv: folder, what the second process does.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

import torch.distributed as dist

from mpq_fx import tuning
from mpq_fx.errors import MpqError
from mpq_fx.passes.analyze.replay import Replayer
from tests import losses
from tests.test_checkpoint import Net, batches, tune

folder, does = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()
tuning.LEAST_WAIT = 3.0
found = {}

def told(name, run):
    try:
        found[name] = run()
    except MpqError as error:
        found[name] = str(error)

def hex_of(plan):
    table = plan.tables["error"]
    parts = {"values": table.values, "pairs": table.pairs, "spread": table.spread}
    noise = plan.tables.get("noise")
    parts |= {"noise": noise.values} if noise else {}
    rows = {k: [[*key, float(x).hex()] for key, x in v.items()] for k, v in parts.items()}
    return rows | {"choices": {k: c.name for k, c in plan.choices.items()}}

if does == "tunes":
    for name in ("auto", "interlayer_hessian", "measured_pairs", "hessian_eigenvalue"):
        found[name] = hex_of(tune(sensitivity=name))
    found["interlayer_loss"] = hex_of(losses.tune(losses.Net()))
    told("labels", lambda: losses.tune(losses.Net(), loss=losses.of_labels(rank)))
    told("data", lambda: tune(data=batches(rank)))
    told("model", lambda: tune(Net(24 + 8 * rank).eval()))
    told("infeasible", lambda: tune(max_size=1e-3 if rank == 0 else None))
    told("again", lambda: hex_of(tune(sensitivity="kl")))
    if rank == 0:
        found["alone"] = hex_of(tune(sensitivity="kl", alone=True))
else:
    finish = Replayer.finish
    def stops(*args):
        os.kill(os.getpid(), signal.SIGKILL) if does == "dies" else time.sleep(600)
        return finish(*args)
    if rank == 1:
        Replayer.finish = stops
    told("stopped", lambda: tune(sensitivity="measured", time_budget=1.0))
(folder / f"{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(folder: Path, does: str) -> list[subprocess.Popen]:
    """Two processes without a launcher: none of them is ended because the other one is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    facts = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", SCRIPT, str(folder), does]
    return [
        subprocess.Popen(
            command, env={**environment(), **facts, "RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]


def ended(started: list[subprocess.Popen]) -> list[bytes]:
    try:
        return [process.communicate(timeout=SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()


def test_torchrun_writes_the_plan_that_one_process_writes(isolated, tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--target", "reference", "--tolerance", "0.1", "--sensitivity", "interlayer_kl"]
    command = [*torchrun, "-m", "mpq_fx", "tune", "nets:make", "-o", "plan.json", *options]
    done = subprocess.run(
        [*command, "--checkpoint", "plan.checkpoint"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan.json: error") == 1, "the second process prints nothing"
    plan, one = load(tmp_path / "plan.json"), tune(sensitivity="interlayer_kl")
    two, alone = plan.tables["error"], one.tables["error"]
    assert two.provenance["processes"] == 2
    assert numbers(two)[:3] == numbers(alone)[:3]
    assert plan.choices == one.choices
    assert sorted(p.name for p in tmp_path.iterdir() if not p.is_dir()) == [
        "nets.py",
        "plan.checkpoint",
        "plan.json",
        "plan.safetensors",
    ]
    torch.compiler.reset()
    again = tune(path=tmp_path / "plan.checkpoint", sensitivity="interlayer_kl").tables["error"]
    assert again.provenance["resumed"] == 6, "one process goes on where two were"
    assert numbers(again)[:3] == numbers(alone)[:3]


def test_processes_of_a_caller_tune_together(isolated, tmp_path):
    errors = ended(run(tmp_path, "tunes"))
    assert (tmp_path / "0.json").exists(), errors[0].decode()
    assert (tmp_path / "1.json").exists(), errors[1].decode()
    first, second = (json.loads((tmp_path / f"{k}.json").read_text()) for k in range(2))
    names = ("auto", "interlayer_hessian", "measured_pairs", "hessian_eigenvalue")
    for name in (*names, "interlayer_loss"):
        assert first[name] == second[name], "both have the plan of the first"
        torch.compiler.reset()
        is_loss = name == "interlayer_loss"
        plan = losses.tune(losses.Net()) if is_loss else tune(sensitivity=name)
        table = plan.tables["error"]
        for part in ("values", "pairs", "spread"):
            numbers_of = getattr(table, part).items()
            assert first[name][part] == [[*k, float(x).hex()] for k, x in numbers_of]
        if is_loss:
            noise = plan.tables[NOISE].values.items()
            assert first[name]["noise"] == [[*k, float(x).hex()] for k, x in noise]
        assert first[name]["choices"] == {k: c.name for k, c in plan.choices.items()}
    for told in (first, second):
        assert told["data"].startswith("the processes do not tune the same: 1 differs from 0")
        assert "at   data: call 0, call 1" in told["data"]
        assert "at   data: loss of call 0 " in told["labels"]
        assert "at   model: up.weight, up.bias, down.weight, " in told["model"]
    assert first["infeasible"].startswith("no plan")
    assert second["infeasible"].startswith("process 0 of 2 failed: no plan")
    assert first["again"] == second["again"] == first["alone"], "errors leave the group in order"


@pytest.mark.parametrize(("does", "what"), [("dies", "Connection "), ("hangs", "Timed out")])
def test_a_process_that_stops_ends_the_other_with_a_message(tmp_path, does, what):
    first, second = run(tmp_path, does)
    (errors,) = ended([first])
    second.kill()
    second.communicate()
    assert (tmp_path / "0.json").exists(), errors.decode()
    found = json.loads((tmp_path / "0.json").read_text())["stopped"]
    lost = "process 0 of 2 lost another one at 'measured_singles, call 0, part 0': "
    assert found.startswith(lost)
    assert what in found.removeprefix(lost), "the words around it are gloo's own"


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched(lambda is_first: ("net", "batches")) as given:
        assert given == (True, ("net", "batches"))
    assert not torch.distributed.is_initialized()


MODEL = """
import torch.distributed as dist
from mpq_fx.launched import launched
from mpq_fx.processes import together
from tests.test_checkpoint import Net, batches

with launched(lambda is_first: (Net().cuda(), batches())) as (is_first, (net, _)):
    assert dist.get_backend() == "nccl"
    with together(60.0) as processes:
        assert processes.exchange("ranks", processes.rank) == [*range(processes.size)]
        assert processes.rank == net.up.weight.device.index
print("told")
"""


@pytest.mark.gpu
def test_a_model_on_gpus_gets_nccl_and_tells_numbers_all_the_same():
    if torch.cuda.device_count() < 2:
        pytest.skip("nccl wants a GPU for each process")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--no-python", sys.executable, "-c", MODEL],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("told") == 2
