"""A tune that was killed goes on where it was, ends with the same table, and refuses to mix."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mpq_fx
from mpq_fx import checkpoint, identity
from mpq_fx.checkpoint import Journal
from mpq_fx.errors import CheckpointError
from mpq_fx.passes import METRICS
from mpq_fx.passes.allocate.problem import NOISE
from mpq_fx.passes.analyze.metrics.measured_singles import measured_singles
from tests import losses

IDENTITY = {"model": {"w": "a" * 64}, "options": {"sensitivity": "auto"}}


class Net(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = (nn.Linear(*s) for s in ((16, width), (width, 16), (16, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def batches(first: int = 0) -> list[torch.Tensor]:
    seeds = range(first, first + 8)
    return [torch.randn(4, 16, generator=torch.Generator().manual_seed(s)) for s in seeds]


def tune(model=None, data=None, *, path=None, alone=False, **options):
    config = mpq_fx.Config(**{"target": "reference", "tolerance": 0.1, **options})
    given = model or Net().eval(), data or batches()
    return mpq_fx.tune(*given, config=config, progress=False, checkpoint=path, alone=alone)


def numbers(table) -> tuple:
    """Everything in a table but how long it took and how it came about."""
    told = {k: v for k, v in table.provenance.items() if k not in ("seconds", "resumed")}
    parts = (dict(table.values), dict(table.pairs), dict(table.spread))
    return (*parts, *map(list, parts), told, table.metric)


def stop_after(monkeypatch, entries: int, error: type[BaseException]) -> None:
    append, seen = Journal.append, []

    def counted(journal, *args):
        if len(seen) == entries:
            raise error
        seen.append(1)
        append(journal, *args)

    monkeypatch.setattr(Journal, "append", counted)


CHILD = """
import sys, time, torch, mpq_fx
from tests.test_checkpoint import tune
from mpq_fx.passes.analyze.replay import Replayer
finish = Replayer.finish
def slowly(*args):
    time.sleep(0.2)
    return finish(*args)
