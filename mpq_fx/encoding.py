"""decode(encode(record), type) == record: the frozen records of `facts` as plain JSON values.

The type hints of the records are the schema, so a new field needs no line here.  A Choice is
written as its name, a mapping with tuple keys as rows [*key, value], whose order is kept.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mpq_fx.errors import PlanError
from mpq_fx.facts import Choice, Scaling

SCALINGS: dict[str, Scaling] = {"": "none", "/static": "static", "/dynamic": "dynamic"}
NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers; a measured error may be one


def encode(value: Any) -> Any:
    """A record, or anything made of records, as JSON values."""
    if isinstance(value, Choice):
        return value.name
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        if any(isinstance(key, tuple) for key in value):
            return [[*key, encode(item)] for key, item in value.items()]
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(value: Any, kind: Any, at: str) -> Any:
    """The record of type `kind` that `value` encodes; a PlanError names the place `at`."""
    if kind is Any:
        return value
    if kind is Choice:
        return parse_choice(_of(str, value, at), at=at)
    if is_dataclass(kind):
        return _decode_record(value, kind, at)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else decode(value, args[0], at)
    if origin is Literal:
        return value if value in args else _refuse(value, f"one of {', '.join(args)}", at)
    if origin is tuple:
        return tuple(decode(item, args[0], f"{at}[{k}]") for k, item in _items(value, args, at))
    if origin is Mapping:
        return _decode_mapping(value, args[0], args[1], at)
    return _of(kind, value, at)


def parse_choice(name: str, *, at: str = "") -> Choice:
    """parse_choice(choice.name) == choice: "int8*int8_tensor/static"; no format is looked up."""
    core, *transforms = name.split("+")
    core, slash, scaled = core.partition("/")
    scaling = SCALINGS.get(slash + scaled)
    weight, _, activation = core.partition("*")
    if not weight or scaling is None or not all(transforms):
        raise PlanError(
            f"{name!r} is not a choice",
            at=at,
            fix='weight*activation/scaling+transform, for example "int8*uint8_tensor/static"',
        )
    return Choice(weight, activation or weight, scaling, tuple(transforms))


def _decode_record(value: Any, kind: Any, at: str) -> Any:
    hints = _hints(kind)
    found = _of(dict, value, at)
    missing, unknown = sorted(hints.keys() - found.keys()), sorted(found.keys() - hints.keys())
    if missing or unknown:
        raise PlanError(
            "; ".join(
                f"{role} field {', '.join(map(repr, names))}"
                for role, names in (("missing", missing), ("unknown", unknown))
                if names
            ),
            at=at,
            fix="load it with the version of mpq-fx that wrote it, or tune again",
        )
    return kind(**{name: decode(found[name], hint, f"{at}.{name}") for name, hint in hints.items()})


_hints = lru_cache(get_type_hints)


def _decode_mapping(value: Any, key: Any, item: Any, at: str) -> dict[Any, Any]:
    if get_origin(key) is not tuple:
        return {k: decode(v, item, f"{at}[{k!r}]") for k, v in _of(dict, value, at).items()}
    size, rows = len(get_args(key)), {}
    if value == {}:  # an empty mapping says nothing about its keys
        return rows
    for k, row in enumerate(_of(list, value, at)):
        if not isinstance(row, list) or len(row) != size + 1:
            _refuse(row, f"a row of {size} names and a number", f"{at}[{k}]")
        names = tuple(_of(str, name, f"{at}[{k}]") for name in row[:-1])
        rows[names] = decode(row[-1], item, f"{at}[{k}]")
    return rows


def _items(value: Any, args: tuple[Any, ...], at: str) -> list[tuple[int, Any]]:
    assert args[-1] is Ellipsis, f"{at}: only tuples of one type are written to files"
    return list(enumerate(_of(list, value, at)))


def _of(kind: type, value: Any, at: str) -> Any:
    """`value` if it is of a JSON type; an int passes for a float, a bool for no number."""
    if kind is float and value in NOT_FINITE:
        return float(value)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return _refuse(value, f"a {kind.__name__}", at)
    return value


def _refuse(value: Any, wanted: str, at: str) -> Any:
    raise PlanError(
        f"{str(value)[:60]!r} stands where {wanted} belongs",
        at=at,
        fix="load the file as mpq-fx wrote it, or tune again",
    )
