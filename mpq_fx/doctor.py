"""machine -> Examination: versions, instruction set, targets, and why something is missing"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpq_fx.passes.lower.target import Target

PACKAGES = ("mpq-fx", "torch", "triton", "ortools", "safetensors", "numpy", "torch-tensorrt")

SCALAR = "scalar"
NO_VECTORS = (
    "Inductor compiles no vectors here, so every kernel that it writes is many times slower: its "
    "trial program was not built, or not loaded by a Python in this directory.  Is a C++ compiler "
    "installed?  Is there a file beside you named like a module of Python (ctypes.py, types.py)?"
)


@dataclass(frozen=True)
class TargetFacts:
    """A target, "" or why it cannot run here, what it knows, op -> choice -> reasons why not on
    this machine (none if it can run), and the names of plug-in kernels in front of its own.
    """

    name: str
    unavailable: str
    facts: dict[str, Any]
    choices: dict[str, dict[str, tuple[str, ...]]]
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examination:
    versions: dict[str, str]
    machine: dict[str, str]
    targets: tuple[TargetFacts, ...]
    problems: tuple[str, ...]


def examine(device: str | None = None) -> Examination:
    """Look at everything that decides what mpq can do here, or plan for a device by name."""
    versions = {name: _version(name) for name in PACKAGES}
    machine, targets = _machine(), _targets(device)
    problems = [*torch_problems(versions["torch"])]
    if machine["generated C++"] == SCALAR:
        problems.append(NO_VECTORS)
    if all(target.unavailable for target in targets):
        problems.append("no target can run here: every layer would stay in float")
    return Examination(versions, machine, targets, tuple(problems))


def torch_problems(found: str, wanted: str | None = None) -> list[str]:
    """[] if the version lies in the range that mpq-fx requires, and was therefore tested with."""
    wanted = wanted if wanted is not None else _required("torch")
    here = _numbers(found)
    for operator, limit in re.findall(r"(>=|<)\s*([\d.]+)", wanted):
        inside = here >= _numbers(limit) if operator == ">=" else here < _numbers(limit)
        if not inside:
            return [
                f"torch {found} was never tested with mpq-fx, which asks for torch{wanted}: "
                "capture uses private interfaces that may have changed"
            ]
    return []


def printed(found: Examination) -> None:
    """The examination on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    for title, facts in (("Versions", found.versions), ("Machine", found.machine)):
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
        for name, value in facts.items():
            table.add_row(name, value)
        console.print(title, style="bold")
        console.print(table)
        console.print()
    console.print("Targets, best first", style="bold")
    for target in found.targets:
        _print_target(console, target)
    for problem in found.problems:
        console.print(f"problem: {problem}", style="red")
    if not found.problems:
        console.print("everything that mpq needs is here", style="green")


def _print_target(console: Any, target: TargetFacts) -> None:
    state = f"not available: {target.unavailable}" if target.unavailable else "available"
    console.print(f"{target.name}  {state}", style="dim" if target.unavailable else "")
    for name, value in target.facts.items():
        console.print(f"    {name}: {_words(value)}")
    for op, offered in target.choices.items():
        console.print(f"    {op}: {', '.join(n for n, reasons in offered.items() if not reasons)}")
    refused = dict.fromkeys(item for offered in target.choices.values() for item in offered.items())
    for name, reasons in refused:
        if reasons:
            console.print(f"    not {name}: {'; '.join(reasons)}", style="dim")
    if target.kernels:
        console.print(f"    kernels of plug-ins, tried first: {', '.join(target.kernels)}")
    console.print()


def _targets(device: str | None) -> tuple[TargetFacts, ...]:
    from mpq_fx.passes import targets
    from mpq_fx.passes.lower.kernel import with_kernels
    from mpq_fx.passes.lower.target import placed
    from mpq_fx.plugins import load

    kernels, known = load("kernels"), targets().values()
    able = [t for t in known if t.on is not None or device is None]
    return tuple(
        TargetFacts(
            t.name,
            t.unavailable(),
            dict(t.facts()) if not t.unavailable() else {},
            {op: _examined(t, op) for op in t.choices} if not t.unavailable() else {},
            tuple(name for name, kernel in kernels.items() if kernel.target == t.name),
        )
        for t in (with_kernels(placed(target, device), kernels) for target in able)
    )


def _examined(target: Target, op: str) -> dict[str, tuple[str, ...]]:
    """Each choice of an op, and what speaks against it here at one row, where most is offered."""
    from mpq_fx.facts import Site

    site = Site(op, op, op, input_shape=(1, 256), weight_shape=(256, 256), macs=256 * 256)
    return {c.name: tuple(target.refuse(site, c)) for c in target.choices[op]}


def _machine() -> dict[str, str]:
    import torch

    mkldnn = re.search(r"oneDNN\) v([\d.]+)|MKL-DNN v([\d.]+)", torch.__config__.show())
    cuda = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "generated C++": generated_vectors(),
        "threads": str(torch.get_num_threads()),
        "oneDNN": (mkldnn[1] or mkldnn[2]) if mkldnn else "absent from this PyTorch",
        "GPU": torch.cuda.get_device_name() if cuda else "none that PyTorch can use",
    }


def generated_vectors() -> str:
    """The instruction set that Inductor's own kernels are compiled for, or "scalar"."""
    from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa

    found = pick_vec_isa()
    return SCALAR if found == invalid_vec_isa else str(found)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _required(name: str) -> str:
    """The version range of a dependency, as this distribution declares it."""
    lines = requires("mpq-fx") or []
    found = (re.match(rf"{name}([<>=!~].*?)(;|$)", line.replace(" ", "")) for line in lines)
    return next((match[1] for match in found if match), "")


def _numbers(text: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13)"""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def _words(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, (list, tuple, set, frozenset))
        else str(value)
    )
