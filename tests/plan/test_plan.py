"""load(save(plan)) == plan; every other file is refused with what is wrong and what to do."""

from __future__ import annotations

import json
import string
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.encoding import parse_choice
from mpq_fx.errors import PlanError
from mpq_fx.facts import Choice, Plan, Row, Site, SolverFacts, Table
from mpq_fx.formats import FORMATS
from mpq_fx.install import covers
from mpq_fx.plan import diff, load, save

word = st.text(string.ascii_lowercase + string.digits + "_.", min_size=1, max_size=12)
name = st.text(max_size=12)
number = st.floats(allow_nan=False)
scaling = st.sampled_from(["none", "static", "dynamic"])


def choices(names=word):
    return st.builds(Choice, names, names, scaling, st.tuples() | st.tuples(word, word))


known = choices(st.sampled_from(sorted(FORMATS)))
sizes = st.lists(st.integers(0, 9) | st.just("s0"), max_size=3).map(tuple)
sites = st.builds(
    Site,
    name,
    word,
    word,
    weight=st.none() | name,
    input_shape=sizes,
    weight_shape=st.lists(st.integers(1, 9), max_size=3).map(tuple),
    dtype=word,
    macs=st.integers(0, 2**50),
    group=st.none() | name,
)
optional = st.none() | number
rows = st.builds(
    Row,
    sites,
    name,
    reason=name,
    refusals=st.dictionaries(name, st.lists(name, max_size=2).map(tuple), max_size=2),
    predicted_error=optional,
    mode=name,
    ms_before=optional,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | name,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(name, inner),
    max_leaves=4,
)
tables = st.builds(
    Table,
    name,
    name,
    st.dictionaries(st.tuples(name, name), number, max_size=4),
    pairs=st.dictionaries(st.tuples(name, name, name, name), number, max_size=2),
    provenance=st.dictionaries(name, plain, max_size=2),
)
solvers = st.builds(
    SolverFacts,
    name,
    st.lists(name, max_size=2).map(tuple),
    number,
    number,
    number,
    number,
    st.dictionaries(name, number, max_size=2),
)
plans = st.builds(
    Plan,
    st.dictionaries(name, known, max_size=3),
    st.lists(rows, max_size=3).map(tuple),
    name,
    error=optional,
    errors=st.dictionaries(name, number, max_size=3),
    tables=st.dictionaries(name, tables, max_size=2),
    solver=st.none() | solvers,
    ties=st.lists(st.lists(name, max_size=3).map(tuple), max_size=2).map(tuple),
    points=st.lists(st.dictionaries(name, plain, max_size=2), max_size=2).map(tuple),
    notes=st.lists(name, max_size=2).map(tuple),
    fingerprint=st.dictionaries(name, plain, max_size=2),
)


@given(choices())
def test_a_choice_is_read_back_from_its_name(choice):
    assert parse_choice(choice.name) == choice


@pytest.mark.parametrize("text", ["", "*int8", "int8/sometimes", "int8/none", "int8/", "int8+"])
def test_what_is_not_the_name_of_a_choice_is_refused(text):
    with pytest.raises(PlanError, match="is not a choice"):
        parse_choice(text)


