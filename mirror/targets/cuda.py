"""NVIDIA GPUs, by ONNX Runtime's CUDA execution provider.

Caches, outputs and staged inputs live in the GPU's memory; `OnnxRuntimeSegment` does the rest. That
a session really runs on the GPU is checked when it is made: ONNX Runtime would go on with the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import onnxruntime as ort

from mirror.bundle import Form
from mirror.errors import DeviceError
from mirror.targets.onnxruntime_session import Memory, OnnxRuntimeDevice, Provider

PROVIDER = "CUDAExecutionProvider"
# The plain wheel comes with mirror and shares its folder with the GPU one: the one installed last wins.
INSTALL_CUDA = 'pip install "mirror-sd[cuda]" && pip install --force-reinstall --no-deps "onnxruntime-gpu>=1.31,<1.33"'

_NAME_BYTES = 256


class CudaDevice(OnnxRuntimeDevice):
    """One NVIDIA GPU, by its index in the driver's list."""

    def __init__(self, index: int) -> None:
        super().__init__(f"cuda:{index}", cuda_provider(index), Form.INPLACE)


def cuda_provider(index: int) -> Provider:
    """Return the execution provider of one GPU, with options that keep float32 exact and memory tight."""
    options = {
        "device_id": str(index),
        # TF32 keeps 10 bits of a float32's mantissa: greedy tokens would differ from the checkpoint's.
        "use_tf32": "0",
        # The default doubles its arena at each growth; a large model would ask for twice its weights.
        "arena_extend_strategy": "kSameAsRequested",
    }
    # GroupQueryAttention reads this one on the host, to choose its kernel.
    return Provider(PROVIDER, Memory("cuda", index), options, frozenset({"total_sequence_length"}))


def open_cuda(index: int) -> CudaDevice:
    """Return a GPU by its index.

    Raises:
        DeviceError: the runtime has no CUDA provider, or there is no such GPU.
    """
    missing = cuda_missing()
    if missing is not None:
        raise DeviceError(f"cuda:{index} isn't there: {missing}")
    gpus = driver_gpus()
    if index >= len(gpus):
        listed = ", ".join(f"cuda:{number} ({name})" for number, name in enumerate(gpus))
        raise DeviceError(f"cuda:{index} isn't there: the driver lists {listed}; use one of these")
    # Finds the CUDA and cuDNN libraries that come as Python packages.
    ort.preload_dlls()
    return CudaDevice(index)


def cuda_missing() -> str | None:
    """Return why no GPU can be used and what to do, None if one can."""
    if PROVIDER not in ort.get_available_providers():
        return f"this onnxruntime ({ort.__version__}) has no {PROVIDER}; run: {INSTALL_CUDA}"
    if not driver_gpus():
        return "the NVIDIA driver lists no GPU; install the driver, or let this container see the GPU"
    return None


@functools.cache
def driver_gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that the NVIDIA driver lists, none without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu_name(driver, index) for index in range(count.value))


def _gpu_name(driver: ctypes.CDLL, index: int) -> str:
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    return name.value.decode("utf-8", errors="replace")
