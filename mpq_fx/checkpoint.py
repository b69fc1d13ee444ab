"""Journal(path): what a tune measured, entry by entry, so that a killed one can go on.

A file begins with a line that names its version.  An entry is one line, the first letters of the
SHA-256 of what follows and that as JSON, then tensors as safetensors, whose length and SHA-256 the
JSON gives.  Entries are appended and never rewritten, so that an hour of measurements costs no more
to keep than a second.  The end of a file that a kill left behind is a part of an entry: it is cut
off.  Anything else that is not as it was written is an error, and the file stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from mpq_fx.errors import CheckpointError
from mpq_fx.facts import Identity

VERSION = 1
KEY = b"mpq-fx checkpoint "
HEAD = KEY + b"%d\n" % VERSION  # the first line
LONGEST = 1 << 24  # bytes of a line: fingerprints name every weight
DIGEST = 16  # letters of a SHA-256 in front of a line
SHOWN = 3  # differences that a refusal names

Tensors = Mapping[str, Tensor]
Address = tuple[int, str, str]  # graph, stage, unit


class Journal:
    """The open checkpoint of one tune; only one process holds it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise CheckpointError(
                f"the folder {self.path.parent} does not exist", fix=f"mkdir -p {self.path.parent}"
            )
        self._identities: dict[int, Identity] = {}
        self._places: dict[Address, tuple[int, int, dict[str, Any]]] = {}
        self._open = ExitStack()
        try:
            # Unbuffered: an entry is in the hands of the system, or it is not written.
            writer = open(self.path, "ab", buffering=0)  # noqa: SIM115 -- until `close`
            self._writer = self._open.enter_context(writer)
            self._reader = self._open.enter_context(open(self.path, "rb"))  # noqa: SIM115
        except OSError as error:
            self._open.close()
            raise self._failed("opened", error) from error
        try:
            self._hold()
            self._scan()
        except BaseException:
            self._open.close()
            raise

    def claim(self, graph: int, identity: Identity) -> None:
        """All further entries of a graph belong to `identity`; refuses if those there do not."""
        known = self._identities.get(graph)
        if known is None:
            self._append({"graph": graph, "identity": identity}, b"")
            self._identities[graph] = identity
        elif changed := differences(known, identity):
            raise CheckpointError(
                f"the checkpoint {self.path} cannot go on: since it was begun "
                f"{' and '.join(changed)} changed",
                at=described(known, identity),
                fix=f"delete {self.path} to begin again, or give checkpoint another file",
            )

    def known(self, graph: int, stage: str) -> frozenset[str]:
        """The units that a stage has entries of."""
        return frozenset(u for g, s, u in self._places if (g, s) == (graph, stage))

    def read(self, graph: int, stage: str, unit: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(facts, tensors) of an entry."""
        from safetensors.torch import load

        at, length, facts = self._places[graph, stage, unit]
        self._reader.seek(at)
        return facts["facts"], load(self._reader.read(length))

    def append(
        self, address: Address, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """One more entry; it is in the hands of the system when this returns."""
        from safetensors.torch import save

        graph, stage, unit = address
        given = {"graph": graph, "stage": stage, "unit": unit, "facts": dict(facts)}
        blob = save(dict(tensors))
        self._places[address] = (self._append(given, blob), len(blob), given)

    def close(self) -> None:
        """Everything is on the disk, and another process may go on."""
        try:
            os.fsync(self._writer.fileno())
        finally:
            self._open.close()

    def _append(self, facts: Mapping[str, Any], blob: bytes) -> int:
        """Where the tensors of the new entry begin."""
        whole = {**facts, "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
        line = _line(whole)
        end = self._writer.seek(0, os.SEEK_END)
        self._write(line + blob)
        return end + len(line)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:
                left = left[self._writer.write(left) :]
        except OSError as error:
            raise self._failed("written", error) from error

    def _hold(self) -> None:
        """Keep others out while the file is open; the system lets go of it with the process."""
        if sys.platform == "win32":  # has no fcntl: there nothing keeps a second tune out
            return
        import fcntl

        try:
            fcntl.flock(self._writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {self.path} is in use by another process",
                fix="wait for that tune, or give checkpoint another file",
            ) from error

    def _scan(self) -> None:
        """Read what is there; cut off what a kill left of the last entry."""
        first = self._reader.readline(len(KEY) + DIGEST)
        if first != HEAD and HEAD.startswith(first):  # nothing, or what a kill left of it
            self._writer.truncate(0)
            self._write(HEAD)
            return
        self._check_first(first)
        end = len(first)
        for facts, at in self._entries(self._reader):
            end = at + facts["bytes"]
            if "identity" in facts:
                self._identities[facts["graph"]] = facts["identity"]
            else:
                address = facts["graph"], facts["stage"], facts["unit"]
                self._places[address] = (at, facts["bytes"], facts)
        if end < self.path.stat().st_size:
            self._writer.truncate(end)

    def _check_first(self, line: bytes) -> None:
        if line == HEAD:
            return
        version = line.removeprefix(KEY).decode(errors="replace").strip()
        raise CheckpointError(
            f"{self.path} is a checkpoint of version {version}, this mpq-fx reads version {VERSION}"
            if line.startswith(KEY)
            else f"{self.path} is no checkpoint, and is left as it is",
            fix="give checkpoint another file",
        )

    def _entries(self, file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
        """(facts, where the tensors begin) of every whole entry."""
        while True:
            begin = file.tell()
            line = file.readline(LONGEST)
            if not line.endswith(b"\n") and len(line) < LONGEST:
                return  # the end of the file, or of what was written of it
            facts = _facts(line)
            if facts is None:
                raise self._corrupt(begin)
            at = file.tell()
            blob = file.read(facts["bytes"])
            if len(blob) < facts["bytes"]:
                return
            if hashlib.sha256(blob).hexdigest() != facts["sha256"]:
                raise self._corrupt(begin)
            yield facts, at

    def _corrupt(self, at: int) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {self.path} is corrupt: what begins at byte {at} is not what was "
            f"written there; the {len(self._places)} entries before it are whole",
            fix=f"truncate -s {at} {self.path} keeps those; or delete it to begin again",
        )

    def _failed(self, what: str, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint {self.path} cannot be {what}: {error.strerror}",
            fix="give checkpoint a file in a folder that you may write to, with room",
        )


def differences(old: Identity, new: Identity) -> list[str]:
    """The aspects that are not the same: "the model", "the data", …"""
    return [f"the {name}" for name in {**old, **new} if old.get(name) != new.get(name)]


def described(old: Identity, new: Identity) -> str:
    """ "options: sensitivity auto -> kl; model: up.weight", the first few"""
    found = []
    for aspect in {**old, **new}:
        one, two = old.get(aspect, {}), new.get(aspect, {})
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
        shown = [_difference(name, one.get(name), two.get(name)) for name in names[:SHOWN]]
        more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
        if names:
            found.append(f"{aspect}: {', '.join([*shown, *more])}")
    return "; ".join(found)


def _difference(name: str, old: str | None, new: str | None) -> str:
    """Contents are shown where they are words: a digest tells nobody anything."""
    if old is None or new is None:
        return f"{name} ({'new' if old is None else 'gone'})"
    if max(len(old), len(new)) >= 64:
        return name
    return f"{name} {old} -> {new}"


def _line(facts: Mapping[str, Any]) -> bytes:
    body = json.dumps(facts, ensure_ascii=False).encode()
    return hashlib.sha256(body).hexdigest()[:DIGEST].encode() + b" " + body + b"\n"


def _facts(line: bytes) -> dict[str, Any] | None:
    """What `_line` wrote, None if this is something else."""
    digest, _, body = line.removesuffix(b"\n").partition(b" ")
    if hashlib.sha256(body).hexdigest()[:DIGEST].encode() != digest:
        return None
    return json.loads(body)
