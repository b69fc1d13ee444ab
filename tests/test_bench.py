"""The benchmarks measure what they say: inputs apart, failures as rows, runs merged, text as is."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
NAMES = sorted(path.stem for path in BENCH.glob("*.py"))
TRIVIAL = """
import os, sys
from worker import Ready

def adding():
    print("noise on stdout")
    return Ready(lambda: sum(range(1000)), error=0.25, detail="adds")

def failing():
    import no_such_peer

def breaking():
    raise ValueError("a first line\\nand a second")

def crashing():
    print("last words", file=sys.stderr, flush=True)
    os._exit(3)

def hanging():
    import time
    time.sleep(60)
"""


@pytest.fixture
def bench(monkeypatch):
    """Name -> module of bench/, which is a folder of scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def trivial(bench, monkeypatch, tmp_path):
    (tmp_path / "trivial.py").write_text(TRIVIAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield bench("trivial")
    sys.modules.pop("trivial", None)


def test_every_file_imports_without_peers_and_without_transformers():
    hidden = ("transformers", "torchao", "onnx", "onnxruntime", "openvino", "nncf", "sklearn")
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        f"for name in {hidden}: sys.modules[name] = None\n"
        f"for name in {NAMES}: __import__(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["bert-base", "resnet50", "mobilenetv2", "vit-small", "llama-prefill"]
)
def test_a_model_builds_and_its_weights_and_inputs_repeat(bench, name):
    build = bench("models").build
    one, two = build(name, 2, "tiny"), build(name, 2, "tiny")
    with torch.no_grad():
        y, same, other = one.model(*one.draw(0)), two.model(*two.draw(0)), one.model(*one.draw(1))
    assert y.shape[0] == 2
    assert torch.isfinite(y).all()
    assert torch.equal(y, same)
    assert not torch.equal(y, other)
    assert not one.model.training


def test_calibration_never_sees_a_measured_input(bench):
    models, variants = bench("models"), bench("variants")
    case = models.build("bert-base", 1, "tiny")
    measured = [case.draw(models.MEASURED + k)[0] for k in range(variants.ERROR_DRAWS)]
    for (x,) in case.calibration(variants.CALIBRATION_CALLS):
        assert not any(torch.equal(x, m) for m in measured)


