"""Every error a user can cause, and nothing else: what (with values), where, what to type instead.

Bugs of mpq-fx itself are plain `AssertionError`s; they are never wrapped in these.
"""

from __future__ import annotations


class MpqError(Exception):
    """what / where / fix, printed on three lines; `at` and `fix` are left out when empty."""

    def __init__(self, what: str, *, at: str = "", fix: str = "") -> None:
        self.what, self.at, self.fix = what, at, fix
        lines = [what]
        if at:
            lines.append(f"  at   {at}")
        if fix:
            lines.append(f"  fix  {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.at, self.fix)


class ConfigError(MpqError):
    """An option has an unknown name, a value out of range, or conflicts with another."""


class UnsupportedError(MpqError):
    """A format, an op or a model cannot run on the chosen target."""


class InfeasibleError(MpqError):
    """No plan meets the budgets; `what` names the conflicting ones and the smallest reachable
    values.
    """


class PlanError(MpqError):
    """A plan file is corrupt, from another version, or made for another model."""


class CheckpointError(MpqError):
    """A checkpoint of a tune is corrupt, in use, or of another model, other data or options."""


class ProcessError(MpqError):
    """Processes that tune together lost one of them, or do not tune the same."""


class CalibrationError(MpqError):
    """The recorded inputs cannot support a plan: too few, constant, or not finite."""


class WeightError(MpqError):
    """A weight is not finite, was released, or changed where it must not."""


class PluginError(MpqError):
    """A plug-in cannot be loaded, or two packages claim one name."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _rebuild(kind: type[MpqError], what: str, at: str, fix: str) -> MpqError:
    return kind(what, at=at, fix=fix)
