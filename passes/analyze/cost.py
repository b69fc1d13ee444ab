"""ms[u, c] and ms[u, c, v, d] measured once per distinct (op, shapes, choices) on this device;
bytes, bits, bops exact.

Measured latencies are kept on disk, keyed by device, library versions, op, shapes and choice; those
of plug-ins are not, whose code may change under one version.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

import mpq_fx
from mpq_fx.facts import Choice, Site, Table
from mpq_fx.formats import FORMATS
from mpq_fx.passes.lower.target import Target

Options = Mapping[str, tuple[Choice, ...]]
ROUNDS = 3


def latency(
    sites: tuple[Site, ...],
    options: Options,
    target: Target,
    *,
    edges: Mapping[str, str] | None = None,
    ties: Sequence[tuple[str, ...]] = (),
    cache_dir: str | Path | None = None,
) -> Table:
    """Milliseconds of each (unit, choice), and of the conversion between two sites of an edge.

    A conversion that lies on no edge is part of the site that reads its result; a tensor that
    tied sites read is converted once.  Each is measured ROUNDS times, all others in between, and
    the least counts: what else the machine does only adds.
    """
    begin, path = time.monotonic(), cache_path(target, cache_dir)
    kept, edges = {} if target.predicted else read(path), edges or {}
    asked = _measurements(sites, options, target, edges, ties)
    unkept = _unkept(sites, options, target)
    known = {key: ms for key, ms in kept.items() if key not in unkept}
    new = {key: call for key, call in asked.items() if key not in known}
    for _ in range(ROUNDS):
        for key, call in new.items():
            known[key] = min(call(), known.get(key, math.inf))
    if not target.predicted and (found := {k: known[k] for k in new if k not in unkept}):
        write(path, kept | found)
    values, pairs = _assembled(sites, options, known, edges, ties)
    return Table(
        target.predicted or "microbenchmark",
        "ms",
        values,
        pairs=pairs,
        provenance={
            "measured": 0 if target.predicted else len(new),
            "cached": len(asked) - len(new),
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - begin, 3),
        },
    )


def _measurements(
    sites: Sequence[Site],
    options: Options,
    target: Target,
    edges: Mapping[str, str],
    ties: Sequence[tuple[str, ...]],
) -> dict[str, Callable[[], float]]:
    """key -> how to measure it; equal shapes and choices share a key."""
    asked: dict[str, Callable[[], float]] = {}
    for site in sites:
        for choice in options[site.name]:
            asked[kernel_key(site, choice)] = partial(target.measure, site, choice)
    for site, before, after in _conversions(sites, options, edges, ties):
        key = conversion_key(site, before, after)
        asked[key] = partial(target.convert, site, before, after)
    return asked


def _unkept(sites: Sequence[Site], options: Options, target: Target) -> set[str]:
    """Keys of what is not kept on disk."""
    return {
        kernel_key(site, choice)
        for site in sites
        for choice in options[site.name]
        if choice in target.unkept.get(site.op, ())
    }


def _conversions(
    sites: Sequence[Site],
    options: Options,
    edges: Mapping[str, str],
    ties: Sequence[tuple[str, ...]],
) -> Iterator[tuple[Site, Choice | None, Choice]]:
    """(reader, choice of the site before it if there is one, its own choice)"""
    repeated = {site for tie in ties for site in tie[1:]}
    for site in sites:
        if site.name in repeated:
            continue
        befores = options[edges[site.name]] if site.name in edges else (None,)
        for before in befores:
            for after in options[site.name]:
                yield site, before, after


def _assembled(
    sites: Sequence[Site],
    options: Options,
    known: Mapping[str, float],
    edges: Mapping[str, str],
    ties: Sequence[tuple[str, ...]],
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str, str, str], float]]:
    """Single and pairwise terms from what is known by key."""
    values = {
        (site.name, choice.name): known[kernel_key(site, choice)]
        for site in sites
        for choice in options[site.name]
    }
    pairs = {}
    for site, before, after in _conversions(sites, options, edges, ties):
        ms = known[conversion_key(site, before, after)]
        if before is None:
            values[site.name, after.name] += ms
        elif ms:
            pairs[edges[site.name], before.name, site.name, after.name] = ms
    return values, pairs


def kernel_key(site: Site, choice: Choice) -> str:
    """Of a product of two activations the second one's shape shows in the work alone."""
    facts = (site.op, site.input_shape, site.weight_shape, site.attributes, site.dtype)
    work = () if site.weight_shape else (site.macs,)
    return f"{(*facts, *work)} {choice.name}"


