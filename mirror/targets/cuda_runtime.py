"""The few calls of the CUDA runtime that ONNX Runtime leaves to its caller: a stream, and copies ordered on it.

A session that is told to compute on a stream of ours doesn't wait for it, so neither do we: inputs are copied,
passes are launched and outputs are copied in the stream's order, and only whoever reads an output waits.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from onnxruntime.capi import build_and_package_info

from mirror.errors import DeviceError
from mirror.targets.base import Array

_NON_BLOCKING = 1  # the stream doesn't wait for the default stream's work
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_NO_TIMING = 2  # an event that only orders

# While a pass is recorded, CUDA refuses other threads' calls, and they spoil the recording: unless a thread
# has said that it minds its own recordings only. A draft, which always has a recording target beside it,
# stays out of its way besides: whoever records holds the lock, and so does whoever calls for a draft.
_OWN_RECORDINGS_ONLY = 1
_recording = threading.RLock()
_thread = threading.local()


class CudaStream:
    """A stream of one GPU, and the copies that are ordered on it.

    Attributes:
        handle: the stream's address, as ONNX Runtime's `user_compute_stream` takes it.
    """

    def __init__(self, index: int, *, urgent: bool) -> None:
        """Make a stream; the kernels of an urgent one go first where they compete for the GPU.

        Raises:
            DeviceError: the CUDA runtime is missing or failed.
        """
        self._index = index
        self._beside: AbstractContextManager[object] = _recording if urgent else nullcontext()
        least, greatest, stream = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self._select()
        _call("cudaDeviceGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        priority = greatest.value if urgent else least.value
        _call("cudaStreamCreateWithPriority", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING), priority)
        assert stream.value is not None
        self.handle: int = stream.value

    def pinned(self, dtype: str, shape: Sequence[int]) -> Array:
        """Return a zeroed host array that the GPU copies to and from without a detour."""
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        address = ctypes.c_void_p()
        with self._beside:
            self._select()
            _call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_uint(0))
        assert address.value is not None
        block = (ctypes.c_byte * size).from_address(address.value)
        array: Array = np.ctypeslib.as_array(block).view(np.uint8)
        array[:] = 0
        # Views keep the block alive, so the memory lives as long as the last of them. Not at exit: the
        # runtime may be gone by then, and the memory with it.
        weakref.finalize(block, _free_host, address.value).atexit = False
        return array[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def clear(self, address: int, size: int) -> None:
        """Write zeros over device memory."""
        _call("cudaMemsetAsync", ctypes.c_void_p(address), 0, ctypes.c_size_t(size), self._stream)

    def upload(self, address: int, source: Array) -> None:
        """Copy a pinned array to device memory, in order; `source` must stay unchanged until then."""
        self._copy(address, source.ctypes.data, source.nbytes, _HOST_TO_DEVICE)

    def download(self, target: Array, address: int) -> None:
        """Copy device memory to a pinned array, after all that was launched before, and wait for it."""
        with self._beside:
            self._copy(target.ctypes.data, address, target.nbytes, _DEVICE_TO_HOST)
            self.wait()

    def wait(self) -> None:
        """Wait for all that was launched on this stream."""
        with self._beside:
            _call("cudaStreamSynchronize", self._stream)

    def guard(self, *, recording: bool) -> AbstractContextManager[object]:
        """Return what to hold during a pass: nothing, unless it is or may meet one that is recorded."""
        return _recording if recording else self._beside

    def mark(self) -> CudaMark:
        """Return a mark of what was launched so far."""
        return CudaMark(self._stream)

    @property
    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.handle)

    def _copy(self, target: int, source: int, size: int, kind: int) -> None:
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        _call("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), ctypes.c_int(kind), self._stream)

    def _select(self) -> None:
        """Make this stream's GPU the calling thread's: new memory and streams are made on that one."""
        _call("cudaSetDevice", ctypes.c_int(self._index))


class CudaMark:
    """A place in a stream that a host can wait for; renewed at will."""

    def __init__(self, stream: ctypes.c_void_p) -> None:
        self._stream = stream
        self._event = ctypes.c_void_p()
        _call("cudaEventCreateWithFlags", ctypes.byref(self._event), ctypes.c_uint(_NO_TIMING))

    def renew(self) -> None:
        """Move the mark behind all that was launched so far."""
        _call("cudaEventRecord", self._event, self._stream)

    def wait(self) -> None:
        """Wait until the stream has come to the mark; at once if it has."""
        _call("cudaEventSynchronize", self._event)


def _call(name: str, *arguments: Any) -> None:
    runtime = _prepared_runtime()
    code = getattr(runtime, name)(*arguments)
    if code != 0:
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        reason = runtime.cudaGetErrorString(code).decode()
        raise DeviceError(f"the GPU failed in {name}: {reason} (CUDA error {code}); load the bundle again")


def _free_host(address: int) -> None:
    _prepared_runtime().cudaFreeHost(ctypes.c_void_p(address))


def _prepared_runtime() -> ctypes.CDLL:
    """Return the CUDA runtime, this thread made ready to call it while another one records."""
    runtime = _runtime()
    if not getattr(_thread, "prepared", False):
        runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_OWN_RECORDINGS_ONLY)))
        _thread.prepared = True
    return runtime


@functools.cache
def _runtime() -> ctypes.CDLL:
    """Return the CUDA runtime that ONNX Runtime has loaded."""
    major = str(getattr(build_and_package_info, "cuda_version", "")).partition(".")[0] or "13"
    name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DeviceError(
            f"{name}, the CUDA runtime of this onnxruntime, can't be loaded: {error}; "
            'run: pip install "onnxruntime-gpu[cuda,cudnn]"'
        ) from error
