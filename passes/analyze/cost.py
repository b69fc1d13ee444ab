"""ms[u, c] measured once per distinct (op, shapes, choice) on this device; bytes, bits, bops exact.

Measured latencies are kept on disk, keyed by device, library versions, op, shapes and choice.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from mpq_fx.facts import Choice, Site, Table
from mpq_fx.formats import FORMATS
from mpq_fx.passes.lower.target import Target

Options = Mapping[str, tuple[Choice, ...]]


def latency(
    sites: tuple[Site, ...],
    options: Options,
    target: Target,
    *,
    cache_dir: str | Path | None = None,
) -> Table:
    """Milliseconds of each (unit, choice): the kernel and the conversion of its input."""
    begin, path = time.monotonic(), cache_path(target, cache_dir)
    known = read(path)
    values, measured = {}, 0
    for site in sites:
        for choice in options[site.name]:
            facts = (site.op, site.input_shape, site.weight_shape, site.attributes, site.dtype)
            key = f"{facts} {choice.name}"
            if key not in known:
                known[key] = target.measure(site, choice)
                measured += 1
            values[site.name, choice.name] = known[key]
    if measured:
        write(path, known)
    return Table(
        "microbenchmark",
        "ms",
        values,
        provenance={
            "measured": measured,
            "cached": len(values) - measured,
            "threads": torch.get_num_threads(),
            "seconds": round(time.monotonic() - begin, 3),
        },
    )


def sizes(sites: tuple[Site, ...], options: Options) -> dict[str, Table]:
    """Exact tables: bytes of the weight as stored, its share of mean bits, MAC · bits · bits."""
    size, bits, bops = {}, {}, {}
    weights = max(1, sum(site.weight_numel for site in sites))
    for site in sites:
        for choice in options[site.name]:
            key = site.name, choice.name
            size[key] = stored_bits(site, choice) / 8
            bits[key] = 8 * size[key] / weights
            bops[key] = float(site.macs * width(choice.weight) * width(choice.activation))
    return {
        "size": Table("exact", "bytes", size),
        "bits": Table("exact", "bits", bits),
        "bops": Table("exact", "MAC·bits²", bops),
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
    """One file per (target, device, versions, threads)."""
    if cache_dir is None:
        from platformdirs import user_cache_dir

        cache_dir = os.environ.get("MPQ_CACHE_DIR") or user_cache_dir("mpq_fx")
    facts = {**target.facts(), "machine": platform.machine(), "threads": torch.get_num_threads()}
    name = " ".join(f"{key}={value}" for key, value in sorted(facts.items()))
    safe = "".join(c if c.isalnum() or c in "=.-" else "_" for c in name)
    return Path(cache_dir) / f"latency {target.name} torch={torch.__version__} {safe}.json"


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(dict(known), file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError:  # a read-only home: measuring again next time is all that is lost
        return