@given(plan=plans)
def test_a_plan_is_read_back_as_it_was_written(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    save(plan, path)
    assert load(path) == plan
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_the_order_of_the_tables_survives_because_the_first_choice_is_the_models_own(
    bert, tmp_path
):
    save(bert, tmp_path / "plan.json")
    found = load(tmp_path / "plan.json")
    assert list(found.tables["error"].values) == list(bert.tables["error"].values)


def test_equal_plans_are_equal_files_whatever_the_order_of_their_mappings(small, tmp_path):
    turned = replace(small, choices=dict(reversed(small.choices.items())))
    save(small, tmp_path / "a.json")
    save(turned, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_a_changed_choice_changes_few_lines(small, tmp_path):
    save(small, tmp_path / "a.json")
    save(
        replace(small, choices={**small.choices, "b": parse_choice("bfloat16")}),
        tmp_path / "b.json",
    )
    a, b = ((tmp_path / f"{n}.json").read_text().splitlines() for n in "ab")
    assert len(a) == len(b)
    assert sum(x != y for x, y in zip(a, b, strict=True)) == 1


@pytest.fixture
def with_tensors(small):
    scales = {
        "a|uint8_tensor|scale": torch.tensor(0.125),
        "b|int8|codes": torch.arange(12, dtype=torch.int8).reshape(3, 4).T,
        "b|bf16": torch.randn(3).to(torch.bfloat16),
    }
    return replace(small, tensors=scales)


def test_tensors_lie_beside_the_plan_and_keep_dtype_shape_and_bits(with_tensors, tmp_path):
    save(with_tensors, tmp_path / "plan.json")
    found = load(tmp_path / "plan.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    for key, tensor in with_tensors.tensors.items():
        assert found.tensors[key].dtype == tensor.dtype
        assert torch.equal(found.tensors[key], tensor)


def test_a_plan_without_tensors_is_one_file(small, tmp_path):
    save(small, tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_tensors_of_another_plan_are_refused(with_tensors, tmp_path):
    save(with_tensors, tmp_path / "plan.json")
    blob = bytearray((tmp_path / "plan.safetensors").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "plan.safetensors").write_bytes(blob)
    with pytest.raises(PlanError, match="checksum"):
        load(tmp_path / "plan.json")


def test_missing_tensors_are_named(with_tensors, tmp_path):
    save(with_tensors, tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(PlanError, match=r"needs .*plan\.safetensors"):
        load(tmp_path / "plan.json")


def test_a_plan_cannot_make_the_reader_open_a_file_elsewhere(with_tensors, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    save(with_tensors, folder / "plan.json")
    (folder / "plan.safetensors").rename(tmp_path / "plan.safetensors")
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace("plan.safetensors", "../plan.safetensors"))
    with pytest.raises(PlanError, match="needs"):
        load(folder / "plan.json")


def test_a_failed_write_leaves_the_old_plan(small, tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    save(small, path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(PlanError, match=r"cannot write the plan .*plan\.json: disk full"):
        save(replace(small, target="other"), path)
    assert load(path) == small
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def edited(path, change):
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


BROKEN = {
    "of another version": (lambda f: f.update(mpq_fx_plan=99), "version 99"),
    "without a version": (lambda f: f.pop("mpq_fx_plan"), "is not a plan"),
    "missing a field": (lambda f: f.pop("target"), "missing field 'target'"),
    "with an unknown field": (lambda f: f.update(tarqet=1), "unknown field 'tarqet'"),
    "without tensors": (lambda f: f.pop("tensors"), "missing field 'tensors'"),
    "of odd tensors": (lambda f: f.update(tensors="plan.safetensors"), "does not name a file"),
    "of an odd row": (lambda f: f["ledger"][0].pop("choice"), "missing field 'choice'"),
    "of an odd number": (lambda f: f.update(error="much"), "'much' stands where a float"),
    "of a truth for a number": (lambda f: f.update(error=True), "'True' stands where a float"),
    "of an odd size": (lambda f: f["ledger"][0]["site"].update(macs=0.5), "where a int"),
    "of an odd table": (lambda f: f["tables"]["error"].update(values=[["a", 1.0]]), "a row of 2"),
    "of an odd choice": (lambda f: f["choices"].update(a="int8/often"), "is not a choice"),
    "of an unknown format": (lambda f: f["choices"].update(a="int9"), "unknown format 'int9'"),
    "of lists for names": (lambda f: f.update(choices=[]), "where a dict"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_is_refused(change, message, small, tmp_path):
    path = tmp_path / "plan.json"
    save(small, path)
    edited(path, change)
    with pytest.raises(PlanError, match=message) as caught:
        load(path)
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "hello", '{"mpq_fx_plan": 1', "[]", "3", "\x00"])
def test_a_file_that_is_not_json_or_cut_short_is_refused(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"not JSON|not a plan"):
        load(tmp_path / "plan.json")


def test_a_plan_cut_at_any_place_is_refused(small, tmp_path):
    path = tmp_path / "plan.json"
    save(small, path)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:end])
        with pytest.raises(PlanError):
            load(path)


def test_a_file_that_is_not_there_and_one_of_other_bytes_are_refused(tmp_path):
    with pytest.raises(PlanError, match="No such file"):
        load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not JSON"):
        load(tmp_path / "plan.json")


def test_a_path_that_cannot_be_written_is_refused_before_anything_is(small, tmp_path):
    with pytest.raises(PlanError, match="does not exist"):
        save(small, tmp_path / "no" / "plan.json")
    with pytest.raises(PlanError, match="both the plan and its tensors"):
        save(small, tmp_path / "plan.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_difference_names_choices_and_numbers(small):
    other = replace(small, choices={"a": small.choices["a"], "c": small.choices["b"]}, error=0.02)
    found = diff(small, other)
    assert found.choices == (("b", "float32", ""), ("c", "", "float32"))
    assert found.numbers == (("error", 0.009, 0.02),)
    assert str(found).splitlines() == [
        "2 of 3 sites differ",
        "  b  float32  -> (absent)",
        "  c  (absent) -> float32",
        "  error: 0.009 -> 0.02",
    ]


def test_plans_predicted_for_two_devices_differ_in_the_milliseconds_of_layers(small):
    def lasting(ms: float, **raced: float) -> Plan:
        ledger = tuple(replace(row, ms_before=2.0, ms_after=ms) for row in small.ledger)
        return replace(small, ledger=ledger, latency_ms=raced)

    both, sites = diff(lasting(0.5), lasting(0.25)), len(small.ledger)
    assert sites > 0
    assert both.numbers == (("ms of layers", 0.5 * sites, 0.25 * sites),)
    assert not diff(lasting(0.5, plan=3.0), lasting(0.25, plan=3.0)).numbers, "calls were measured"


def test_a_plan_does_not_differ_from_itself(bert):
    assert str(diff(bert, bert)).startswith("no difference")


LINEAR = {"op": "linear", "weight_shape": [8, 8], "dtype": "float32"}
SUM = {"op": "residual", "weight_shape": [], "dtype": "float32"}


@pytest.mark.parametrize(
    ("wanted", "is_covered"),
    [
        ({"a": LINEAR}, True),
        ({"a": LINEAR, "new sum": SUM}, True),  # only this graph's shapes have it
        ({"a": LINEAR, "new": LINEAR}, False),
        ({"a": {**LINEAR, "dtype": "bfloat16"}}, False),
        ({"new sum": SUM}, False),  # a part of the model that the plan says nothing about
        ({}, False),
    ],
)
def test_a_plan_serves_another_graph_if_it_knows_all_its_weighted_sites(wanted, is_covered):
    assert covers({"a": LINEAR, "b": LINEAR}, wanted) is is_covered
