"""Case -> Runner: one function per thing that a user could run instead of eager PyTorch.

A peer is imported inside its function: only the variants that are asked for must be installed.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import MEASURED, Case, Inputs, build
from torch import Tensor, nn
from worker import Ready

CALIBRATION_CALLS = 8
ERROR_DRAWS = 4
WARM_UP = 3
BAR = "mpq bar"  # mpq at the largest error of the variants in YARDSTICKS


def _same(inputs: Inputs) -> Any:
    return inputs


def _silent() -> str:
    return ""


@dataclass(frozen=True)
class Runner:
    """run(feed(inputs)) -> output; `feed` brings inputs into the runtime's own form, untimed."""

    run: Callable[[Any], Tensor]
    feed: Callable[[Inputs], Any] = _same
    detail: Callable[[], str] = _silent


def prepare(
    model: str, batch: int, variant: str, tolerance: float | None = None, size: str = "full"
) -> Ready:
    """Build a variant and measure its error: the largest relative RMS over some unseen inputs.

    Gradients stay off afterwards, since changing the mode would make Dynamo compile again.
    """
    torch.set_grad_enabled(False)
    case = build(model, batch, size)
    draws = [case.draw(MEASURED + k) for k in range(ERROR_DRAWS)]
    references = [case.model(*inputs) for inputs in draws]
    make = partial(mpq, tolerance=tolerance) if variant == BAR else VARIANTS[variant]
    runner = make(case)
    fed = [runner.feed(inputs) for inputs in draws]
    for _ in range(WARM_UP):
        runner.run(fed[0])
    errors = [
        relative_error(runner.run(inputs), reference)
        for inputs, reference in zip(fed, references, strict=True)
    ]
    return Ready(lambda: runner.run(fed[0]), max(errors), runner.detail())


def relative_error(found: Tensor, reference: Tensor) -> float:
    """√(Σ (found - reference)² / Σ reference²)"""
    return float((found.float() - reference).norm() / reference.norm())


def eager(case: Case) -> Runner:
    return Runner(lambda inputs: case.model(*inputs))


def inductor(case: Case, dtype: torch.dtype, **settings: Any) -> Runner:
    model = copy.deepcopy(case.model).to(dtype)
    run = compiled(model, cast(case.draw(MEASURED), dtype), **settings)
    return Runner(run, feed=lambda inputs: cast(inputs, dtype))


def torchao_int8(case: Case) -> Runner:
    """Dynamic int8 activations × int8 weights in the linear layers of a bfloat16 model."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(case.model).bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    run = compiled(model, cast(case.draw(MEASURED), torch.bfloat16), freezing=True)
    return Runner(run, feed=lambda inputs: cast(inputs, torch.bfloat16))


def pt2e_int8(case: Case, *, bf16: bool = False) -> Runner:
    """Static int8 by export and Inductor's x86 quantizer; with `bf16`, the rest under autocast."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    example = case.draw(MEASURED)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(case.model, example).module(), quantizer)
    for inputs in case.calibration(CALIBRATION_CALLS):
        prepared(*inputs)
    model = convert_pt2e(prepared)
    if not bf16:
        return Runner(compiled(model, example, freezing=True))
    with torch.autocast("cpu", torch.bfloat16):
        run = compiled(model, example, freezing=True, max_autotune=True)

    def under_autocast(inputs: Inputs) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(inputs)

    return Runner(under_autocast)


