"""Everything a user can get wrong: the kind of error, and a model that still works after it."""

from __future__ import annotations

import logging
import math
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import mpq_fx
from mpq_fx import compiler, lifecycle
from mpq_fx.config import Config
from mpq_fx.errors import CalibrationError, ConfigError, WeightError
from mpq_fx.numerics import relative_rms
from mpq_fx.registry import bindings_of
from tests.small import OPTIONS, Net, batch, call, compiled_of, is_float, state, tune, zeros

# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        ({"tolerence": 0.1}, "unknown option 'tolerence'", "did you mean 'tolerance'?"),
        ({"formats": ["int9"]}, "unknown format 'int9'", "did you mean 'int8'?"),
        ({"formats": {"*": ["bfloat1"]}}, "unknown format 'bfloat1'", "did you mean 'bfloat16'?"),
        ({"formats": "int8"}, "is a string, not a list", 'options={"formats": ["int8"]}'),
        ({"objective": "speed"}, "objective='speed' is not one of", "valid: latency, size, error"),
        ({"tolerance": -0.1}, "tolerance=-0.1 is neither", 'options={"tolerance": 0.02}'),
        ({"tolerance": float("nan")}, "tolerance=nan is neither", 'options={"tolerance": 0.02}'),
        ({"max_size": -5}, "max_size=-5 is neither", 'options={"max_size": "0.5x"}'),
        ({"max_latency": "fast"}, "max_latency='fast' is neither", '"0.5x"'),
        ({"max_bits": True}, "max_bits=True is neither", '"0.5x"'),
        ({"min_bits": 0}, "min_bits=0 is neither", '"0.5x"'),
        ({"min_bits": 5, "max_bits": 4.5}, "min_bits=5 is above max_bits=4.5", '{"min_bits": 4.5}'),
        ({"min_bits": "0.5x", "max_bits": "0.2x"}, "above max_bits='0.2x'", "'0.2x'"),
        ({"max_activation_memory": "half"}, "max_activation_memory='half' is neither", '"0.5x"'),
        ({"objective": "error", "min_bits": 4}, "is the float model itself", "max_size"),
        ({"calibration_calls": 2}, "calibration_calls=2 must be a whole number of at least 3", ""),
        ({"calibration_calls": 3.5}, "calibration_calls=3.5 must be a whole number", ""),
        ({"time_budget": -1}, "time_budget=-1 must be a number of at least 0", ""),
        ({"on_error": "ignore"}, "on_error='ignore' is not one of raise, float", ""),
        ({"tolerance": None}, "allows any error at all", 'options={"tolerance": 0.05}'),
        ({"objective": "error"}, "is the float model itself", "max_size"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_with_what_to_type(options, message, fix):
    with pytest.raises(ConfigError) as caught:
        Config.from_options(options)
    assert message in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {**OPTIONS, "tolerence": 1}}, "did you mean 'tolerance'"),
        ({"options": {**OPTIONS, "formats": ["int9"]}}, "did you mean 'int8'"),
        ({"mode": "max-autotune"}, "mode='max-autotune' is an option of Inductor"),
    ],
)
def test_torch_compile_passes_the_error_on_at_the_first_call(isolated, given, message):
    model = Net().eval()
    with pytest.raises(ConfigError, match=message) as caught:
        call(torch.compile(model, backend="mpq", **given))
    assert type(pickle.loads(pickle.dumps(caught.value))) is ConfigError
    files = [Path(str(entry.path)).name for entry in caught.traceback]
    assert files[-1] == "backend.py"  # nothing of Dynamo's inside, nor of our own
    assert torch.isfinite(model(batch(0))).all()


