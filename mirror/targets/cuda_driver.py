"""The NVIDIA driver, for what the CUDA runtime does not offer: streams whose kernels keep to a part of a GPU.

The parts are the driver's green contexts (CUDA 12.4 and later). A kernel on such a stream runs on its own
multiprocessors alone; the GPU's memory, and whatever else the process does with it, stay as they are.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass

_SUCCESS = 0
_MULTIPROCESSORS = 1  # a kind of resource
_WITH_DEFAULT_STREAM = 1  # of a green context: the driver makes no others
_NON_BLOCKING = 1  # the stream doesn't wait for the default stream's work


class _Resource(ctypes.Structure):
    """`CUdevResource`: its kind, then, past the driver's own bytes, how many multiprocessors."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("_own", ctypes.c_ubyte * 92),
        ("multiprocessors", ctypes.c_uint),
        ("_more", ctypes.c_ubyte * 108),  # more than any version has
    )


@dataclass(frozen=True)
class PartStream:
    """A stream on a part of a GPU.

    Attributes:
        handle: its address.
        multiprocessors: how many its kernels have; None for all.
    """

    handle: int
    multiprocessors: int | None


def load_driver() -> ctypes.CDLL | None:
    """Return the NVIDIA driver's library, started; None where it isn't there or doesn't start."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == _SUCCESS else None


def part_stream(index: int, multiprocessors: int, priority: int) -> PartStream | None:
    """Return a stream of one GPU whose kernels run on about so many multiprocessors; None where the driver has none.

    The calling thread's context must be the GPU's own already. The part lasts as long as the process.

    Args:
        multiprocessors: the driver rounds up to what it can give.
        priority: as of any stream.
    """
    driver = load_driver()
    if driver is None or not hasattr(driver, "cuGreenCtxStreamCreate"):
        return None
    device, whole, part, rest = ctypes.c_int(), _Resource(), _Resource(), _Resource()
    groups, description = ctypes.c_uint(1), ctypes.c_void_p()
    context, stream = ctypes.c_void_p(), ctypes.c_void_p()
    calls: tuple[Callable[[], int], ...] = (
        lambda: driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)),
        lambda: driver.cuDeviceGetDevResource(device, ctypes.byref(whole), _MULTIPROCESSORS),
        lambda: driver.cuDevSmResourceSplitByCount(
            *(ctypes.byref(part), ctypes.byref(groups), ctypes.byref(whole), ctypes.byref(rest)),
            *(ctypes.c_uint(0), ctypes.c_uint(multiprocessors)),
        ),
        lambda: driver.cuDevResourceGenerateDesc(ctypes.byref(description), ctypes.byref(part), ctypes.c_uint(1)),
        lambda: driver.cuGreenCtxCreate(ctypes.byref(context), description, device, _WITH_DEFAULT_STREAM),
        lambda: driver.cuGreenCtxStreamCreate(ctypes.byref(stream), context, _NON_BLOCKING, ctypes.c_int(priority)),
    )
    if any(call() != _SUCCESS for call in calls) or stream.value is None:
        return None
    return PartStream(stream.value, part.multiprocessors)


def multiprocessors(index: int) -> int | None:
    """Return how many multiprocessors a GPU has; None where the driver doesn't say."""
    driver, device, whole = load_driver(), ctypes.c_int(), _Resource()
    if driver is None or not hasattr(driver, "cuDeviceGetDevResource"):
        return None
    if driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)) != _SUCCESS:
        return None
    if driver.cuDeviceGetDevResource(device, ctypes.byref(whole), _MULTIPROCESSORS) != _SUCCESS:
        return None
    return int(whole.multiprocessors)
