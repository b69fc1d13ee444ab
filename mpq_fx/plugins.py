"""entry points mpq_fx.{formats,passes,metrics,solvers,searches,kernels,targets}  ->  tables

An entry point's name is the name in the table.  Names are read from the metadata of installed
packages, all at once, so that a clash is found before anything is imported; a plug-in is imported
when it is first asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from mpq_fx.errors import ConfigError, PluginError

GROUPS = ("formats", "passes", "metrics", "solvers", "searches", "kernels", "targets")
RECORDS = {  # what a plug-in of a group is; of the other groups a function
    "mpq_fx.formats": ("mpq_fx.formats", "Format"),
    "mpq_fx.searches": ("mpq_fx.passes.allocate.search", "Search"),
    "mpq_fx.kernels": ("mpq_fx.passes.lower.kernel", "Kernel"),
    "mpq_fx.targets": ("mpq_fx.passes.lower.target", "Target"),
}
T = TypeVar("T")
_TRIED: list[EntryPoint] = []  # of this process only


class Catalog(Mapping[str, T], Generic[T]):
    """name -> object: what mpq-fx has, then what installed packages add to it."""

    def __init__(self, group: str, own: Mapping[str, T]) -> None:
        assert group in GROUPS, group
        self._group, self._own, self._names = group, dict(own), frozenset(own)

    def __getitem__(self, name: str) -> T:
        added = self._added()
        return self._own[name] if name in self._own else loaded(added[name])

    def __iter__(self) -> Iterator[str]:
        return iter((*self._own, *self._added()))

    def __len__(self) -> int:
        return len(self._own) + len(self._added())

    def __contains__(self, name: object) -> bool:
        """Known by name; whether a plug-in can be imported is seen when it is used."""
        return name in self._own or name in self._added()

    def named(self, name: str) -> T:
        """self[name], or ConfigError with the nearest name there is."""
        if name in self:
            return self[name]
        near = difflib.get_close_matches(str(name), [*self], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"{name!r} is none of the {self._group}", fix=f"{hint}valid: {', '.join(self)}"
        )

    def _added(self) -> Mapping[str, EntryPoint]:
        return declared(self._group, self._names)


def load(group: str) -> Mapping[str, Any]:
    """{name: object} of every plug-in of a group, by name; the table without what mpq-fx has."""
    return {name: loaded(entry) for name, entry in declared(group, frozenset()).items()}


@cache
def declared(group: str, own: frozenset[str]) -> Mapping[str, EntryPoint]:
    """What packages declare, by name; PluginError where two of them, or mpq-fx, claim one name."""
    found: dict[str, EntryPoint] = {}
    tried = [entry for entry in _TRIED if entry.group == f"mpq_fx.{group}"]
    for entry in sorted(
        (*entry_points(group=f"mpq_fx.{group}"), *tried), key=lambda e: (e.name, package(e))
    ):
        holder = "mpq-fx" if entry.name in own else None
        if entry.name in found:
            holder = package(found[entry.name])
        if holder is not None:
            uninstall = "" if entry.dist is None else f"pip uninstall {package(entry)}, or "
            raise PluginError(
                f"{holder} and {package(entry)} both name {entry.name!r} in mpq_fx.{group}",
                fix=f"{uninstall}rename it there",
            )
        found[entry.name] = entry
    return found


@cache
def loaded(entry: EntryPoint) -> Any:
    """The object behind an entry point; PluginError says whose it is and why it cannot be had."""
    try:
        found = entry.load()
    except Exception as error:  # code of somebody else: anything may happen
        raise PluginError(
            f"the plug-in {entry.name!r} of {package(entry)} cannot be loaded: "
            f"{type(error).__name__}: {error}",
            at=f"{entry.group}: {entry.value}",
            fix=f"pip install --upgrade {package(entry)}, or uninstall it",
        ) from error
    _check_kind(entry, found)
    if getattr(found, "name", entry.name) != entry.name:
        raise PluginError(
            f"{package(entry)} declares {entry.name!r}, which calls itself {found.name!r}",
            at=f"{entry.group}: {entry.value}",
            fix="one name for both",
        )
    return found


def _check_kind(entry: EntryPoint, found: Any) -> None:
    home, kind = RECORDS.get(entry.group, ("", ""))
    fits = isinstance(found, getattr(import_module(home), kind)) if kind else callable(found)
    if not fits:
        wanted = f"{home}.{kind}" if kind else "a function"
        raise PluginError(
            f"the plug-in {entry.name!r} of {package(entry)} is of type {type(found).__name__}, "
            f"not {wanted}",
            at=f"{entry.group}: {entry.value}",
            fix=f"name {wanted} there, or uninstall {package(entry)}",
        )


def package(entry: EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return entry.dist.name if entry.dist is not None else "this process"


def add(group: str, name: str, where: str) -> None:
    """What an entry point `name = where` would do, in this process only: to try a plug-in out."""
    assert group in GROUPS, group
    _TRIED.append(EntryPoint(name, where, f"mpq_fx.{group}"))
    declared.cache_clear()


def forget() -> None:
    """Read the installed packages anew, and drop what `add` added."""
    _TRIED.clear()
    declared.cache_clear()
    loaded.cache_clear()
