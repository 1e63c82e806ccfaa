"""What the operating system says of this machine's CPU."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path


def allowed_cpus() -> int:
    """Return how many CPUs this process may run on, hyper-threads counted each."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def may_have_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the CPU has Intel's matrix units, or nobody says that it hasn't: only Linux lists them."""
    try:
        return re.search(r"\bamx_tile\b", cpuinfo.read_text(encoding="utf-8", errors="replace")) is not None
    except OSError:
        return True
