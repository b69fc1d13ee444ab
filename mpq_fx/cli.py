"""The mpq command: tune a model, look at plans, check the machine; heavy imports wait for use."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpq_fx.config import Config
from mpq_fx.errors import ConfigError, MpqError

if TYPE_CHECKING:
    from mpq_fx.report import Report

# A mapping has its own option, and so has a loss; `tune` observes all batches; the others are for
# what comes later.
NOT_TUNED = ("formats", "loss", "calibration_calls", "plan", "release")
MIN_WIDTH = 80
SYNTHETIC_METHODS = {  # of mpq_fx.synthetic, each with a shape
    "distilled": "32x3x224x224",
    "sampled": "8x128",
    "random_tokens": "8x128",
}


OPTIONS = re.compile(r"options=(\{[^{}]*\})")  # in errors, as torch.compile takes them


class Failure(click.ClickException):
    """An MpqError as a message on stderr, without a traceback."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class Commands(click.Group):
    """A group whose commands may raise MpqError."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MpqError as error:
            raise Failure(OPTIONS.sub(_as_flags, str(error))) from error


def _as_flags(found: re.Match[str]) -> str:
    """options={"max_size": 1496}  ->  --max-size 1496"""
    try:
        options = json.loads(found[1])
    except ValueError:
        return found[0]
    if not options or not all(isinstance(value, (int, float, str)) for value in options.values()):
        return found[0]
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


class Wish(click.ParamType):
    """A value of an option of Config: a number if it reads as one, None for "none", else text."""

    name = "value"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lower() == "none":
            return None
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        return value


def _be_quiet(ctx: click.Context, param: click.Parameter, is_quiet: bool) -> None:
    """`mpq -q tune` and `mpq tune -q` are the same."""
    ctx.obj = bool(ctx.obj) or is_quiet
    _log_to_stderr(logging.WARNING if ctx.obj else logging.INFO)


_quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    callback=_be_quiet,
    help="No progress and no log, only results.",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mpq-fx", prog_name="mpq")
@_quiet_option
def main() -> None:
    """Mixed precision for PyTorch models, chosen per layer from measurements."""


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option per field of Config; its help is the comment behind the field."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.+)$", inspect.getsource(Config), re.M))
    for field in reversed([f for f in fields(Config) if f.name not in NOT_TUNED]):
        shown = f"{comments.get(field.name, '')}  [default: {field.default}]".strip()
        option = click.option(
            "--" + field.name.replace("_", "-"), type=Wish(), help=shown, default=field.default
        )
        command = option(command)
    return command


@main.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where the plan is written (JSON).",
)
@click.option("--batches", help="module:function or module:list of calibration batches.")
@click.option(
    "--synthetic",
    metavar="METHOD:SHAPE",
    help="Without data: distilled:32x3x224x224 makes images from batch norm statistics, "
    "sampled:8x128 lets a causal language model write tokens, random_tokens:8x128 draws them.",
)
@click.option("--metric", help="module:function of a model; higher is better.")
@click.option("--max-drop", type=float, help="Largest relative drop of the metric.")
@click.option("--loss", help="module:function of an output and its batch, for interlayer_loss.")
@click.option(
    "--formats",
    "formats",
    multiple=True,
    metavar="GLOB=FORMAT,…",
    help="Formats allowed for the sites that match; may be given again.",
)
@click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where measured errors are kept: the same command goes on after a kill.",
)
@_config_options
@_quiet_option
@click.pass_obj
def tune(quiet: bool, /, model: str, output: Path, formats: tuple[str, ...], **given: Any) -> None:
    """Find a plan for MODEL, a module:factory that returns a model, or (model, batches).

    Under `torchrun --nproc-per-node N -m mpq_fx tune` the processes share the measurements.
    """
    batches, synthetic = given.pop("batches"), given.pop("synthetic")
    asked = {name: given.pop(name) for name in ("metric", "max_drop", "loss", "checkpoint")}
    config = Config.from_options({**given, "formats": _rules(formats)})
    if asked["checkpoint"] in (output, output.with_suffix(".safetensors")):
        raise ConfigError(
            f"the plan would overwrite the checkpoint {asked['checkpoint']}",
            fix=f"--checkpoint {output.with_suffix('.checkpoint')}",
        )
    import mpq_fx
    from mpq_fx.launched import launched
    from mpq_fx.plan import check_path, save
    from mpq_fx.report import headline

    check_path(output)

    def make(is_first: bool) -> tuple[Any, Any]:
        return _made(model, batches, _recipe(synthetic, batches), progress=is_first and not quiet)

    with _resumable(asked["checkpoint"]), launched(make) as (is_first, (net, inputs)):
        if not is_first:
            _log_to_stderr(logging.ERROR)
        asked |= {name: asked[name] and _load(asked[name]) for name in ("metric", "loss")}
        found = mpq_fx.tune(net, inputs, config=config, progress=not quiet, **asked)
        if is_first:
            save(found, output)
            click.echo(f"{output}: {headline(found)}")


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
def show(plan: Path) -> None:
    """Print a plan: every site, coverage, and what more is possible."""
    from rich.console import Console

    from mpq_fx.report_text import rendered

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(rendered(_report(plan), max(console.width, MIN_WIDTH)))


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def diff(a: Path, b: Path) -> None:
    """Print what differs between two plans; exit code 1 if something does."""
    from mpq_fx.plan import diff as differences
    from mpq_fx.plan import load

    found = differences(load(a), load(b))
    click.echo(str(found))
    if found.choices or found.numbers:
        raise SystemExit(1)


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where the page is written (HTML).",
)
def report(plan: Path, output: Path) -> None:
    """Write a plan as one self-contained HTML page."""
    found = _report(plan)
    if not output.parent.is_dir():
        raise ConfigError(
            f"the folder {output.parent} does not exist", fix=f"mkdir -p {output.parent}"
        )
    click.echo(f"{found.to_html(output)}")


@main.command()
@click.argument("model", required=False)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--variants", metavar="NAME,…", help="Only these, for example 'mpq,inductor bf16'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def bench(model: str | None, batch: int, variants: str | None, as_json: bool) -> None:
    """Measure MODEL, or all of them, against eager PyTorch, Inductor, PT2E int8, torchao, ONNX
    Runtime and OpenVINO, one process per variant; what is not installed is named and left out.
    With "gpu" for MODEL: the kernels of the target triton by themselves, on the GPU at hand.
    """
    from mpq_fx.benchmark import main as run

    run(model, batch, variants, as_json)


@main.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("mpq-demo"),
    show_default=True,
    help="Folder of the HTML reports.",
)
@click.option("--quick", is_flag=True, help="One net on the reference target, nothing timed.")
@_quiet_option
@click.pass_obj
def demo(quiet: bool, output: Path, quick: bool) -> None:
    """Plan three trained nets on this machine and show what was gained; takes minutes."""
    from mpq_fx.demo import main as run

    run(progress=not quiet, output=output, quick=quick)


@main.command()
@click.option("--device", metavar="NAME", help="What a GPU that is not here could run: h100, …")
def doctor(device: str | None) -> None:
    """Say what can run here and why the rest cannot; exit code 1 if something has to be fixed."""
    from mpq_fx.doctor import examine, printed

    found = examine(device)
    printed(found)
    if found.problems:
        raise SystemExit(1)


def _report(path: Path) -> Report:
    from mpq_fx.plan import load
    from mpq_fx.report import report_of

    return report_of([(path.name, load(path), "")])


def _rules(given: tuple[str, ...]) -> dict[str, tuple[str, ...]] | None:
    """("encoder.*=int8,bfloat16", …) -> {"encoder.*": ("int8", "bfloat16"), …}"""
    rules = {}
    for rule in given:
        glob, equals, names = rule.partition("=")
        if not equals or not names:
            raise ConfigError(
                f"--formats {rule!r} is not GLOB=FORMAT,…",
                fix="--formats 'encoder.*=int8,bfloat16'",
            )
        rules[glob] = tuple(names.split(","))
    return rules or None


def _recipe(synthetic: str | None, batches: str | None) -> tuple[str, tuple[int, ...]] | None:
    """ "distilled:32x3x224x224" -> ("distilled", (32, 3, 224, 224))"""
    if synthetic is None:
        return None
    if batches is not None:
        raise ConfigError("--synthetic and --batches are two sources of inputs", fix="one of them")
    method, _, shape = synthetic.partition(":")
    if method not in SYNTHETIC_METHODS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ConfigError(
            f"--synthetic {synthetic!r} is not METHOD:SHAPE",
            fix="one of " + ", ".join(f"{m}:{s}" for m, s in SYNTHETIC_METHODS.items()),
        )
    return method, tuple(map(int, shape.split("x")))


def _load(name: str) -> Any:
    """ "package.module:attribute" -> the object, with the working directory importable."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{name!r} is not module:name", fix="for example my_model:make")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module was found, and lacks something itself: its traceback tells more
        raise ConfigError(
            f"there is no module {error.name!r}",
            fix=f"run mpq in the folder of {module}, or install it",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"{module} has no {attribute!r}",
                fix=f"it has {', '.join(_public(found)) or 'no public names'}",
            )
        found = getattr(found, part)
    return found


