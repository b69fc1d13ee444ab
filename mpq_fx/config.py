"""Every option, checked once.  `options={...}` of torch.compile and `Config(...)` are the same
thing.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_fx.errors import ConfigError

if TYPE_CHECKING:
    from mpq_fx.facts import Plan

OBJECTIVES = ("latency", "size", "error")
ON_ERROR = ("raise", "float")
RELATIVE_BUDGETS = ("max_latency", "max_size", "max_bits", "max_bops", "max_activation_memory")
FLOOR = "min_bits"
SCALED = ("dynamic", "static")  # when the scale of an activation is known, where it has one


@dataclass(frozen=True)
class Config:
    """The user's wishes.  Raises ConfigError at once for anything that cannot be meant."""

    objective: str = "latency"  # what is minimized: latency, size or error
    tolerance: str | float | None = "bf16"  # largest relative RMS error of an output
    max_latency: float | str | None = None  # ms, or "0.5x" of float
    max_size: float | str | None = None  # bytes of weights, or "0.5x"
    max_bits: float | str | None = None  # mean bits over site weights, scales included
    min_bits: float | str | None = None  # the same mean is at least this
    max_bops: float | str | None = None  # multiply-accumulates × bits × bits
    max_activation_memory: float | str | None = None  # bytes between ops at the peak of a call
    formats: Any = None  # names, or {glob of sites: names}; kept as {glob: tuple}
    sensitivity: str = "auto"  # metric of the error table
    solver: str = "cp_sat"  # of the allocation problem
    search: str = "solver"  # how plans are looked for, asking for measured errors
    calibration_calls: int = 8  # distinct calls that torch.compile observes
    target: str = "auto"  # where ops run: "cpu", "triton", "reference", or a plug-in
    device: str | None = None  # GPU that target "triton" plans for: "h100"; None: the one at hand
    time_budget: float = 60.0  # seconds of measuring, solving, compiling
    plan: Plan | str | Path | None = None  # use this plan, no calibration
    on_error: str = "raise"  # or "float": after a failure run on in float
    cache_dir: str | Path | None = None  # measured latencies; default: user cache
    release: bool = field(default=False, repr=False)  # set by apply(release=True)
    loss: bool = field(default=False, repr=False)  # set by tune(loss=...)

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("on_error", self.on_error, ON_ERROR)
        _check_tolerance(self.tolerance)
        for name in (*RELATIVE_BUDGETS, FLOOR):
            _check_budget(name, getattr(self, name))
        _check_number("calibration_calls", self.calibration_calls, least=3, whole=True)
        _check_number("time_budget", self.time_budget, least=0.0)
        _check_path("cache_dir", self.cache_dir)
        _check_conflicts(self)
        _check_window(self)
        object.__setattr__(self, "formats", _as_rules("formats", self.formats))
        _check_names(self)

    @property
    def budgets(self) -> tuple[str, ...]:
        """The names of the budgets that are set, a floor among them, the tolerance apart."""
        named = (*RELATIVE_BUDGETS, FLOOR)
        return tuple(name for name in named if getattr(self, name) is not None)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Config:
        """Options of torch.compile → Config; an unknown name is refused with the nearest valid
        one.
        """
        options = dict(options or {})
        if isinstance(options.get("config"), Config):
            base = options.pop("config")
            return replace(base, **_known(options)) if options else base
        return cls(**_known(options))


def wished(config: Config | None) -> Config:
    """What a caller of tune, pareto or apply means by config=."""
    if config is None:
        return Config()
    if not isinstance(config, Config):
        raise ConfigError(
            f"config is a {type(config).__name__}, not a Config", fix="config=mpq_fx.Config(...)"
        )
    return config


def budget(value: float | str | None, of_float: float) -> float | None:
    """A budget as a number: 12.5 → 12.5, "0.5x" → 0.5 · of_float, None → None."""
    if value is None:
        return None
    return float(value[:-1]) * of_float if isinstance(value, str) else float(value)


def _known(options: Mapping[str, Any]) -> dict[str, Any]:
    valid = [f.name for f in fields(Config)]
    for name in options:
        if name not in valid:
            raise ConfigError(f"unknown option {name!r}", fix=nearest(name, valid))
    return dict(options)


