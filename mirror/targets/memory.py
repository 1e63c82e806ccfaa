"""How much memory a device has left, asked of the driver or the system; loads no runtime library but OpenVINO's.

Not knowing is an answer too: nothing is refused on a guess.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from mirror.targets.base import FreeMemory
from mirror.targets.cuda_driver import load_driver
from mirror.targets.names import DeviceFamily, parse_device_name

HOST = "host memory"


def free_memory(device_name: str) -> FreeMemory:
    """Return the memory that a device, by its name, allocates from, and what is left of it.

    A CPU and an NPU share the host's.
    """
    name = parse_device_name(device_name)
    if name.family is DeviceFamily.CUDA:
        return FreeMemory(str(name), cuda_free_bytes(int(name.unit)))
    if name.family is DeviceFamily.OPENVINO and name.unit.startswith("GPU"):
        return FreeMemory(f"openvino:{name.unit}", _openvino_gpu_bytes(name.unit))
    return FreeMemory(HOST, host_free_bytes())


def host_free_bytes() -> int | None:
    """Return what this process may still allocate, a container's limit included; None where nobody says."""
    if sys.platform == "win32":
        return _windows_free_bytes()
    known = [count for count in (_meminfo_bytes(), _cgroup_bytes()) if count is not None]
    return min(known, default=None)


def cuda_free_bytes(index: int) -> int | None:
    """Return a GPU's free memory as its driver says; None without a driver or such a GPU."""
    driver = load_driver()
    free, total, context, previous = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p(), ctypes.c_void_p()
    # The device's own context, which ONNX Runtime uses too. It is kept: letting it go would tear down
    # what the session is about to make again.
    if driver is None or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index) != 0:
        return None
    if driver.cuCtxPushCurrent_v2(context) != 0:
        return None
    found = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuCtxPopCurrent_v2(ctypes.byref(previous))
    return free.value if found == 0 else None


def _meminfo_bytes(path: Path = Path("/proc/meminfo")) -> int | None:
    """Return what Linux counts as available, in bytes: free, and caches that it can drop."""
    if not path.is_file():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what this container's limit leaves, in bytes; None without a limit."""
    limit, current, statistics = folder / "memory.max", folder / "memory.current", folder / "memory.stat"
    if not (limit.is_file() and current.is_file() and statistics.is_file()):
        return None
    most = limit.read_text(encoding="ascii").strip()
    if most == "max":
        return None
    facts = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines())
    used = int(current.read_text(encoding="ascii")) - int(facts.get("inactive_file", 0))  # files can be dropped
    return max(int(most) - used, 0)


class _WindowsMemory(ctypes.Structure):
    _fields_ = (
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        *(
            (name, ctypes.c_ulonglong)
            for name in ("total", "available", "page", "page_free", "virtual", "free", "more")
        ),
    )


def _windows_free_bytes() -> int | None:
    status = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
    kernel = ctypes.CDLL("kernel32.dll")
    return int(status.available) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def _openvino_gpu_bytes(unit: str) -> int | None:
    """Return a GPU's whole memory, which is what OpenVINO tells; None without the package or the device."""
    from mirror.targets.survey import openvino_missing

    if openvino_missing() is not None:
        return None
    from mirror.targets.openvino import device_memory_bytes

    return device_memory_bytes(unit)