Replayer.finish = slowly
tune(path=sys.argv[1], sensitivity="measured", time_budget=1000.0)
"""


def test_a_tune_that_the_system_kills_goes_on(isolated, tmp_path):
    path = tmp_path / "tune.checkpoint"
    command = [sys.executable, "-c", CHILD, str(path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as child:
        while not path.exists() or path.read_bytes().count(b'"unit"') < 2:
            assert child.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    whole = tune(sensitivity="measured")
    torch.compiler.reset()
    table = tune(path=path, sensitivity="measured").tables["error"]
    assert 2 <= table.provenance["resumed"] < 6
    assert numbers(table) == numbers(whole.tables["error"])


def test_after_ctrl_c_a_tune_goes_on(isolated, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            tune(path=tmp_path / "c")
    table = tune(path=tmp_path / "c").tables["error"]
    assert table.provenance["resumed"] == 4
    assert numbers(table) == numbers(tune().tables["error"])


def test_another_budget_goes_on_with_the_same_errors(isolated, tmp_path):
    metric = {"path": tmp_path / "c", "sensitivity": "measured"}  # "auto" looks at the clock
    one = tune(**metric)
    other = tune(**metric, tolerance=0.01, objective="size", time_budget=30.0)
    assert numbers(other.tables["error"]) == numbers(one.tables["error"])
    assert other.tables["error"].provenance["resumed"] == 6
    assert other.error <= 0.01


def changed_weight() -> nn.Module:
    model = Net().eval()
    with torch.no_grad():
        model.down.weight[3, 4] += 1e-3
    return model


@pytest.mark.parametrize(
    ("given", "what", "at"),
    [
        ({"model": changed_weight()}, "the model changed", "model: down.weight"),
        ({"model": Net(32).eval()}, "the model changed", "down.weight"),
        ({"data": batches(1)}, "the data changed", "data: call 0, call 1, call 2, 5 more"),
        ({"data": batches()[:-1]}, "the data changed", "data: call 7 (gone)"),
        ({"sensitivity": "kl"}, "the options changed", "options: sensitivity auto -> kl"),
        ({"formats": ["bfloat16"]}, "the options changed", "options: choices of up, choices"),
        (
            {"model": changed_weight(), "data": batches(1)},
            "the model and the data changed",
            "model: down.weight; data: call 0",
        ),
    ],
    ids=["weight", "shape", "data", "a call less", "metric", "formats", "two"],
)
def test_a_tune_of_something_else_is_refused_and_the_file_stays(
    isolated, tmp_path, given, what, at
):
    path = tmp_path / "c"
    tune(path=path)
    before = path.read_bytes()
    torch.compiler.reset()
    with pytest.raises(CheckpointError) as caught:
        tune(path=path, **given)
    assert what in caught.value.what
    assert at in caught.value.at
    assert caught.value.fix == f"delete {path} to begin again, or give checkpoint another file"
    assert path.read_bytes() == before


def test_a_tune_with_a_loss_goes_on(isolated, tmp_path, monkeypatch):
    whole = losses.tune(losses.Net())
    torch.compiler.reset()
    with monkeypatch.context() as patch:
        stop_after(patch, 1, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            losses.tune(losses.Net(), path=tmp_path / "c")
    torch.compiler.reset()
    plan = losses.tune(losses.Net(), path=tmp_path / "c")
    assert plan.tables["error"].provenance["resumed"] == 1
    for name in ("error", NOISE):
        assert numbers(plan.tables[name]) == numbers(whole.tables[name])
    assert plan.choices == whole.choices


def test_other_labels_or_no_loss_are_refused(isolated, tmp_path):
    """The calls are the same: labels are seen in what the loss makes of the float model."""
    path = tmp_path / "c"
    losses.tune(losses.Net(), path=path)
    torch.compiler.reset()
    with pytest.raises(CheckpointError, match="the data changed") as caught:
        losses.tune(losses.Net(), loss=losses.of_labels(1), path=path)
    assert caught.value.at.startswith("data: loss of call 0 ")
    torch.compiler.reset()
    with pytest.raises(CheckpointError, match="the data and the options changed") as caught:
        tune(losses.Net().eval(), [b["x"] for b in losses.batches()], path=path)
    assert "loss of call 0 (gone)" in caught.value.at
    assert "sensitivity interlayer_loss -> auto, loss given -> none" in caught.value.at


def test_another_version_is_refused(isolated, tmp_path, monkeypatch):
    tune(path=tmp_path / "c")
    monkeypatch.setattr(identity.mpq_fx, "__version__", "0.0.7")
    with pytest.raises(CheckpointError, match="the versions changed") as caught:
        tune(path=tmp_path / "c")
    assert "mpq-fx 0.1.0 -> 0.0.7" in caught.value.at


def test_ties_and_static_ranges_are_part_of_what_a_table_is_of(isolated):
    """Ranges come from calls that choose nothing: those are data as well."""
    found = []

    def metric(task):
        found.append(task)
        return measured_singles(task)

    original = METRICS._own["measured"]
    METRICS._own["measured"] = metric
    try:
        tune(sensitivity="measured")
    finally:
        METRICS._own["measured"] = original
    (task,) = found
    assert task.replay.scales, "the choices of this target have static ranges"
    assert len(task.records) < len(batches())


def test_two_graphs_have_their_own_entries(isolated, tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x)
            torch._dynamo.graph_break()  # noqa: TID251 -- there is no public spelling
            return self.two(y)

    whole = tune(Two().eval())
    torch.compiler.reset()
    tune(Two().eval(), path=tmp_path / "c")
    torch.compiler.reset()
    again = tune(Two().eval(), path=tmp_path / "c")
    assert set(again.choices) == {"one", "two"}
    assert numbers(again.tables["error"])[:3] == numbers(whole.tables["error"])[:3]
    journal = Journal(tmp_path / "c")
    assert set(journal._identities) == {0, 1}
    journal.close()


ENTRIES = [
    ((0, "call 0", "up"), {"seconds": 1.0}, {"powers": torch.tensor([0.1, float("inf")]).double()}),
    (
        (0, "call 0", "dówn\n"),
        {"seconds": 2.0},
        {"powers": torch.zeros(1), "rows": torch.ones(2, 3)},
    ),
    ((1, "call 0", "up"), {"seconds": 3.0}, {"powers": torch.zeros(0)}),
]


def write(path: Path, entries=ENTRIES) -> None:
    with closing(Journal(path)) as journal:
        journal.claim(0, IDENTITY)
        for entry in entries:
            journal.append(*entry)


def read(path: Path) -> list:
    """The entries that a file has, of those that were written."""
    journal = Journal(path)
    found = []
    for (graph, stage, unit), facts, tensors in ENTRIES:
        if unit in journal.known(graph, stage):
            seen, given = journal.read(graph, stage, unit)
            assert seen == facts
            assert given.keys() == tensors.keys()
            assert all(torch.equal(given[name], x) for name, x in tensors.items())
            found.append(unit)
    journal.close()
    return found


def test_entries_are_read_as_they_were_written(tmp_path):
    write(tmp_path / "c")
    assert read(tmp_path / "c") == ["up", "dówn\n", "up"]


def test_a_file_cut_anywhere_has_its_whole_entries_and_takes_more(tmp_path):
    write(tmp_path / "c")
    blob = (tmp_path / "c").read_bytes()
    counts = set()
    for size in {*range(0, len(blob), 5), *range(len(blob) - 9, len(blob) + 1)}:
        (tmp_path / "d").write_bytes(blob[:size])
        found = read(tmp_path / "d")
        assert found == ["up", "dówn\n", "up"][: len(found)]
        counts.add(len(found))
        if size % 97 == 0:
            write(tmp_path / "d", ENTRIES)
            assert len(read(tmp_path / "d")) == 3
    assert counts == {0, 1, 2, 3}


@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_an_error_or_cuts_and_never_another_number(tmp_path_factory, where, flip):
    path = tmp_path_factory.mktemp("flip") / "c"
    write(path)
    blob = bytearray(path.read_bytes())
    blob[int(where * len(blob))] ^= flip
    path.write_bytes(blob)
    try:
        found = read(path)
    except CheckpointError:
        assert path.read_bytes() == blob, "nothing is lost"
    else:
        assert found == ["up", "dówn\n", "up"][: len(found)]
        assert len(found) < 3


def test_a_corrupt_file_is_named_with_the_place_and_what_keeps_the_rest(tmp_path):
    path = tmp_path / "c"
    write(path)
    blob = path.read_bytes()
    at = blob.index(b'"d\\u00f3wn') if b'"d\\u00f3wn' in blob else blob.index("dówn".encode())
    path.write_bytes(blob[:at] + b"D" + blob[at + 1 :])
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert f"the checkpoint {path} is corrupt" in caught.value.what
    assert "the 1 entries before it are whole" in caught.value.what
    _, _, size, *_ = caught.value.fix.split()
    path.write_bytes(path.read_bytes()[: int(size)])
    assert read(path) == ["up"]


def test_another_file_is_refused_and_stays_as_it_is(isolated, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"mpq_fx_plan": 1}))
    with pytest.raises(CheckpointError, match="is no checkpoint, and is left as it is"):
        tune(path=path)
    assert json.loads(path.read_text()) == {"mpq_fx_plan": 1}
    path.write_text("mpq-fx checkpoint 9\n")
    with pytest.raises(CheckpointError, match="of version 9, this mpq-fx reads version 1"):
        tune(path=path)


def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path):
    with pytest.raises(CheckpointError, match=r"the folder .*none does not exist"):
        tune(path=tmp_path / "none" / "c")
    with pytest.raises(CheckpointError, match=r"cannot be opened: Is a directory"):
        tune(path=tmp_path)


def test_a_checkpoint_in_use_is_refused(tmp_path):
    journal = Journal(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is in use by another process"):
        Journal(tmp_path / "c")
    journal.close()
    Journal(tmp_path / "c").close()


def test_a_disk_that_is_full_is_an_error_with_its_reason(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            write(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(tmp_path / "c") == []


def test_what_is_different_is_told_in_words():
    old = {"options": {"a": "1", "b": "2", "c": "3", "d": "4"}, "data": {"x": "0" * 64}}
    new = {"options": {"a": "2", "b": "3", "c": "4", "e": "5"}, "data": {"x": "1" * 64}}
    told = checkpoint.described(old, new)
    assert told == "options: a 1 -> 2, b 2 -> 3, c 3 -> 4, 2 more; data: x"
    assert checkpoint.described(old, old) == ""
    assert checkpoint.differences(old, new) == ["the options", "the data"]