def onnx_runtime_int8(case: Case) -> Runner:
    """Static QDQ, int8 weights per channel, uint8 activations."""
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        exported, inferred, quantized = (str(Path(folder) / f"{k}.onnx") for k in range(3))
        exporter = export_onnx(case, exported)
        quant_pre_process(exported, inferred)
        quantize_static(
            inferred,
            quantized,
            calibration_reader(case),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
        session = onnxruntime.InferenceSession(
            quantized, options, providers=["CPUExecutionProvider"]
        )
    return Runner(
        lambda fed: torch.from_numpy(session.run(None, fed)[0]),
        feed=_named,
        detail=lambda: f"exported by {exporter}",
    )


def export_onnx(case: Case, path: str) -> str:
    """Write the model; the name of the first exporter that can."""
    example, failures = case.draw(MEASURED), []
    for name, dynamo in (("TorchScript", False), ("torch.export", True)):
        try:
            torch.onnx.export(case.model, example, path, input_names=["x"], dynamo=dynamo)
        except Exception as error:  # each exporter raises types of its own
            failures.append(f"{name}: {type(error).__name__}: {error}")
        else:
            return name
    raise RuntimeError("no exporter to ONNX can follow the model: " + "; ".join(failures))


def calibration_reader(case: Case) -> Any:
    """The calibration inputs as onnxruntime wants them: an object to ask for the next ones."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(case.calibration(CALIBRATION_CALLS))

        def get_next(self) -> Any:  # a dict, and None at the end
            inputs = next(self.left, None)
            return None if inputs is None else _named(inputs)

    return Reader()


def openvino(case: Case) -> Runner:
    """OpenVINO as it comes: on AMX it computes in bfloat16 by itself."""
    model, converter = to_openvino(case)
    return _openvino_runner(model, converter)


def openvino_int8(case: Case) -> Runner:
    """OpenVINO after nncf.quantize."""
    import nncf

    model, converter = to_openvino(case)
    data = [_arrays(inputs) for inputs in case.calibration(CALIBRATION_CALLS)]
    kind = nncf.ModelType.TRANSFORMER if case.is_transformer else None
    model = nncf.quantize(model, nncf.Dataset(data), subset_size=len(data), model_type=kind)
    return _openvino_runner(model, converter)


def to_openvino(case: Case) -> tuple[Any, str]:
    """OpenVINO's model, and which converter could follow the network."""
    from openvino import convert_model

    example = case.draw(MEASURED)
    try:
        return convert_model(case.model, example_input=example), "TorchScript"
    except Exception:  # models that tracing cannot follow
        return convert_model(torch.export.export(case.model, example)), "torch.export"


def _openvino_runner(model: Any, converter: str) -> Runner:
    from openvino import Core

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    network = Core().compile_model(model, "CPU", settings)
    request, output = network.create_infer_request(), network.output(0)
    return Runner(
        lambda fed: torch.from_numpy(request.infer(fed)[output]),
        feed=_arrays,
        detail=lambda: f"exported by {converter}",
    )


TIME_BUDGET = 120.0  # seconds mpq may plan for: peers with max-autotune compile as long


def mpq(case: Case, **options: Any) -> Runner:
    """torch.compile(model, backend="mpq"), calibrated by its first calls, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        options |= {"cache_dir": folder, "time_budget": TIME_BUDGET}
        model = torch.compile(case.model, backend="mpq", options=options)
        for inputs in case.calibration(CALIBRATION_CALLS):
            model(*inputs)
    return Runner(lambda inputs: model(*inputs), detail=partial(_plan_in_words, model))


def _plan_in_words(model: Any) -> str:
    """Per graph: the variant that won, and how many sites run in which choice."""
    from mpq_fx.registry import bindings_of

    words = []
    for _, binding in bindings_of(model):
        if binding.plan is None:
            words.append(f"float: {binding.reason}")
            continue
        counts = Counter(choice.name for choice in binding.plan.choices.values())
        sites = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        words.append(f"{binding.plan.winner} within {binding.plan.tolerance:.3g}: {sites}")
    return "; ".join(words)


def compiled(model: nn.Module, example: Inputs, **settings: Any) -> Callable[[Inputs], Tensor]:
    """Inductor under these settings, compiled now.

    They are global while compiling: freezing has no effect as an option of torch.compile.
    """
    import torch._inductor.config as config

    run = torch.compile(model)
    with config.patch(settings):
        run(*example)
    return lambda inputs: run(*inputs)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def _arrays(inputs: Inputs) -> list[Any]:
    return [x.numpy() for x in inputs]


def _named(inputs: Inputs) -> dict[str, Any]:
    return {"x": inputs[0].numpy()}


FROZEN = {"freezing": True}
TUNED = {"freezing": True, "max_autotune": True}

INDUCTOR: dict[str, Callable[[Case], Runner]] = {
    "inductor fp32": partial(inductor, dtype=torch.float32),
    "inductor fp32 frozen": partial(inductor, dtype=torch.float32, **FROZEN),
    "inductor fp32 max-autotune": partial(inductor, dtype=torch.float32, **TUNED),
    "inductor bf16": partial(inductor, dtype=torch.bfloat16),
    "inductor bf16 frozen": partial(inductor, dtype=torch.bfloat16, **FROZEN),
    "inductor bf16 max-autotune": partial(inductor, dtype=torch.bfloat16, **TUNED),
}
YARDSTICKS = (*INDUCTOR, "pt2e int8")  # their largest error is what "mpq bar" may have

VARIANTS: dict[str, Callable[[Case], Runner]] = {
    "eager": eager,
    **INDUCTOR,
    "pt2e int8": pt2e_int8,
    "pt2e int8 + bf16": partial(pt2e_int8, bf16=True),
    "torchao int8": torchao_int8,
    "onnx runtime int8": onnx_runtime_int8,
    "openvino": openvino,
    "openvino int8": openvino_int8,
    "mpq all bf16": partial(mpq, formats=["bfloat16"], tolerance=1.0),
    "mpq": mpq,
    BAR: mpq,  # `prepare` adds the tolerance
}
# What these become depends on times taken while they are built.
TIMING = {name for name in VARIANTS if "max-autotune" in name or name.startswith("mpq")} | {
    "pt2e int8 + bf16"  # compiled with max-autotune
}