def _public(module: Any) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")][:8]


def _made(
    model: str,
    batches: str | None,
    recipe: tuple[str, tuple[int, ...]] | None,
    *,
    progress: bool,
) -> tuple[Any, Any]:
    """(model, calibration batches), from what the user's functions return, or from the model."""
    made = _load(model)
    made = made() if _is_factory(made) else made
    net, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if recipe is not None:
        from mpq_fx.synthetic import METHODS

        method, shape = recipe
        inputs = METHODS[method](net, shape, progress=progress)
    elif batches is not None:
        inputs = _load(batches)
        inputs = inputs() if _is_factory(inputs) else inputs
    if inputs is None:
        raise ConfigError(
            f"{model} returns a model without batches to calibrate on",
            fix="--batches module:function, or return (model, batches); without data, "
            "--synthetic distilled:32x3x224x224 or random_tokens:8x128",
        )
    return net, inputs


@contextmanager
def _resumable(checkpoint: Path | None) -> Iterator[None]:
    """Behind Ctrl-C say how a tune goes on, or how it could have."""
    try:
        yield
    except KeyboardInterrupt:
        how = f"goes on from {checkpoint}" if checkpoint else "would go on with --checkpoint FILE"
        click.echo(f"interrupted: the same command {how}", err=True)
        raise


def _is_factory(made: Any) -> bool:
    """A function or a class, but not a model, which is callable too."""
    return inspect.isroutine(made) or inspect.isclass(made)


def _log_to_stderr(level: int) -> None:
    """The library logs and never prints; the command shows the log."""
    from rich.console import Console
    from rich.logging import RichHandler

    log = logging.getLogger("mpq_fx")
    log.handlers = [h for h in log.handlers if not isinstance(h, RichHandler)]
    log.addHandler(RichHandler(console=Console(stderr=True), show_path=False, show_time=False))
    log.setLevel(level)
    log.propagate = False