def test_no_vector_of_batch_norm_is_degenerate(bench):
    case = bench("models").build("resnet50", 2, "tiny")
    norms = [m for m in case.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        for vector in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert vector.unique().numel() == vector.numel()
        assert norm.running_var.min() > 0


def test_compare_times_what_runs_and_gives_a_reason_for_what_does_not(bench, trivial, capfd):
    jobs = {name: getattr(trivial, name) for name in ("adding", "failing", "breaking", "crashing")}
    found = bench("compare").compare(jobs, rounds=3)
    row = found["adding"]
    assert 0 < row.low <= row.ms <= row.high
    assert (row.error, row.detail, row.reason) == (0.25, "adds", "")
    assert {name: row.reason for name, row in found.items() if name != "adding"} == {
        "failing": "no_such_peer is not installed",
        "breaking": "ValueError: a first line",
        "crashing": "the process ended with code 3: last words",
    }
    assert all(found[name].ms is None for name in ("failing", "breaking", "crashing"))
    assert capfd.readouterr().out == "", "stdout belongs to the results"


def test_a_variant_that_is_not_ready_in_time_is_a_row(bench, trivial):
    found = bench("compare").compare({"slow": trivial.hanging}, rounds=1, limit=0.5)
    assert found["slow"].reason == "not ready after 0 s"


def test_a_real_variant_runs_in_its_own_process(bench):
    prepare = bench("variants").prepare
    jobs = {"eager": partial(prepare, "bert-base", 1, "eager", size="tiny")}
    row = bench("compare").compare(jobs, rounds=1)["eager"]
    assert (row.reason, row.error) == ("", 0.0)


def test_the_error_is_that_of_the_worst_draw(bench, monkeypatch):
    variants = bench("variants")
    wrong = iter([1.0, 1.0, 1.0, 1.0, 1.1, 1.0, 1.0])  # after the warm-up calls
    runner = lambda case: variants.Runner(lambda x: case.model(*x) * next(wrong))  # noqa: E731
    monkeypatch.setitem(variants.VARIANTS, "eager", runner)
    with torch.no_grad():
        ready = variants.prepare("bert-base", 1, "eager", size="tiny")
    assert ready.error == pytest.approx(0.1, rel=1e-3)


def test_the_bar_is_the_largest_error_of_the_yardsticks(bench):
    compare, row = bench("compare"), bench("results").Row
    known = {
        "inductor fp32": row(ms=4.0, error=0.0),
        "inductor bf16": row(ms=2.0, error=0.02),
        "pt2e int8": row(ms=2.0, error=0.03),
        "torchao int8": row(ms=1.0, error=0.5),
        "inductor bf16 frozen": row(reason="failed"),
    }
    assert compare.bar_tolerance(known) == 0.03
    with pytest.raises(SystemExit, match="--save --phase rivals"):
        compare.bar_tolerance({"torchao int8": row(ms=1.0, error=0.5)})


def test_the_fastest_inductor_variants_are_measured_again_beside_the_rest(bench):
    compare, row = bench("compare"), bench("results").Row
    known = {
        "inductor fp32": row(ms=4.0),
        "inductor bf16": row(ms=2.0),
        "inductor bf16 frozen": row(ms=1.0),
        "eager": row(ms=0.5),
        "inductor bf16 max-autotune": row(reason="failed"),
    }
    assert compare.anchors(["mpq"], known) == ["inductor bf16 frozen", "inductor bf16"]
    assert compare.anchors(["mpq", "inductor fp32"], known) == []


def test_a_share_is_taken_of_the_best_inductor_variant_of_the_same_run(bench, monkeypatch):
    compare, row = bench("compare"), bench("results").Row
    times = {"mpq": 1.5, "inductor bf16": 2.0, "inductor fp32": 4.0, "eager": 1.0}
    monkeypatch.setattr(
        compare, "compare", lambda jobs, **_: {name: row(ms=times[name]) for name in jobs}
    )
    known = {"inductor bf16": row(ms=9.0), "inductor fp32": row(ms=9.5)}
    found = compare.measure("bert-base", 1, ["mpq"], rounds=1, known=known)
    assert list(found) == ["mpq"], "anchors are not rows of this run"
    assert found["mpq"].ratio == 0.75


def test_every_variant_belongs_to_one_phase(bench):
    compare, variants = bench("compare"), bench("variants")
    phases = [name for phase in compare.PHASES.values() for name in phase]
    assert sorted(phases) == sorted(variants.VARIANTS)
    assert next(iter(compare.PHASES)) == "rivals", "the others need its anchors and its errors"


def test_runs_are_merged_row_by_row(bench, tmp_path):
    results, path = bench("results"), tmp_path / "cpu.json"
    first = {"eager": results.Row(ms=2.0), "mpq": results.Row(reason="failed")}
    results.add_rows("bert-base", 1, first, threads=1, path=path)
    second = results.Row(ms=1.0, error=0.01)
    results.add_rows("bert-base", 1, {"mpq": second}, threads=1, path=path)
    results.add_rows("bert-base", 8, {"mpq": results.Row(ms=5.0)}, threads=1, path=path)
    results.add_section("overhead", {"per_tensor_us": 0.3}, threads=1, path=path)
    found = results.load(path)
    assert results.rows(found, "bert-base", 1) == {"eager": first["eager"], "mpq": second}
    assert results.rows(found, "bert-base", 8)["mpq"].ms == 5.0
    assert found["overhead"] == {"per_tensor_us": 0.3}
    assert found["machine"]["threads"] == 1
    assert found["machine"]["versions"]["torch"] == torch.__version__


def test_rows_of_another_machine_are_not_mixed_in(bench, tmp_path):
    results, path = bench("results"), tmp_path / "cpu.json"
    results.add_rows("bert-base", 1, {"eager": results.Row(ms=2.0)}, threads=1, path=path)
    with pytest.raises(SystemExit, match="another threads"):
        results.add_rows("bert-base", 1, {"mpq": results.Row(ms=1.0)}, threads=2, path=path)
    assert list(results.rows(results.load(path), "bert-base", 1)) == ["eager"]


RESULTS = {
    "machine": {
        "cpu": "Some CPU (6/1)",
        "cores": 4,
        "threads": 4,
        "isa": "AVX512",
        "extensions": ["avx512_vnni", "amx_int8"],
        "python": "3.11.9",
        "versions": {"torch": "2.13.0", "openvino": "not installed"},
        "date": "2026-01-02",
    },
    "cells": {
        "resnet50": {
            "8": {"inductor bf16 frozen": {"ms": 40.0, "low": 39.0, "high": 44.0, "error": 0.02}}
        },
        "bert-base": {
            "1": {
                "inductor fp32": {
                    "ms": 46.04,
                    "low": 45.0,
                    "high": 47.0,
                    "error": 0.0,
                    "base_ms": 14.8,
                },
                "inductor bf16 max-autotune": {
                    "ms": 14.8,
                    "low": 14.2,
                    "high": 15.9,
                    "error": 0.0191,
                    "base_ms": 14.8,
                },
                "openvino": {"reason": "openvino is not installed"},
                "mpq": {
                    "ms": 9.9,
                    "low": 9.5,
                    "high": 10.4,
                    "error": 0.0202,
                    "base_ms": 15.0,
                    "detail": "plan within 0.0199: 70 int8*uint8 | static",
                },
            }
        },
    },
    "overhead": {
        "chains": [
            {
                "layers": 4,
                "watched": 8,
                "bare": 20.4,
                "watch": 3.1,
                "lifecycle": 27.2,
                "float": 30.1,
                "observing": 41.9,
            }
        ],
        "fixed_us": 4.2,
        "per_tensor_us": 0.314,
    },
    "tuning": {
        "bert-base": {
            "seconds": 61.4,
            "model_bytes": 438e6,
            "extra_bytes": 500e6,
            "memory": 2.141,
            "stages": {"compile": 40.2, "race": 1.0},
        }
    },
}

SUMMARY = """\
|  | best Inductor | pt2e int8 | openvino | openvino int8 | mpq all bf16 | mpq | mpq bar |
|---|---:|---:|---:|---:|---:|---:|---:|
| bert-base ×1 | 14.8 (.019) bf16 max-autotune | – | failed | – | – | 9.90 (.020) **0.66×** | – |
| resnet50 ×8 | 40.0 (.020) bf16 frozen | – | – | – | – | – | – |"""

DETAIL = """\
## bert-base, batch 1

| variant | ms | 10–90 % | of best Inductor | error | remark |
|---|---:|---:|---:|---:|---|
| eager | – | – | – | – | not measured |
| inductor fp32 | 46.0 | 45.0–47.0 | 3.11× | .000 |  |
| inductor fp32 frozen | – | – | – | – | not measured |
| inductor fp32 max-autotune | – | – | – | – | not measured |
| inductor bf16 | – | – | – | – | not measured |
| inductor bf16 frozen | – | – | – | – | not measured |
| inductor bf16 max-autotune | 14.8 | 14.2–15.9 | 1.00× | .019 |  |
| pt2e int8 | – | – | – | – | not measured |
| pt2e int8 + bf16 | – | – | – | – | not measured |
| torchao int8 | – | – | – | – | not measured |
| onnx runtime int8 | – | – | – | – | not measured |
| openvino | – | – | – | – | openvino is not installed |
| openvino int8 | – | – | – | – | not measured |
| mpq all bf16 | – | – | – | – | not measured |
| mpq | 9.90 | 9.50–10.4 | 0.66× | .020 | plan within 0.0199: 70 int8*uint8 / static |
| mpq bar | – | – | – | – | not measured |"""

REST = """\
## Cost of a call

4 µs, and 0.31 µs per watched tensor.

| watched tensors | compiled, µs | watch, µs | call, µs | float, µs | observed, µs |
|---:|---:|---:|---:|---:|---:|
| 8 | 20 | 3 | 27 | 30 | 42 |

## Tuning

| model | seconds | model, MB | peak memory, of the model | stages |
|---|---:|---:|---:|---|
| bert-base | 61 | 438 | 2.14× | compile 40 s, race 1 s |
"""

MACHINE = (
    "Some CPU (6/1), 4 cores, 4 threads, AVX512 (avx512_vnni, amx_int8); Python 3.11.9, "
    "torch 2.13.0, openvino not installed; measured 2026-01-02."
)


def test_the_page_reads_as_written_here(bench):
    page = bench("table").page(RESULTS)
    assert page.startswith("# Latency on a CPU\n")
    assert f"\n\n{MACHINE}\n\n" in page
    assert f"\n\n{SUMMARY}\n\n{DETAIL}\n\n## resnet50, batch 8\n\n" in page
    assert page.endswith(f"\n\n{REST}")


def test_the_readme_changes_only_between_its_markers(bench):
    table = bench("table")
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    block = table.readme_block(RESULTS)
    assert SUMMARY in block
    assert MACHINE in block
    assert table.filled(text, block) == f"before\n{table.BEGIN}\n{block}\n{table.END}\nafter\n"
    assert table.filled(table.filled(text, "x"), block) == table.filled(text, block)
    with pytest.raises(SystemExit, match="markers"):
        table.filled("no markers", block)


def test_overhead_separates_the_fixed_part_from_the_part_per_tensor(bench):
    chains = [
        {"watched": n, "bare": 10.0 + n, "lifecycle": 10.0 + n + 5.0 + 0.25 * n}
        for n in (8, 32, 96)
    ]
    found = bench("overhead").per_tensor(chains)
    assert found["fixed_us"] == pytest.approx(5.0)
    assert found["per_tensor_us"] == pytest.approx(0.25)


def test_overhead_is_measured_on_an_installed_plan(bench, isolated):
    found = bench("overhead").measure(3, calls=3, target="reference")
    assert found["layers"] == 3
    assert found["watched"] >= 3
    assert min(found[name] for name in ("bare", "watch", "lifecycle", "float", "observing")) > 0


def test_json_holds_times_shares_and_reasons(bench):
    compare, row = bench("compare"), bench("results").Row
    text = compare.as_json(
        "bert-base", 1, {"mpq": row(ms=1.0, base_ms=2.0), "openvino": row(reason="failed")}
    )
    found = json.loads(text)
    assert (found["model"], found["batch"]) == ("bert-base", 1)
    assert found["rows"]["mpq"]["ratio"] == 0.5
    assert found["rows"]["openvino"]["reason"] == "failed"
    assert "\n" not in text, "one line per model"


def test_allocation_asks_every_search_within_equal_budgets(bench):
    """One small net, weights alone: what is kept of a plan is its error on calls nobody saw."""
    allocation, trained = bench("allocation"), bench("trained")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 24), torch.nn.ReLU(), torch.nn.Linear(24, 16), torch.nn.Linear(16, 4)
    ).eval()
    unseen = tuple((torch.randn(6, 12),) for _ in range(2))
    net = trained.Net(
        "tiny", model, (torch.randn(60, 12),), 6, unseen, torch.ones(1), lambda *y: 1.0, "none"
    )
    allocation.registered()
    with torch.no_grad():
        cells = list(allocation.compare(net, 0, ["measured"], "bits_only"))
    by = {(c.budget, c.search, c.metric): c for c in cells}
    assert {c.budget for c in cells} == {"2.5 bits", "3 bits", "4 bits", "5 bits", "6 bits"}
    mine = [by[f"{bits} bits", allocation.DEFAULT, "auto"] for bits in ("2.5", "4", "6")]
    assert mine[0].error > mine[1].error > mine[2].error > 0
    exact = by["4 bits", "uniform", "measured"]
    with torch.no_grad():
        task = allocation.task_of(net, 0, "bits_only")
        found = allocation.judged(net, task, 0).of(dict.fromkeys("023", "int4_row_asym*float32"))
    assert found == (pytest.approx(exact.error), 1.0)
    assert mine[1].error <= 1.05 * exact.error


