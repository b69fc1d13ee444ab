"""A plan that was calibrated without data says so, wherever the batches went before."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch

import mpq_fx
from mpq_fx import synthetic
from mpq_fx.facts import Plan
from mpq_fx.report import report_of
from mpq_fx.synthetic import Arguments, Keywords, Origin, origin_of
from tests.small import Net, batch
from tests.synthetic.nets import Chain, Identity

MADE = Origin("distilled", "distilled from batch norm statistics", {"seed": 3})
NOTE = (
    "calibrated without data: 4 of 4 batches were distilled from batch norm statistics; errors and "
    "static ranges are of these, not of real inputs"
)


def made(seed: int) -> Arguments:
    return Arguments((batch(seed),), MADE)


def tune(batches, model=None, **options):
    config = mpq_fx.Config(**{"target": "reference", "tolerance": 0.1, **options})
    return mpq_fx.tune(model or Net().eval(), batches, config=config, progress=False)


@pytest.fixture(scope="module")
def plan():
    return tune([made(seed) for seed in range(4)])


def test_the_plan_says_it_in_its_notes_and_its_provenance(plan):
    assert plan.notes[0] == NOTE == plan.without_data
    assert plan.provenance["synthetic"]["batches"] == [{"method": "distilled", "seed": 3}] * 4


def test_the_file_the_re_solved_plan_and_every_report_say_it(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert (loaded.provenance, loaded.notes) == (plan.provenance, plan.notes)
    again = loaded.resolve(tolerance=0.05)
    assert again.without_data == NOTE
    assert NOTE in again.notes
    for each in (plan, again):
        report = report_of([("plan.json", each, "")])
        text = " ".join(str(report).split())
        assert "on synthetic inputs" in text
        assert NOTE in text
        report.to_html(tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert NOTE in page
        assert "on synthetic inputs</small>" in page


def test_a_model_that_runs_the_plan_says_it(isolated, plan):
    compiled = mpq_fx.apply(Net().eval(), plan)
    with torch.inference_mode():
        compiled(batch(0))
    assert NOTE in " ".join(str(mpq_fx.explain(compiled)).split())


def test_one_warning_names_what_to_do(isolated, caplog):
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        tune([made(seed) for seed in range(4)])
    assert [m for m in caplog.messages if "without data" in m] == [
        f"{NOTE}; compare the plan with float on a few real ones"
    ]


def test_a_plan_of_real_batches_says_nothing_of_it(isolated, caplog):
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        found = tune([(batch(seed),) for seed in range(4)])
    assert found.without_data == ""
    assert "synthetic" not in found.provenance
    assert not [m for m in (*caplog.messages, *found.notes) if "without data" in m]
    assert "synthetic" not in str(report_of([("p", found, "")]))


def test_choices_do_not_depend_on_the_marker(isolated, plan):
    real = tune([(batch(seed),) for seed in range(4)])
    assert real.choices == plan.choices
    assert real.error == plan.error


def test_a_mixture_is_counted(isolated):
    others = Origin("sampled", "sampled from the model itself")
    batches = [(batch(0),), made(1), Keywords({"x": batch(2)}, others), made(3), (batch(4),)]
    assert tune(batches).without_data.startswith(
        "calibrated in part without data: 2 of 5 batches were distilled from batch norm statistics,"
        " 1 of 5 batches were sampled from the model itself;"
    )


@pytest.mark.parametrize(
    "way",
    [
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        lambda x: [x, x][:1][0],
    ],
    ids=["copy", "deepcopy", "pickle", "slice"],
)
@pytest.mark.parametrize(
    "given",
    [made(1), Keywords({"x": batch(1)}, MADE)],
    ids=["arguments", "keywords"],
)
def test_a_batch_keeps_its_origin(way, given):
    found = way(given)
    assert type(found) is type(given)
    assert origin_of(found) == MADE
    (mine, theirs) = (tuple(x.values()) if isinstance(x, dict) else x for x in (found, given))
    assert torch.equal(mine[0], theirs[0])


def test_batches_are_stored_by_torch_and_come_back():
    file = io.BytesIO()
    torch.save([made(1)], file)
    file.seek(0)
    (found,) = torch.load(file, weights_only=False)
    assert origin_of(found) == MADE


def test_the_user_s_own_batches_have_no_origin():
    assert all(origin_of(x) is None for x in (batch(0), (batch(0),), {"x": batch(0)}))


def test_every_method_makes_batches_that_tune_takes(isolated):
    models = {"distilled": Identity().eval(), "sampled": Chain(12), "random_tokens": Chain(12)}
    shapes = {"distilled": (2, 3, 4, 4), "sampled": (4, 9), "random_tokens": (4, 9)}
    for method, make in synthetic.METHODS.items():
        found = tune(make(models[method], shapes[method], count=3), models[method].eval())
        assert found.provenance["synthetic"]["batches"][0]["method"] == method
        assert found.without_data.startswith("calibrated without data: ")
