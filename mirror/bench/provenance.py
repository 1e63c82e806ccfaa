"""Where a result comes from: the machine, the versions, the commit and the command that made it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mirror.version import __version__

_LIBRARIES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "transformers", "tokenizers")


def provenance(module: str) -> dict[str, Any]:
    """Return machine, versions, commit and command of this process as plain JSON values.

    Args:
        module: the module that was run, such as `mirror.bench.exactness`.
    """
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), "mirror": __version__, **_versions()},
    }


def gpu_name(index: int) -> str | None:
    """Return a GPU's name as its driver lists it; None without one."""
    from mirror.targets.cuda import driver_gpus

    gpus = driver_gpus()
    return gpus[index] if index < len(gpus) else None


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Return the commit of the checkout that this runs from, marked when it has changes; None outside of one."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=folder, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
