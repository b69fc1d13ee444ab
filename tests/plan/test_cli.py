"""The mpq command: results on stdout, one clean message on stderr, exit codes, a quick --help."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest

import mpq_fx.cli
from mpq_fx.config import Config
from mpq_fx.doctor import Examination, TargetFacts, examine, printed, torch_problems
from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.lower import cpu
from mpq_fx.plan import load, save


@pytest.fixture
def plan(small, tmp_path):
    save(small, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['mpq', '--help']\n"
        "from mpq_fx.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ortools', 'jinja2', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for command in ("demo", "doctor", "tune", "show", "diff", "report", "bench"):
        assert command in done.stdout


def test_show_prints_the_report(run, plan):
    done = run("show", plan)
    assert done.exit_code == 0
    assert "plan.json · target reference" in done.stdout
    assert "float is the fastest here" in done.stdout


def test_diff_prints_the_difference_and_its_exit_code_says_so(run, plan, small, tmp_path):
    same = run("diff", plan, plan)
    assert (same.exit_code, same.stdout.startswith("no difference")) == (0, True)
    save(small.resolve(tolerance=0.03), tmp_path / "other.json")
    done = run("diff", plan, "other.json")
    assert done.exit_code == 1
    assert "b  float32 -> bfloat16" in done.stdout


def test_report_writes_a_page(run, plan, tmp_path):
    assert run("report", plan, "-o", "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    "args",
    [
        ("show", "none.json"),
        ("diff", "none.json", "none.json"),
        ("report", "none.json", "-o", "x.html"),
    ],
)
def test_a_missing_plan_is_one_message_without_a_traceback(run, args):
    done = run(*args)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: cannot read the plan none.json: No such file")
    assert "Traceback" not in done.output
    assert not done.stdout


def test_a_folder_that_does_not_exist_is_named(run, plan):
    done = run("report", plan, "-o", "no/page.html")
    assert done.exit_code == 2
    assert "mkdir -p no" in done.stderr


def test_tune_writes_a_plan(run, tuned, nets, small, tmp_path):
    done = run(
        "--quiet",
        "tune",
        "nets:both",
        "-o",
        "plan.json",
        "--tolerance",
        "0.02",
        "--max-size",
        "0.5x",
        "--objective",
        "size",
    )
    assert done.exit_code == 0, done.output
    assert load(tmp_path / "plan.json") == small
    ((model, batches, given),) = tuned
    assert (model, batches) == ("model", ["batch"])
    assert given == {
        "config": Config(tolerance=0.02, max_size="0.5x", objective="size"),
        "metric": None,
        "max_drop": None,
        "loss": None,
        "checkpoint": None,
        "progress": False,
    }
    assert done.stdout.startswith("plan.json: error 0.009 of 0.01 allowed")


def test_tune_takes_batches_metric_and_formats(run, tuned, nets):
    done = run(
        "tune",
        "nets:net",
        "-o",
        "p.json",
        "--batches",
        "nets:data",
        "--metric",
        "nets:score",
        "--max-drop",
        "0.01",
        "--formats",
        "enc.*=int8,bfloat16",
        "--formats",
        "head=float32",
    )
    assert done.exit_code == 0, done.output
    ((_, batches, given),) = tuned
    assert batches == ["other"]
    assert given["metric"] is nets.score
    assert given["max_drop"] == 0.01
    assert given["config"].formats == {"enc.*": ("int8", "bfloat16"), "head": ("float32",)}
    assert given["progress"] is True


def test_tune_takes_a_loss_and_the_metric_that_asks_it(run, tuned, nets):
    asked = ("--loss", "nets:score", "--sensitivity", "interlayer_loss")
    assert run("tune", "nets:both", "-o", "p.json", *asked).exit_code == 0
    ((_, _, given),) = tuned
    assert given["loss"] is nets.score
    assert given["config"].sensitivity == "interlayer_loss"


def test_a_checkpoint_that_the_plan_would_overwrite_is_refused(run, tuned, nets):
    for name in ("plan.json", "plan.safetensors"):
        done = run("tune", "nets:both", "-o", "plan.json", "--checkpoint", name)
        assert done.exit_code == 2
        assert f"the plan would overwrite the checkpoint {name}" in done.stderr
        assert "--checkpoint plan.checkpoint" in done.stderr
    assert run("tune", "nets:both", "-o", "plan.json", "--checkpoint", "c").exit_code == 0
    assert str(tuned[0][2]["checkpoint"]) == "c"


def test_tune_takes_batches_that_are_no_function(run, tuned, nets):
    assert run("tune", "nets:net", "-o", "p.json", "--batches", "nets:rows").exit_code == 0
    assert tuned[0][1] == ["row"]


def test_a_tolerance_of_none_is_none(run, tuned, nets):
    done = run("tune", "nets:both", "-o", "p.json", "--tolerance", "none", "--max-latency", "3")
    assert done.exit_code == 0, done.output
    assert tuned[0][2]["config"] == Config(tolerance=None, max_latency=3)


def test_every_field_of_config_is_an_option_with_its_default_and_comment(run):
    done = run("tune", "--help")
    shown = " ".join(done.stdout.split())
    for field in fields(Config):
        if field.name not in mpq_fx.cli.NOT_TUNED:
            assert "--" + field.name.replace("_", "-") in shown
    assert "largest relative RMS error of an output [default: bf16]" in shown
    assert "VALUE [default" not in shown, "a comment for each"
    assert "--calibration-calls" not in shown, "tune observes all batches"
    assert "--release" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("tune", "nets", "-o", "p.json"), "'nets' is not module:name"),
        (
            ("tune", "no_such_module_here:f", "-o", "p.json"),
            "there is no module 'no_such_module_here'",
        ),
        (("tune", "nets:absent", "-o", "p.json"), "nets has no 'absent'"),
        (("tune", "nets:net", "-o", "p.json"), "without batches to calibrate on"),
        (("tune", "nets:net", "-o", "p.json"), "--synthetic distilled:32x3x224x224"),
        (("tune", "nets:both", "-o", "p.json", "--synthetic", "distilled"), "is not METHOD:SHAPE"),
        (("tune", "nets:both", "-o", "p.json", "--synthetic", "distil:8x8"), "is not METHOD:SHAPE"),
        (("tune", "nets:both", "-o", "p.json", "--synthetic", "sampled:8"), "is not METHOD:SHAPE"),
        (
            ("tune", "nets:net", "-o", "p", "--synthetic", "sampled:8x8", "--batches", "nets:data"),
            "two sources of inputs",
        ),
        (("tune", "nets:both", "-o", "p.json", "--tolerance", "-1"), "tolerance=-1"),
        (("tune", "nets:both", "-o", "p.json", "--max-size", "half"), "max_size='half'"),
        (("tune", "nets:both", "-o", "p.json", "--max-size", "half"), "fix  --max-size 0.5x"),
        (("tune", "nets:both", "-o", "missing/p.json"), "folder missing does not exist"),
        (
            ("tune", "nets:both", "-o", "p.json", "--objective", "sped"),
            "did you mean 'speed'|latency",
        ),
        (("tune", "nets:both", "-o", "p.json", "--formats", "int8"), "is not GLOB=FORMAT"),
        (("tune", "nets:both", "-o", "p.json", "--formats", "*=int9"), "unknown format 'int9'"),
    ],
)
def test_what_cannot_be_meant_is_one_message(run, tuned, nets, args, message):
    import re

    done = run(*args)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert re.search(message, done.stderr)
    assert "fix" in done.stderr
    assert not tuned


def test_a_failed_tune_writes_nothing(run, nets, monkeypatch, tmp_path):
    import mpq_fx

    def tune(*_, **__):
        raise InfeasibleError("no plan meets max_size <= 3 bytes", fix="a larger one")

    monkeypatch.setattr(mpq_fx, "tune", tune, raising=False)
    done = run("tune", "nets:both", "-o", "plan.json")
    assert done.exit_code == 2
    assert done.stderr == "error: no plan meets max_size <= 3 bytes\n  fix  a larger one\n"
    assert not (tmp_path / "plan.json").exists()


def test_an_exception_in_the_users_code_keeps_its_traceback(run, nets):
    assert isinstance(run("tune", "nets:broken", "-o", "p.json").exception, ZeroDivisionError)


def test_a_module_that_lacks_something_itself_keeps_its_own_error(run, tmp_path):
    (tmp_path / "needy.py").write_text("import no_such_dependency\n")
    found = run("tune", "needy:make", "-o", "p.json").exception
    assert isinstance(found, ModuleNotFoundError)
    assert found.name == "no_such_dependency"


def test_bench_and_demo_hand_over(run, monkeypatch):
    calls = []
    for name, entry in (
        ("benchmark", lambda *a: calls.append(a)),
        ("demo", lambda **k: calls.append(k)),
    ):
        module = ModuleType(f"mpq_fx.{name}")
        module.main = entry
        monkeypatch.setitem(sys.modules, f"mpq_fx.{name}", module)
    given = ("--batch", "8", "--variants", "mpq,eager", "--json")
    assert run("bench", "bert-base", *given).exit_code == 0
    assert run("-q", "demo", "--quick", "-o", "pages").exit_code == 0
    assert run("demo", "-q", "--quick", "-o", "pages").exit_code == 0
    assert calls.pop() == calls[-1], "quiet before the command is quiet behind it"
    assert calls == [
        ("bert-base", 8, "mpq,eager", True),
        {"progress": False, "output": Path("pages"), "quick": True},
    ]


@pytest.mark.parametrize(
    ("asked", "told"),
    [((), "would go on with --checkpoint FILE"), (("--checkpoint", "kept"), "goes on from kept")],
    ids=["", "checkpoint"],
)
def test_a_tune_that_is_interrupted_says_how_it_goes_on(run, nets, monkeypatch, asked, told):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mpq_fx, "tune", interrupted)
    done = run("tune", "nets:both", "-o", "p.json", *asked)
    assert done.exit_code == 1
    assert f"interrupted: the same command {told}" in done.stderr


def test_doctor_names_versions_targets_and_their_choices(run):
    done = run("doctor")
    assert done.exit_code == 0, done.output
    for words in (
        "torch",
        "triton",
        "ortools",
        "oneDNN",
        "instruction set",
        "generated C++",
        "reference  available",
        "linear: ",
        "torch-tensorrt",
    ):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("version", "is_tested"),
    [
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("2.13.1", True),
        ("2.14.0", False),
        ("2.10.2", False),
        ("3.0", False),
        ("2.14.0a0+git1", False),
    ],
)
def test_a_torch_that_was_never_tested_is_named(version, is_tested):
    found = torch_problems(version, ">=2.11,<2.14")
    assert (not found) == is_tested
    assert all(version in line for line in found)


def test_the_tested_versions_are_those_the_package_asks_for():
    assert examine().problems == ()
    assert torch_problems("1.13.0")


def test_doctor_finds_generated_code_without_vectors(tmp_path):
    (tmp_path / "ctypes.py").write_text("")  # Inductor tries its vectors here, by loading them
    command = [Path(sys.executable).parent / "mpq", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "problem: Inductor compiles no vectors here" in " ".join(done.stdout.split()), (
        done.stderr
    )


def test_doctor_says_what_this_machine_refuses_and_why(run, monkeypatch):
    monkeypatch.setattr(cpu, "has", lambda name: name in ("avx2", "avx512"))
    shown = " ".join(run("doctor").stdout.split())
    assert "not int8*uint8_tensor/static: int8 × int8 saturates silently" in shown
    conv = next(s for s in run("doctor").stdout.splitlines() if s.startswith("    conv: "))
    assert "int7_tensor" in conv
    assert "uint8_tensor" not in conv.partition("int7")[0]


def test_doctor_says_what_a_gpu_that_is_not_here_refuses(run):
    shown = " ".join(run("doctor", "--device", "a100").stdout.split())
    assert "architecture: sm_80" in shown
    assert "not fp8_e4m3/dynamic:" in shown
    assert "sm_80" in shown.partition("not fp8_e4m3/dynamic:")[2]
    assert "not fp8_e4m3/dynamic:" not in run("doctor", "--device", "h100").stdout
    unknown = run("doctor", "--device", "h10")
    assert unknown.exit_code == 2
    assert "h100" in unknown.output


def test_doctor_fails_where_nothing_can_run(run, monkeypatch, capsys):
    found = Examination(
        {"torch": "9.9"},
        {"threads": "1"},
        (TargetFacts("cpu", "no oneDNN in this PyTorch", {}, {}),),
        ("no target can run here",),
    )
    monkeypatch.setattr("mpq_fx.doctor.examine", lambda device: found)
    assert run("doctor").exit_code == 1
    printed(found)
    shown = capsys.readouterr().out
    assert "cpu  not available: no oneDNN in this PyTorch" in shown
    assert "problem: no target can run here" in shown


def test_show_of_a_plan_is_what_str_of_its_report_is(run, small, plan):
    from mpq_fx.report import report_of

    shown = [line.rstrip() for line in run("show", plan).stdout.splitlines()]
    assert "\n".join(shown) == str(report_of([("plan.json", replace(small), "")]))
    assert json.loads(plan.read_text())["mpq_fx_plan"] == 1
