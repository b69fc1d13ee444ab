"""The report tells what runs, why, and what is next: as text, as JSON, and as one page."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mpq_fx.errors import UnsupportedError
from mpq_fx.facts import Row, Site
from mpq_fx.report import coverage, dynamo_lines, offers, report_of, steps, weight_bytes
from mpq_fx.report_svg import Axis, Bar, columns, rows
from mpq_fx.report_text import shorten, text

DYNAMO = {
    "graph_breaks": {"call to print\n  at model.py": 2},
    "frames": {"total": 3, "ok": 2},
    "recompile_limit": 1,
    "unimplemented": {"torch.vmap": 1},
}
TOTALS = {"parameters": 111_000_000, "captured": 109_000_000}


@pytest.fixture
def report(bert):
    plans = [("graph 0", bert, ""), ("graph 1", None, "training graph: float")]
    return report_of(plans, dynamo=DYNAMO, parameters=TOTALS)


def test_every_site_has_a_line_and_every_line_fits(report):
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 120
    for row in report.rows:
        tail = row.site.name.rpartition("layer.")[2]
        assert any(tail in line and row.choice in line for line in lines), row.site.name


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_it_fits_other_terminals(report, width):
    lines = text(report, width).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("attention.self.key" in line for line in lines) == 12


def test_it_says_what_was_gained_and_against_what(report):
    found = str(report)
    assert "error 0.0187 of 0.02 allowed · 13.1 ms, float 46 ms (3.51×)" in found
    assert re.search(r"all int8 .* 9.3e-2 +- +error above the 0.02 allowed", found)
    assert re.search(r"plan .* 13.1   1.9e-2 +- +runs", found)
    assert "optimal (proved best)" in found
    assert "time_budget of 60 s" in found


def test_it_says_what_to_type_next(report, bert):
    assert offers(bert)
    for step in offers(bert):
        assert step.line in str(report)
        assert f'options={{"tolerance": {step.options["tolerance"]}}}' in step.line
    speedups = [step.speedup for step in offers(bert)]
    assert speedups == sorted(speedups)
    assert speedups[0] > 1.02


def test_the_point_of_the_frontier_that_runs_is_as_fast_as_what_runs(small):
    row = small.ledger[0]
    points = (
        {"latency": 5.0 + row.ms_after + 6.0, "error": 0.01, "options": {}},
        {"latency": 5.0 + 1.0 + 2.0, "error": 0.03, "options": {"tolerance": 0.03}},
    )
    points = tuple({"resource": "latency", **point} for point in points)
    smallest = {"resource": "size", "latency": 1.0, "error": 0.5, "options": {}}
    now, faster = steps(replace(small, points=(*points, smallest)))
    assert now.ms == small.latency_ms["plan"]
    assert now.speedup == 1.0
    assert faster.ms == 12.0 - 4.0


def test_reasons_are_numbered_once_and_counted(report):
    found = str(report)
    assert "not int4*float32: weight-only int4 needs one row, this site has 128 (73 sites)" in found
    assert found.count("weight-only int4 needs one row") == 1


def test_a_site_that_stayed_says_why(small):
    found = str(report_of([("graph 0", small, "")]))
    assert re.search(r"^b .* float32 .* 1$", found, re.MULTILINE)
    assert "1  in float: float is the fastest here (1 site)" in found


def test_graphs_without_a_plan_give_their_reason(report):
    assert "graph 1\n  training graph: float" in str(report)


def test_nothing_compiled_is_said_and_not_an_error():
    empty = report_of([])
    assert "no graph of this model was compiled" in str(empty)
    assert json.loads(empty.to_json())["graphs"] == []


def test_what_dynamo_did_not_hand_over_is_listed(report):
    assert dynamo_lines(DYNAMO) == (
        "graph break (2×): call to print",
        "recompile limit hit 1×: those calls run eager, without mpq; torch.compile(model, "
        'backend="mpq", dynamic=True) recompiles less',
        "1 of 3 frames were skipped by Dynamo and run eager",
        "unsupported by Dynamo (1×): torch.vmap",
    )
    assert "graph break (2×)" in str(report)
    assert dynamo_lines({"frames": {"total": 2, "ok": 2}}) == ()


def test_coverage_is_of_all_parameters_and_adds_up(report):
    shares = coverage(report)
    assert sum(share.weights for share in shares) == pytest.approx(1.0)
    assert sum(share.macs or 0.0 for share in shares) == pytest.approx(1.0)
    assert [share.choice for share in shares][-1] == "not captured"
    assert shares[-1].weights == pytest.approx(2 / 111)
    assert sum(share.sites for share in shares) == len(report.rows)


def test_a_weight_that_two_sites_share_counts_once():
    rows = [
        Row(
            Site(name, "linear", name, weight="w", weight_shape=(10, 10), macs=100),
            "bfloat16",
            weight_bytes=200,
        )
        for name in ("tied", "tied#2")
    ]
    plan = replace_ledger(rows)
    (share,) = coverage(report_of([("graph 0", plan, "")]))
    assert (share.sites, share.bytes_before, share.bytes_after) == (2, 400, 200)
    assert share.weights == 1.0


def test_a_weight_that_two_sites_store_in_two_formats_was_one_before():
    sites = [
        Site(name, "linear", name, weight="w", weight_shape=(10, 10), macs=100)
        for name in ("tied", "tied#2")
    ]
    rows = [Row(sites[0], "bfloat16", weight_bytes=200), Row(sites[1], "int8", weight_bytes=140)]
    first, second = coverage(report_of([("graph 0", replace_ledger(rows), "")]))
    assert (first.choice, first.weights, first.bytes_before, first.bytes_after) == (
        "bfloat16", 1.0, 400, 200,
    )  # fmt: skip
    assert (second.choice, second.weights, second.bytes_before, second.bytes_after) == (
        "int8", 0.0, 0, 140,
    )  # fmt: skip
    assert weight_bytes(replace_ledger(rows)) == (400, 340)


def replace_ledger(rows):
    from mpq_fx.facts import Plan

    return Plan(choices={}, ledger=tuple(rows), target="reference")


def test_json_has_all_of_it(report, bert):
    found = json.loads(report.to_json())
    plan = found["graphs"][0]["plan"]
    assert len(plan["ledger"]) == len(bert.ledger)
    assert plan["ledger"][1]["refusals"] == {k: list(v) for k, v in bert.ledger[1].refusals.items()}
    assert found["graphs"][1] == {
        "label": "graph 1",
        "plan": None,
        "rows": [],
        "steps": [],
        "reason": "training graph: float",
        "elsewhere": "",
    }
    assert found["dynamo"] == DYNAMO
    assert found["parameters"] == TOTALS


class Page(HTMLParser):
    """Collects tags and attributes, and fails on a tag that is closed out of order."""

    VOID = ("meta", "input", "br", "rect", "line", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(report, tmp_path):
    path = report.to_html(tmp_path / "report.html")
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(page):
    parser = Page()
    parser.feed(page)
    assert not parser.open
    assert not parser.links
    assert not re.search(r"url\(|@import|https?://", page)


def test_without_the_packages_of_the_extra_the_error_says_what_to_install(
    report, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "mpq_fx.report_html", raising=False)
    with pytest.raises(UnsupportedError, match="needs jinja2") as caught:
        report.to_html(tmp_path / "report.html")
    assert caught.value.fix == "pip install 'mpq-fx[report]'"
    assert not list(tmp_path.iterdir())


def test_the_page_has_its_pictures_and_each_has_words(page):
    parser = Page()
    parser.feed(page)
    pictures = [attrs for tag, attrs in parser.tags if tag == "svg"]
    labels = " | ".join(attrs["aria-label"] for attrs in pictures)
    for words in (
        "error per site",
        "Bits per weight",
        "before and after",
        "latency against",
        "per variant",
        "per stage",
        "Weights",
    ):
        assert words in labels
    assert all(attrs["role"] == "img" for attrs in pictures)
    assert "nan" not in re.sub(r"<[^>]*title[^>]*>[^<]*", "", page).lower().split()


def test_the_page_shows_every_site_and_the_essentials_without_scripts(page, report):
    still = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    for row in report.rows:
        assert row.site.name in still
    for words in (
        "3.51×",
        "weight-only int4 needs one row",
        "options={&#34;tolerance&#34;",
        "training graph: float",
        "graph break (2×)",
        "not captured",
        "OPTIMAL",
    ):
        assert words in still


def test_names_cannot_inject_markup(small, tmp_path):
    evil = "<script>alert(1)</script>"
    rows = [
        replace(row, site=replace(row.site, name=evil + row.site.name), reason=evil)
        for row in small.ledger
    ]
    plan = replace(small, ledger=tuple(rows), notes=(evil,), latency_ms={evil: 1.0, "plan": 2.0})
    path = report_of([(evil, plan, evil)], dynamo={"graph_breaks": {evil: 1}}).to_html(
        tmp_path / "report.html"
    )
    assert "alert(1)</script>" not in path.read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"ledger": ()},
        {"latency_ms": {}, "errors": {}, "error": None},
        {"tolerance": None},
        {"timings": {"solve": 0.0}},
        {"latency_ms": {"plan": 0.0}},
    ],
)
def test_a_plan_with_gaps_can_be_reported(changes, small, tmp_path):
    found = report_of([("graph 0", replace(small, **changes), "")])
    assert "graph 0" in str(found)
    assert "graph 0" in found.to_html(tmp_path / "report.html").read_text()


def test_a_plan_solved_again_is_reported_as_predicted(small, tmp_path):
    found = report_of([("graph 0", small.resolve(tolerance=0.03), "")])
    assert "predicted error 0.02236" in str(found)
    assert "not measured" in str(found)
    assert "predicted</small>" in found.to_html(tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("short", "short"),
        ("encoder.layer.10.attention.output", "…layer.10.attention.output"),
        ("x" * 40, "…" + "x" * 27),
    ],
)
def test_long_names_keep_their_end(name, shown):
    assert shorten(name, 28) == shown


def test_an_axis_maps_its_ends_to_its_pixels():
    linear, log = Axis(0.0, 8.0, 100.0, 0.0), Axis(1e-3, 1.0, 0.0, 300.0, log=True)
    assert (linear(0.0), linear(8.0), linear(2.0)) == (100.0, 0.0, 75.0)
    assert linear.ticks == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert log(1e-2) == pytest.approx(100.0)
    assert log.ticks == pytest.approx([1e-3, 1e-2, 1e-1, 1.0])


def test_columns_stand_in_proportion():
    drawn = columns("sizes", [Bar("a", 1.0, "c0", "a"), Bar("b", 2.0, "c1", "b")], "ms")
    low, high = (float(h) for h in re.findall(r'class="c\d".*?height="([\d.]+)"', drawn))
    assert high == pytest.approx(2 * low, abs=0.2)


def test_a_long_name_has_room_beside_its_bar():
    name = "all bfloat16, int8 templates, C++ wrapper"
    drawn = rows("race", [Bar(name, 1.0, "win", ""), Bar("plan", 2.0, "own", "")], "ms")
    left = min(float(x) for x in re.findall(r'<rect[^>]* x="([\d.]+)"', drawn))
    assert left >= 6 * len(name)


def test_what_was_raced_in_another_mode_is_not_called_unraced(small):
    raced = {"plan": 13.1, "all bfloat16, templates": 12.0}
    errors = {"plan": 0.01, "all bfloat16, templates": 0.01, "all bfloat16": 0.011, "all int8": 0.9}
    found = str(report_of([("graph 0", replace(small, latency_ms=raced, errors=errors), "")]))
    assert not re.search(r"^all bfloat16 .*not raced", found, re.MULTILINE)
    assert re.search(r"^all int8 .*error above", found, re.MULTILINE)