def test_the_bar_of_allocation_is_a_paired_comparison(bench):
    table, allocation = bench("allocation_table"), bench("allocation")

    def cells(search: str, metric: str, errors) -> list:
        kept = zip(range(5), errors, strict=True)
        return [allocation.Cell("n", "4 bits", s, search, metric, e, 0.9, 8, 1) for s, e in kept]

    noisy = [0.1, 0.3, 0.2, 0.5, 0.4]  # what differs between seeds cancels within one
    worse = [1.1 * e for e in noisy]
    mixed = [e * f for e, f in zip(noisy, (0.9, 1.2, 0.95, 1.1, 1.0), strict=True)]
    mine = cells(table.DEFAULT, "auto", noisy)
    uniform = cells("uniform", "measured", worse)

    def asked(*others: list) -> dict:
        rows = [vars(cell) for group in (mine, uniform, *others) for cell in group]
        return {"n": {"score": "accuracy", "examples": 10, "run": "", "cells": rows}}

    page = table.page(asked(cells("mpq-fx", "fisher", mixed), cells("NNCF", "x", [None] * 5)))
    assert "in 1 of 1 cells (100%). It is significantly worse than a uniform plan in 0." in page
    assert "| uniform | measured | 1.100 | 1 | 0 | 0 | 0 |" in page
    assert "| mpq-fx | fisher | 1.024 | 0 | 1 | 0 | 0 |" in page
    assert "| NNCF | x | inf | 0 | 0 | 0 | 1 | – |" in page
    beaten = table.page(asked(cells("mpq-fx", "fisher", [0.9 * e for e in noisy])))
    assert "in 0 of 1 cells (0%); not in n at 4 bits (fisher, 1.111)" in beaten
