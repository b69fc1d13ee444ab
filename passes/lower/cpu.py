"""What this CPU's matrix units can do exactly, as facts; environment limits of oneDNN included."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

LEVELS = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX10_1_512",
    "AVX512_CORE_AMX",
    "AVX512_CORE_AMX_FP16",
)


@cache
def flags() -> frozenset[str]:
    """Instruction sets of the machine, in the spelling of torch.cpu."""
    probes = {
        "avx512": "_is_avx512_supported",
        "vnni": "_is_vnni_supported",
        "amx": "_is_amx_tile_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
        "avx2": "_is_avx2_supported",
    }
    return frozenset(
        name for name, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)()
    )


def has(name: str) -> bool:
    """Is an instruction set there, and not forbidden to oneDNN by ONEDNN_MAX_CPU_ISA?"""
    least = {
        "vnni": "AVX512_CORE_VNNI",
        "amx": "AVX512_CORE_AMX",
        "avx512": "AVX512_CORE",
        "avx512_bf16": "AVX512_CORE_BF16",
        "avx2": "AVX2",
    }[name]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    allowed = limit not in LEVELS or LEVELS.index(limit) >= LEVELS.index(least)
    return name in flags() and allowed


def packs(dtype: torch.dtype) -> bool:
    """Does oneDNN pack weights of these floats here?  Those of 16 bits take instructions for them;
    without, PyTorch's own ops run them.
    """
    mkldnn = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def facts() -> dict[str, Any]:
    """For a plan's provenance and for `mpq doctor`."""
    return {
        "isa": "+".join(
            name for name in ("avx2", "avx512", "avx512_bf16", "vnni", "amx") if has(name)
        )
        or "baseline",
        "mkldnn": torch.backends.mkldnn.is_available(),
        "cpu": processor(),
    }


def processor() -> str:
    """The model name, with the family and model that tell virtual CPUs apart; where there is no
    /proc, the architecture.
    """
    facts = cpuinfo()
    name = facts.get("model name", platform.processor() or platform.machine())
    numbers = [facts[k] for k in ("cpu family", "model", "stepping") if k in facts]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


@cache
def cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; {} elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].split("\n")
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
