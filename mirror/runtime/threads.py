"""How many CPU threads a target and a draft on the same CPU get."""

from __future__ import annotations

import os
from pathlib import Path

from mirror.runtime.records import Mode


def physical_cores() -> int:
    """Return the physical cores that this process may use; hyper-threads share one."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    return len({_siblings(cpu) for cpu in allowed})


def _siblings(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return str(cpu)


# A draft's operators are so small that more threads lose more by meeting than they gain: 15 threads of a Xeon with
# matrix units took a rollout of 64 branches from 47 ms (6 threads) to 30, 31 threads took each pass to five times that.
_MOST_DRAFT_THREADS = 16


def split_threads(total: int, mode: Mode, *, shared: bool) -> tuple[int, int]:
    """Return the threads of the target and of the draft.

    In plain and serial mode one waits for the other, so each gets all. In mirror mode on a shared
    CPU they run at the same time, and a thread too many makes both wait at every layer: the draft
    gets a quarter, at least one, and the target the rest. Beside another device a CPU draft leaves
    one core to the thread that feeds that device, and takes no more than help it.

    Args:
        shared: whether both run on this machine's CPU.
    """
    if mode is not Mode.MIRROR or total < 2:
        return total, total
    if not shared:
        return total, min(total - 1, _MOST_DRAFT_THREADS)
    draft = max(1, total // 4)
    return total - draft, draft