def test_an_unknown_target_is_refused(isolated):
    with pytest.raises(ConfigError, match="unknown target 'cuda'"):
        call(compiled_of(Net(), target="cuda"), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensitivity": "fischer"}, "'fischer' is none of the metrics"),
        ({"solver": "cpsat"}, "'cpsat' is none of the solvers"),
        ({"search": "bisect"}, "'bisect' is none of the searches"),
    ],
)
def test_an_unknown_name_of_a_catalog_is_refused_at_the_first_call(isolated, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call(compiled_of(Net(), **options), 1)
    assert "did you mean" in caught.value.fix


def test_the_solver_that_is_named_solves(isolated):
    found = []
    for solver in ("cp_sat", "lagrangian", "brute_force"):
        compiled = compiled_of(Net(), solver=solver)
        call(compiled)
        found.append(mpq_fx.explain(compiled).entries[0].plan)
    assert all(plan is not None and plan.error <= plan.tolerance * 1.5 for plan in found)


def test_a_glob_that_matches_nothing_names_the_sites(isolated):
    model = Net()
    compiled = compiled_of(model, formats={"encoder.*": ["int8"]})
    with pytest.raises(ConfigError) as caught:
        call(compiled)
    assert caught.value.what == "formats: 'encoder.*' matches none of 2 sites"
    assert caught.value.fix == "valid: up, down"
    assert is_float(compiled, model)
    assert state(compiled)[1] == caught.value.what


# --- data --------------------------------------------------------------------------------------


def test_calls_with_nan_or_inf_are_answered_and_not_counted(isolated):
    model = Net()
    compiled = compiled_of(model)

    def spoiled(seed: int) -> torch.Tensor:
        x = batch(seed)
        x[0, 0] = float("nan") if seed % 2 else float("inf")
        return x

    call(compiled, 4, spoiled)
    assert state(compiled) == (0, "observing")
    call(compiled)
    assert state(compiled) == (0, "")
    with torch.inference_mode():
        assert compiled(spoiled(1))[0].isnan().all(), "nothing hides the user's NaN"


def test_a_net_that_makes_inf_by_itself_says_where(isolated):
    class Divide(Net):
        def forward(self, x):
            return super().forward(1 / (x - x))

    model = Divide()
    compiled = compiled_of(model)
    with pytest.raises(CalibrationError) as caught:
        call(compiled)
    assert caught.value.what == "the input of up holds NaN or inf in a calibration call"
    assert caught.value.at.startswith("small.py:")
    assert caught.value.fix
    assert state(compiled)[1] == caught.value.what


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(isolated, value):
    model = Net()
    with torch.no_grad():
        model.down.weight[1, 2] = value
    compiled = compiled_of(model)
    with pytest.raises(WeightError, match=r"the weight down\.weight holds NaN or inf"):
        call(compiled)
    assert call(compiled)[0].shape == (4, 32), "the model runs on in float"


def test_empty_batches_are_answered_before_and_after_the_plan_and_not_counted(isolated):
    compiled = compiled_of(Net())
    with torch.inference_mode():
        assert compiled(torch.empty(0, 32)).shape == (0, 32)
    call(compiled)
    with torch.inference_mode():
        assert compiled(torch.empty(0, 32)).shape == (0, 32)
    reasons = {binding.reason: len(binding.records) for _, binding in bindings_of(compiled)}
    assert reasons == {"observing": 0, "": 0}


def test_constant_calls_are_not_counted_and_a_warning_says_what_to_type(isolated, caplog):
    compiled = compiled_of(Net())
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        call(compiled, 12, zeros)
        call(compiled, 12, lambda seed: batch(1))
    assert state(compiled) == (1, "observing")
    (message,) = [m for m in caplog.messages if "distinct" in m]
    assert message.startswith("only 1 of 24 calls were distinct")
    assert "mpq_fx.finalize(model)" in message


def test_too_few_calls_can_be_finalized_and_exclude_static_ranges(isolated):
    model = Net()
    compiled = compiled_of(model)
    call(compiled, 2)
    mpq_fx.finalize(compiled)
    ((_, binding),) = bindings_of(compiled)
    assert binding.reason == ""
    row = binding.plan.ledger[0]
    assert row.refusals["int8*uint8_tensor/static"] == (
        "a static range needs 3 distinct calls, there were 2",
    )
    assert any("overlap" in note for note in binding.plan.notes)


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize("sensitivity", ["auto", "fisher", "eigenvalue_spread", "kl"])
def test_one_calibration_call_gives_a_plan_that_says_so(isolated, sensitivity, rows):
    config = Config(target="reference", tolerance=0.1, sensitivity=sensitivity)
    for batches in ([batch(0, rows)], [batch(0, rows)] * 4):
        plan = mpq_fx.tune(Net().eval(), batches, config=config, progress=False)
        assert plan.notes == (
            "only 1 distinct calibration call: the parts to fit, choose and report overlap, and "
            "the error is of the call that the plan was chosen on",
        )
        assert all(math.isfinite(value) for value in plan.tables["error"].values.values())
        assert "there were 1" in plan.ledger[0].refusals["int8*uint8_tensor/static"][0]


def test_two_calls_overlap_and_three_do_not(isolated):
    config = Config(target="reference", tolerance=0.1)
    notes = [
        mpq_fx.tune(Net().eval(), list(map(batch, range(n))), config=config, progress=False).notes
        for n in (2, 3)
    ]
    assert notes == [
        ("only 2 distinct calibration calls: the parts to fit and choose overlap",),
        (),
    ]


def test_warm_up_calls_of_zeros_do_not_spoil_the_ranges(isolated):
    model = Net()
    compiled = compiled_of(model, formats=["int8*uint8_tensor/static"])
    call(compiled, 5, zeros)
    assert state(compiled) == (0, "observing")
    call(compiled)
    assert state(compiled) == (0, "")
    with torch.inference_mode():
        assert 0 < relative_rms(compiled(batch(1)), model(batch(1))) < 0.1


def test_finalizing_without_a_usable_call_is_refused(isolated):
    compiled = compiled_of(Net())
    with pytest.raises(CalibrationError, match="no compiled graph of this model was called yet"):
        mpq_fx.finalize(compiled)
    call(compiled, 2, zeros)
    with pytest.raises(CalibrationError, match="no usable calibration call"):
        mpq_fx.finalize(compiled)


# --- kinds of inputs and outputs ---------------------------------------------------------------


def test_nested_inputs_and_outputs_and_values_that_are_no_tensors(isolated):
    class Nested(Net):
        def forward(self, given, flag, scale=2, name="a"):
            y = super().forward(given["x"][0]) * scale
            return {"y": (y, [flag, None]), "name": name, "count": torch.arange(3)}

    model = Nested()
    compiled = compiled_of(model)
    with torch.inference_mode():
        for seed in range(4):
            found = compiled({"x": [batch(seed)]}, True, scale=3, name="b")
        wanted = model({"x": [batch(3)]}, True, scale=3, name="b")
    assert 0 < relative_rms(found["y"][0], wanted["y"][0]) < 0.1
    assert found["y"][1] == [True, None]
    assert found["name"] == "b"
    assert torch.equal(found["count"], torch.arange(3))


def test_a_sparse_input_breaks_the_graph_and_the_rest_is_planned(isolated):
    class Sparse(Net):
        def forward(self, graph, x):
            return super().forward(torch.sparse.mm(graph, x))

    model, graph = Sparse(), torch.eye(4).to_sparse()
    compiled = compiled_of(model)
    with torch.inference_mode():
        for seed in range(4):
            y = compiled(graph, batch(seed))
        assert relative_rms(y, model(graph, batch(3))) < 0.1
    assert "sparse" in str(mpq_fx.explain(compiled))


def test_complex_inputs_run_in_float_with_the_reason(isolated, caplog):
    class Complex(Net):
        def forward(self, x):
            return super().forward(x.real)

    model = Complex()
    compiled = compiled_of(model)
    with caplog.at_level(logging.WARNING, "mpq_fx"), torch.inference_mode():
        x = torch.complex(batch(0), batch(1))
        assert torch.equal(compiled(x), model(x))
    assert "a graph stays in float: input x has complex values" in caplog.messages
    assert state(compiled) == (0, "input x has complex values")


def test_complex_values_inside_and_at_the_output_count_in_the_error(isolated):
    class Spectrum(Net):
        def forward(self, x):
            return torch.fft.fft(super().forward(torch.fft.fft(x).real))

    model = Spectrum()
    compiled = compiled_of(model)
    call(compiled)
    ((_, binding),) = bindings_of(compiled)
    assert 0 < binding.plan.errors["plan"] <= 0.1
    with torch.inference_mode():
        y, wanted = compiled(batch(5)), model(batch(5))
    assert 0 < relative_rms(torch.view_as_real(y), torch.view_as_real(wanted)) < 0.1


def test_a_graph_without_a_floating_output_stays_in_float(isolated):
    class Classify(Net):
        def forward(self, x):
            return super().forward(x).argmax(1)

    model = Classify()
    compiled = compiled_of(model)
    call(compiled)
    assert state(compiled)[1].startswith("no floating output")
    assert is_float(compiled, model)


# --- interruptions -----------------------------------------------------------------------------


def test_an_exception_in_the_middle_of_a_tune_leaves_the_model_working(isolated, monkeypatch):
    model = Net().eval()
    before = model(batch(0))

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "search", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            tune(model)
    assert bindings_of(model) == []
    assert torch.equal(model(batch(0)), before)
    assert tune(model).choices, "and it can be tuned again"


def test_a_batch_that_the_model_refuses_ends_the_tune_with_the_models_own_error(isolated):
    model = Net().eval()
    with pytest.raises(RuntimeError, match=r"same reduction dim|cannot be multiplied"):
        mpq_fx.tune(model, [torch.ones(2, 5)], config=Config(target="reference"), progress=False)
    assert bindings_of(model) == []


def test_after_ctrl_c_the_model_runs_in_float_until_it_is_asked_to_plan_again(
    isolated, monkeypatch
):
    model = Net()
    compiled = compiled_of(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "search", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(compiled)
    for seed in (0, 3):
        with torch.inference_mode():
            compiled(batch(seed))
    assert is_float(compiled, model)
    records, reason = state(compiled)
    assert (records, reason) == (3, lifecycle.INTERRUPTED)
    mpq_fx.finalize(compiled)
    assert state(compiled) == (0, "")


@pytest.mark.parametrize("on_error", ["raise", "float"])
def test_a_failure_of_a_compiler_is_told_once_and_leaves_float(isolated, monkeypatch, on_error):
    model = Net()
    compiled = compiled_of(model, on_error=on_error)

    def fail(*_):
        raise MemoryError("out of it\nin g++")

    monkeypatch.setattr(compiler, "search", fail)
    with pytest.raises(MemoryError) if on_error == "raise" else nullcontext():
        call(compiled)
    call(compiled, 8)
    assert is_float(compiled, model)
    assert state(compiled) == (0, "out of it")


def test_on_error_float_runs_on_and_logs_what_was_wrong(isolated, caplog):
    model = Net()
    compiled = compiled_of(model, max_size=10.0, on_error="float")
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        call(compiled)
    assert caplog.messages[0].startswith("staying in float: no plan meets max_size <= 10 bytes")
    assert is_float(compiled, model)
    assert state(compiled)[1].startswith("no plan meets max_size <= 10 bytes")
