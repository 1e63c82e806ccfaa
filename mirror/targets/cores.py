"""What the operating system says of this machine's CPU."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def allowed_cpus() -> int:
    """Return how many CPUs this process may run on, hyper-threads counted each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def may_have_amx(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether the CPU has Intel's matrix units, or nobody says that it hasn't: only Linux lists them."""
    return _may_have(r"amx_tile", cpuinfo)


@functools.cache
def may_have_vnni(cpuinfo: Path = _CPUINFO) -> bool:
    """Return whether an x86 CPU adds up products of 8 bits in 32, or nobody says that it doesn't."""
    return _may_have(r"avx_vnni|avx512_vnni", cpuinfo)


def _may_have(features: str, cpuinfo: Path) -> bool:
    try:
        return re.search(rf"\b({features})\b", cpuinfo.read_text(encoding="utf-8", errors="replace")) is not None
    except OSError:
        return True
