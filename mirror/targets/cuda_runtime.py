"""The few calls of the CUDA runtime that ONNX Runtime leaves to its caller: a stream, and copies ordered on it.

A session that is told to compute on a stream of ours doesn't wait for it, so neither do we: inputs are copied,
passes are launched and outputs are copied in the stream's order, and only whoever reads an output waits.

Passes are recorded here too, rather than by ONNX Runtime. Its recordings run at one priority whatever the
stream's, and while it records, any other thread's call may spoil the recording.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnxruntime.capi import build_and_package_info

from mirror.errors import DeviceError
from mirror.targets.base import Array, Copier, Mark
from mirror.targets.cuda_driver import PartStream, multiprocessors, part_stream

_LOG = logging.getLogger("mirror")

_NON_BLOCKING = 1  # the stream doesn't wait for the default stream's work
_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_NO_TIMING = 2  # an event that only orders

# A recording of this kind leaves other threads alone, and lets its own allocate.
_RELAXED = 2
# A recording then runs at the priorities of the stream that it was made on.
_OWN_PRIORITIES = 8

_KERNEL, _MEMCPY, _MEMSET, _HOST_CALL, _EMPTY, _ALLOCATE, _FREE = 0, 1, 2, 3, 5, 10, 11
_REPLAYABLE = (_KERNEL, _MEMCPY, _MEMSET, _EMPTY, _ALLOCATE, _FREE)
# Words of `cudaMemcpy3DParms`, and which of them are the pointers.
_COPY_WORDS, _COPY_SOURCE, _COPY_TARGET = 20, 4, 12
_POINTER_FACTS_BYTES = 256  # more than `cudaPointerAttributes` has in any version
_UNREGISTERED, _PINNED = 0, 1  # kinds of memory; the others are a device's


class CudaStream:
    """A stream of one GPU, and the copies that are ordered on it.

    Attributes:
        handle: the stream's address, as ONNX Runtime's `user_compute_stream` takes it.
        multiprocessors: how many of the GPU's its kernels run on; None for all.
    """

    def __init__(self, index: int, *, urgent: bool, share: float = 1.0) -> None:
        """Make a stream; the kernels of an urgent one go first where they compete for the GPU.

        Args:
            share: the part of the GPU's multiprocessors that its kernels may run on. It is all of them where the
                driver is too old for parts (before 550), which the log says.

        Raises:
            DeviceError: the CUDA runtime is missing or failed.
        """
        self._index = index
        least, greatest, stream = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self._select()
        _call("cudaDeviceGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        priority = greatest.value if urgent else least.value
        part = None if share == 1.0 else self._part(share, priority)
        if part is None:
            _call("cudaStreamCreateWithPriority", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING), priority)
            assert stream.value is not None
            part = PartStream(stream.value, None)
        self.handle = part.handle
        self._stream = ctypes.c_void_p(self.handle)
        self.multiprocessors = part.multiprocessors

    def pinned(self, dtype: str, shape: Sequence[int]) -> Array:
        """Return a zeroed host array that the GPU copies to and from without a detour."""
        size = max(int(np.prod(shape)) * np.dtype(dtype).itemsize, 1)
        address = ctypes.c_void_p()
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

    def uploader(self, address: int, source: Array) -> Copier:
        """Return what copies a pinned array to device memory, in order; it must stay unchanged until then."""
        return self._copier(address, source.ctypes.data, source.nbytes, _HOST_TO_DEVICE)

    def downloader(self, target: Array, address: int) -> Copier:
        """Return what copies device memory to a pinned array, in order; nothing waits for it."""
        return self._copier(target.ctypes.data, address, target.nbytes, _DEVICE_TO_HOST)

    def download(self, target: Array, address: int) -> None:
        """Copy device memory to a pinned array, after all that was launched before, and wait for it."""
        self.downloader(target, address)()
        self.wait()

    def spreader(self, target: int, pitch: int, source: int, size: int, count: int) -> Copier:
        """Return what copies pieces within device memory, in order: each of `size` bytes, to every `pitch` bytes."""
        return functools.partial(
            _call,
            "cudaMemcpy2DAsync",
            *(ctypes.c_void_p(target), ctypes.c_size_t(pitch), ctypes.c_void_p(source), ctypes.c_size_t(size)),
            *(ctypes.c_size_t(size), ctypes.c_size_t(count), ctypes.c_int(_DEVICE_TO_DEVICE), self._stream),
        )

    def wait(self) -> None:
        """Wait for all that was launched on this stream."""
        _call("cudaStreamSynchronize", self._stream)

    def after(self, mark: Mark) -> None:
        """Let all that is launched from now on wait for a mark, which may be another stream's; nobody waits here."""
        assert isinstance(mark, CudaMark), "streams of one runtime alone know each other's marks"
        _call("cudaStreamWaitEvent", self._stream, mark.event, ctypes.c_uint(0))

    def record(self, launch: Callable[[], None]) -> CudaRecording | None:
        """Record what a call launches on this stream, without running it.

        Returns:
            The recording, None where what was launched can't be replayed; the stream is as before then.
        """
        self._select()
        _call("cudaStreamBeginCapture", self._stream, ctypes.c_int(_RELAXED))
        graph, failed = ctypes.c_void_p(), False
        try:
            launch()
        except DeviceError:
            failed = True  # run as usual, it will say why if that wasn't the recording's fault
        finally:
            failed |= _runtime().cudaStreamEndCapture(self._stream, ctypes.byref(graph)) != 0
            _runtime().cudaGetLastError()  # or the next call would be told of it
        if failed or not graph.value:
            return None
        try:
            return CudaRecording(graph, self._stream) if _made_replayable(graph) else None
        finally:
            _call("cudaGraphDestroy", graph)

    def mark(self) -> CudaMark:
        """Return a mark of what was launched so far."""
        self._select()
        return CudaMark(self._stream)

    def _copier(self, target: int, source: int, size: int, kind: int) -> Copier:
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        return functools.partial(
            _call, "cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), ctypes.c_int(kind), self._stream
        )

    def _part(self, share: float, priority: int) -> PartStream | None:
        _call("cudaFree", None)  # makes the context that the part belongs to
        whole = multiprocessors(self._index)
        part = None if whole is None else part_stream(self._index, max(1, round(share * whole)), priority)
        if part is None:
            _LOG.warning("cuda:%d: this driver gives no part of a GPU; draft and target share it whole", self._index)
        return part

    def _select(self) -> None:
        """Make this stream's GPU the calling thread's: new memory and streams are made on that one."""
        _call("cudaSetDevice", ctypes.c_int(self._index))


