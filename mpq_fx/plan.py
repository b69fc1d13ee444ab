"""load(save(plan)) == plan; resolve(plan, budgets) = argmin over the stored tables, without data.

plan.json holds decisions, tables, measurements and the solver's words, for people and for diff;
plan.safetensors beside it holds tensors.  docs/plan_file.md describes the format.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpq_fx.encoding import decode, encode, parse_choice
from mpq_fx.errors import ConfigError, PlanError
from mpq_fx.facts import Choice, Plan

VERSION = 1
KEY = "mpq_fx_plan"
ABSENT = "(absent)"
LINE = 100  # a list or an object that fits on a line of this length is written on one


def save(plan: Plan, path: str | Path) -> None:
    """plan -> `path` (JSON) and, if it has tensors, the same name with .safetensors; both whole."""
    path = Path(path)
    check_path(path)
    facts = encode(replace(plan, tensors={}))
    facts["tensors"] = None
    if plan.tensors:
        blob, beside = _pack(plan.tensors), path.with_suffix(".safetensors")
        facts["tensors"] = {"file": beside.name, "sha256": hashlib.sha256(blob).hexdigest()}
        _write(beside, blob)
    text = _pretty({KEY: VERSION, **facts}) + "\n"
    _write(path, text.encode())


def load(path: str | Path) -> Plan:
    """The plan that `save` wrote; PlanError says what is wrong with any other file."""
    path = Path(path)
    facts = _read(path)
    version = facts.pop(KEY, None)
    if version != VERSION:
        raise PlanError(
            f"{path} is not a plan"
            if version is None
            else f"{path} is a plan of version {version}, this mpq-fx reads version {VERSION}",
            fix="tune again with this version, or install the one that wrote the file",
        )
    beside = facts.get("tensors")
    plan = decode({**facts, **({"tensors": {}} if "tensors" in facts else {})}, Plan, path.name)
    for unit, choice in plan.choices.items():
        check_formats(choice, at=f"{path.name}.choices[{unit!r}]")
    return replace(plan, tensors=_unpack(path, beside)) if beside is not None else plan


def check_formats(choice: Choice, *, at: str = "") -> None:
    """PlanError if a format of the choice is not known here."""
    from mpq_fx.formats import format_named

    for name in (choice.weight, choice.activation):
        try:
            format_named(name)
        except ConfigError as error:
            raise PlanError(error.what, at=at, fix=error.fix or "install its plug-in") from error


@dataclass(frozen=True)
class Difference:
    """What is not the same in two plans; `str()` is for people, and empty for equal decisions."""

    choices: tuple[tuple[str, str, str], ...]  # unit, choice in a, choice in b; "" where absent
    numbers: tuple[tuple[str, float | None, float | None], ...]
    units: int

    def __str__(self) -> str:
        if not self.choices and not self.numbers:
            return f"no difference: {self.units} sites, the same choices and measurements"
        width = max((len(unit) for unit, _, _ in self.choices), default=0)
        old = max((len(a or ABSENT) for _, a, _ in self.choices), default=0)
        lines = [f"{len(self.choices)} of {self.units} sites differ"]
        lines += [
            f"  {u:{width}}  {a or ABSENT:{old}} -> {b or ABSENT}" for u, a, b in self.choices
        ]
        lines += [f"  {name}: {_number(a)} -> {_number(b)}" for name, a, b in self.numbers]
        return "\n".join(lines)


def diff(a: Plan, b: Plan) -> Difference:
    """Choices and headline numbers that differ from a to b."""
    units = dict.fromkeys((*a.choices, *b.choices))
    pairs = [(u, _name(a.choices.get(u)), _name(b.choices.get(u))) for u in units]
    left, right = _headline(a), _headline(b)
    names = dict.fromkeys((*left, *right))
    return Difference(
        tuple(pair for pair in pairs if pair[1] != pair[2]),
        tuple((n, left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)),
        len(units),
    )


def _headline(plan: Plan) -> dict[str, float]:
    found: dict[str, float | None] = {"error": plan.error, "tolerance": plan.tolerance}
    found |= {f"ms of {name}": ms for name, ms in plan.latency_ms.items()}
    found |= {f"error of {name}": error for name, error in plan.errors.items()}
    if not plan.latency_ms:  # no race: all that is known of time is that of the layers
        found |= {"ms of layers in float": _total(row.ms_before for row in plan.ledger)}
        found |= {"ms of layers": _total(row.ms_after for row in plan.ledger)}
    return {name: value for name, value in found.items() if value is not None}


def _total(found: Iterable[float | None]) -> float | None:
    """Their sum; None where there is nothing to sum."""
    known = [ms for ms in found if ms is not None]
    return sum(known) if known else None


def _name(choice: Choice | None) -> str:
    return "" if choice is None else choice.name


def _number(value: float | None) -> str:
    return "(none)" if value is None else f"{value:.4g}"


def check_path(path: Path) -> None:
    """PlanError where no plan can be saved: to be asked before there is one."""
    if path.suffix == ".safetensors":
        raise PlanError(
            f"{path} would hold both the plan and its tensors",
            fix=f"save to {path.with_suffix('.json')}",
        )
    if not path.parent.is_dir():
        raise PlanError(f"the folder {path.parent} does not exist", fix=f"mkdir -p {path.parent}")


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing: a crash leaves the old file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise PlanError(
            f"cannot write the plan {path}: {error.strerror}",
            fix="save to a folder that you may write to, with room",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    fix = "tune again: mpq tune module:factory -o plan.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read the plan {path}: {error.strerror}", fix=fix) from error
    except ValueError as error:
        raise PlanError(f"{path} is not JSON, or only a part of it: {error}", fix=fix) from error
    if not isinstance(facts, dict):
        raise PlanError(f"{path} is not a plan", fix=fix)
    return facts


def _pack(tensors: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save as pack

    return pack(
        {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in sorted(tensors.items())
        }
    )


def _unpack(path: Path, beside: Any) -> dict[str, Any]:
    if not isinstance(beside, dict) or sorted(beside) != ["file", "sha256"]:
        raise PlanError(
            f"{str(beside)[:60]!r} does not name a file and its sha256",
            at=f"{path.name}.tensors",
            fix="tune again",
        )
    file = path.with_name(Path(str(beside["file"])).name)
    try:
        blob = file.read_bytes()
    except OSError as error:
        raise PlanError(
            f"{path} needs {file}: {error.strerror}", fix="keep the two files together"
        ) from error
    if hashlib.sha256(blob).hexdigest() != beside["sha256"]:
        raise PlanError(
            f"{file} is not the file that {path} was saved with: checksum differs",
            fix="copy both files again, or tune again",
        )
    from safetensors.torch import load as unpack

    return unpack(blob)


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with sorted keys and two spaces of indent; what fits on one line stays on it."""
    line = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or len(indent) + len(line) <= LINE:
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (key != KEY, key))  # the version comes first
        items = [
            f"{json.dumps(key, ensure_ascii=False)}: {_pretty(value[key], inner)}" for key in keys
        ]
        opening, closing = "{", "}"
    else:
        items, (opening, closing) = [_pretty(item, inner) for item in value], "[]"
    body = f",\n{inner}".join(items)
    return f"{opening}\n{inner}{body}\n{indent}{closing}"


__all__ = ["Difference", "check_formats", "diff", "load", "parse_choice", "save"]