def conversion_key(site: Site, before: Choice | None, after: Choice) -> str:
    made = before.name if before else "fused"
    return f"{site.op} {site.input_shape} {site.dtype} {made} -> {after.name}"


def sizes(
    sites: tuple[Site, ...], options: Options, shared: Sequence[Sequence[str]] = ()
) -> dict[str, Table]:
    """Exact tables: bytes of the weight as stored, its share of mean bits, MAC · bits · bits.

    Mean bits are over sites.  Bytes that sites of one weight (`shared`) have in common count once:
    see `common_bytes`.
    """
    size, bits, bops = {}, {}, {}
    weights = max(1, sum(site.weight_numel for site in sites))
    for site in sites:
        for choice in options[site.name]:
            key = site.name, choice.name
            size[key] = stored_bits(site, choice) / 8
            bits[key] = 8 * size[key] / weights
            bops[key] = float(site.macs * width(choice.weight) * width(choice.activation))
    by_name = {site.name: site for site in sites}
    pairs = {}
    for names in shared:
        for first, second in itertools.pairwise(by_name[name] for name in names):
            pairs |= common_bytes(first, second, options)
    return {
        "size": Table("exact", "bytes", size, pairs=pairs),
        "bits": Table("exact", "bits", bits),
        "bops": Table("exact", "MAC·bits²", bops),
    }


def common_bytes(
    first: Site, second: Site, options: Options
) -> dict[tuple[str, str, str, str], float]:
    """{(u, c, v, d): -bytes} of two sites of one weight, where that is stored once for both.

    It is in the user's own precision, and in another format if the ops are the same: each op has a
    layout of its own.  Of more than two sites each is compared with the next, so that the bytes of
    a plan in which formats alternate are rather too many than too few.
    """
    own = first.dtype, second.dtype
    return {
        (first.name, c.name, second.name, d.name): -stored_bits(first, c) / 8
        for c in options[first.name]
        for d in options[second.name]
        if c.weight == d.weight and (first.op == second.op or (c.weight, d.weight) == own)
    }


def stored_bits(site: Site, choice: Choice) -> int:
    """Bits of a site's weight as stored; a dtype that is no format (float64) has no scales."""
    if not site.weight_shape:
        return 0
    if choice.weight in FORMATS:
        return FORMATS[choice.weight].storage_bits(site.weight_shape)
    return site.weight_numel * width(choice.weight)


def width(name: str) -> int:
    """Bits of one value of a format, or of a plain dtype."""
    return FORMATS[name].element.bits if name in FORMATS else getattr(torch, name).itemsize * 8


def cache_path(target: Target, cache_dir: str | Path | None) -> Path:
    """One file per (target, device, versions, threads): another CPU has other milliseconds, and
    another mpq-fx other kernels.
    """
    if cache_dir is None:
        from platformdirs import user_cache_dir

        cache_dir = os.environ.get("MPQ_CACHE_DIR") or user_cache_dir("mpq_fx")
    facts = {**target.facts(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    name = " ".join(f"{key}={value}" for key, value in sorted(facts.items()))
    safe = "".join(c if c.isalnum() or c in "=.-" else "_" for c in name)
    versions = f"mpq-fx={mpq_fx.__version__} torch={torch.__version__}"
    return Path(cache_dir) / f"latency {target.name} {versions} {safe}.json"


def read(path: Path) -> dict[str, float]:
    """Known latencies; a file that cannot be read is measured anew."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return (
        {k: v for k, v in found.items() if isinstance(v, float)} if isinstance(found, dict) else {}
    )


def write(path: Path, known: Mapping[str, float]) -> None:
    """Replace the file at once, so that two processes never see half of one."""
    part: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            part = Path(file.name)
            json.dump(dict(known), file, indent=1, sort_keys=True)
        os.replace(part, path)
    except OSError:  # a read-only home, a full disk: measuring again is all that is lost
        return
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