class CudaMark:
    """A place in a stream that a host can wait for, and other streams; renewed at will.

    Attributes:
        event: the runtime's own.
    """

    def __init__(self, stream: ctypes.c_void_p) -> None:
        self._stream = stream
        self.event = ctypes.c_void_p()
        _call("cudaEventCreateWithFlags", ctypes.byref(self.event), ctypes.c_uint(_NO_TIMING))

    def renew(self) -> None:
        """Move the mark behind all that was launched so far."""
        _call("cudaEventRecord", self.event, self._stream)

    def wait(self) -> None:
        """Wait until the stream has come to the mark; at once if it has."""
        _call("cudaEventSynchronize", self.event)


class CudaRecording:
    """A recorded pass: the same kernels on the same memory, launched at once."""

    def __init__(self, graph: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self._stream = stream
        self._pass = ctypes.c_void_p()
        _call("cudaGraphInstantiate", ctypes.byref(self._pass), graph, ctypes.c_ulonglong(_OWN_PRIORITIES))
        weakref.finalize(self, _free_recording, self._pass.value).atexit = False

    def replay(self) -> None:
        """Launch it on the stream that it was recorded on."""
        _call("cudaGraphLaunch", self._pass, self._stream)


def _made_replayable(graph: ctypes.c_void_p) -> bool:
    """Return whether a graph can be replayed, having taken out what must happen but once.

    ONNX Runtime ends a pass with a call on the host that frees the pinned memory of the pass's copies. A
    replay would free it again; without the call the memory stays as long as the process, and so do the copies' sources.
    """
    for node in _nodes(graph):
        kind = ctypes.c_int()
        _call("cudaGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value == _HOST_CALL:
            _call("cudaGraphDestroyNode", node)
        elif kind.value not in _REPLAYABLE or (kind.value == _MEMCPY and not _copies_what_stays(node)):
            return False
    return True


def _nodes(graph: ctypes.c_void_p) -> list[ctypes.c_void_p]:
    count = ctypes.c_size_t()
    _call("cudaGraphGetNodes", graph, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    _call("cudaGraphGetNodes", graph, nodes, ctypes.byref(count))
    return [ctypes.c_void_p(node) for node in nodes]


def _copies_what_stays(node: ctypes.c_void_p) -> bool:
    """Return whether a copy's source will hold the same at every replay, and nobody on the host waits for it."""
    words = (ctypes.c_size_t * _COPY_WORDS)()
    _call("cudaGraphMemcpyNodeGetParams", node, words)
    source, target = (_memory_kind(words[place]) for place in (_COPY_SOURCE, _COPY_TARGET))
    return source != _UNREGISTERED and target not in (_UNREGISTERED, _PINNED)


def _memory_kind(address: int) -> int:
    facts = (ctypes.c_int * (_POINTER_FACTS_BYTES // 4))()
    _call("cudaPointerGetAttributes", facts, ctypes.c_void_p(address))
    return facts[0]


def _call(name: str, *arguments: Any) -> None:
    runtime = _runtime()
    code = getattr(runtime, name)(*arguments)
    if code != 0:
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        reason = runtime.cudaGetErrorString(code).decode()
        raise DeviceError(f"the GPU failed in {name}: {reason} (CUDA error {code}); load the bundle again")


def _free_host(address: int) -> None:
    _runtime().cudaFreeHost(ctypes.c_void_p(address))


def _free_recording(address: int | None) -> None:
    _runtime().cudaGraphExecDestroy(ctypes.c_void_p(address))


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