def nearest(name: str, valid: list[str] | tuple[str, ...]) -> str:
    """ "did you mean 'tolerance'? valid: …" """
    close = difflib.get_close_matches(name, valid, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"


def _one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigError(
            f"{name}={value!r} is not one of {', '.join(valid)}", fix=nearest(str(value), valid)
        )


def _check_tolerance(value: object) -> None:
    if value is None or value == "bf16":
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_positive(value):
        raise ConfigError(
            f"tolerance={value!r} is neither 'bf16', a positive number, nor None",
            fix='options={"tolerance": 0.02}',
        )


def _check_budget(name: str, value: object) -> None:
    if value is None:
        return
    number = value
    if isinstance(value, str):
        try:
            number = float(value[:-1]) if value.endswith("x") else math.nan
        except ValueError:
            number = math.nan
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not _is_positive(number):
        raise ConfigError(
            f"{name}={value!r} is neither a positive number nor a share such as '0.5x'",
            fix=f'options={{"{name}": "0.5x"}}',
        )


def _check_number(name: str, value: object, *, least: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(
            f"{name}={value!r} must be {kind} of at least {least}",
            fix=f'options={{"{name}": {max(least, 8) if whole else 60.0}}}',
        )


def _check_path(name: str, value: object) -> None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}={value!r} is not a path", fix=f'options={{"{name}": "folder"}}')


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _check_conflicts(config: Config) -> None:
    if config.objective == "error" and not {*config.budgets} - {FLOOR}:
        raise ConfigError(
            "objective='error' without a budget is the float model itself",
            fix='add one, for example options={"objective": "error", "max_size": "0.5x"}',
        )
    if not isinstance(config.loss, bool):
        raise ConfigError(
            "a loss needs batches with what it is computed from, so it belongs to tune",
            fix="mpq_fx.tune(model, batches, loss=f)",
        )
    if config.tolerance is None and config.objective == "latency" and not config.budgets:
        raise ConfigError(
            "tolerance=None with objective='latency' allows any error at all",
            fix='name a tolerance: options={"tolerance": 0.05}',
        )


def _check_window(config: Config) -> None:
    """Two numbers, or two shares: what is a share of float is not known yet."""
    low, high = config.min_bits, config.max_bits
    if low is None or high is None or isinstance(low, str) != isinstance(high, str):
        return
    least, most = budget(low, 1.0), budget(high, 1.0)
    if least is not None and most is not None and least > most:
        raise ConfigError(
            f"min_bits={low!r} is above max_bits={high!r}: no mean lies between",
            fix=f'options={{"min_bits": {high!r}}} or less',
        )


def _as_rules(name: str, value: object) -> object:
    """A list means "everywhere": {"*": (...)}; values become tuples so that a Config is
    hashable.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return {"*": _listed(name, value, f'options={{"{name}": [$]}}')}
    return {
        str(glob): _listed(f"{name}[{glob!r}]", names, f'options={{"{name}": {{"{glob}": [$]}}}}')
        for glob, names in value.items()
    }


def _listed(where: str, value: object, typed: str) -> tuple[Any, ...]:
    """A list as a tuple; `typed` is what to type, with a $ for what is in it."""
    if isinstance(value, str):
        raise ConfigError(
            f"{where}={value!r} is a string, not a list of names",
            fix=typed.replace("$", f'"{value}"'),
        )
    if not isinstance(value, Iterable):
        raise ConfigError(
            f"{where}={value!r} is not a list of names", fix=typed.replace("$", '"int8"')
        )
    return tuple(value)


def _check_names(config: Config) -> None:
    from mpq_fx.formats import format_named

    for glob, names in (config.formats or {}).items():
        for name in map(str, names):
            formats, slash, scaling = name.partition("+")[0].partition("/")
            if slash and scaling not in SCALED:
                raise ConfigError(
                    f"formats[{glob!r}]: {name!r} is not a choice",
                    fix=nearest(name, [f"{formats}/{when}" for when in SCALED]),
                )
            for part in formats.split("*"):
                format_named(part)
