"""NVIDIA GPUs, by ONNX Runtime's CUDA execution provider.

Caches, outputs and staged inputs live in the GPU's memory; `OnnxRuntimeSegment` does the rest. That
a session really runs on the GPU is checked when it is made: ONNX Runtime would go on with the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import replace
from pathlib import Path

import onnxruntime as ort

from mirror.bundle import Form
from mirror.errors import DeviceError
from mirror.targets.base import LoadRequest
from mirror.targets.cuda_driver import load_driver
from mirror.targets.cuda_runtime import CudaStream
from mirror.targets.kernel_library import LIBRARY, chosen_operators, unwanted_lack
from mirror.targets.onnxruntime_session import DeviceStream, Memory, OnnxRuntimeDevice, Provider

PROVIDER = "CUDAExecutionProvider"
# The plain wheel comes with mirror and shares its folder with the GPU one: the one installed last wins.
INSTALL_CUDA = 'pip install "mirror-sd[cuda]" && pip install --force-reinstall --no-deps "onnxruntime-gpu>=1.31,<1.33"'

_NAME_BYTES = 256
# What a GPU must compute itself: on the CPU it would copy the whole cache there and back in every layer.
_LOG = logging.getLogger("mirror")
_ATTENTION = "GroupQueryAttention"
# On Hopper ONNX Runtime takes cuDNN's attention, whose time grows the faster with the context; of these two it takes
# flash attention (1), or memory-efficient (2) where that can't be. One kernel for all passes of an engine: two would
# round differently.
_WITHOUT_CUDNN = str(1 | 2)
_LONG_CAPACITY = 4096
_HALF = "float16"


class CudaDevice(OnnxRuntimeDevice):
    """One NVIDIA GPU, by its index in the driver's list. Its passes are recorded as CUDA graphs, one per width.

    A draft's computes on an urgent stream, so that its small kernels find their way between those of a target that
    fills the GPU. On a part of the multiprocessors they hold up only a part of each of those, and take longer.

    Attributes:
        stream: what its passes are launched on.
    """

    def __init__(self, index: int, stream: DeviceStream) -> None:
        super().__init__(f"cuda:{index}", cuda_provider(index, stream), Form.INPLACE)
        self.stream = stream
        self._told = False

    def session_options(self, segment_name: str, threads: int) -> ort.SessionOptions:
        """Return the options of one segment's session, which tell afterwards what runs where."""
        options = super().session_options(segment_name, threads)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def _open_session(self, path: Path, request: LoadRequest) -> tuple[ort.InferenceSession, Provider]:
        provider = self._provider
        if request.capacity >= _LONG_CAPACITY:
            provider = replace(provider, options={**provider.options, "sdpa_kernel": _WITHOUT_CUDNN})
        options = self.session_options(request.segment.name, request.threads)
        # Half precision is what the kernels compute in; others are refused below.
        halves = all(layer.dtype == _HALF for layer in request.segment.kv)
        if halves and chosen_operators():
            options.register_custom_ops_library(str(LIBRARY))
        elif halves and request.segment.kv and not self._told and (why := unwanted_lack()) is not None:
            self._told = True
            _LOG.warning("%s computes by ONNX Runtime's kernels alone, which take longer: %s", self.name, why)
        session = self._session_on(provider, path, options)
        if _ATTENTION in _operators_elsewhere(session):
            raise DeviceError(
                f"{self.name} computes attention in fp16 and bf16, and {path.name} needs it in float32; export the "
                "bundle with --precision fp16, bf16, int8-fp16 or int4-fp16"
            )
        return session, provider


def _operators_elsewhere(session: ort.InferenceSession) -> set[str]:
    """Return the operators of a session that don't run on the GPU."""
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != PROVIDER]
    return {node.op_type for part in parts for node in part.get_nodes()}


def cuda_provider(index: int, stream: DeviceStream) -> Provider:
    """Return the provider of one GPU, computing on a stream, with options that keep float32 exact and memory tight."""
    options = {
        "device_id": str(index),
        # TF32 keeps 10 bits of a float32's mantissa: greedy tokens would differ from the checkpoint's.
        "use_tf32": "0",
        # The default doubles its arena at each growth; a large model would ask for twice its weights.
        "arena_extend_strategy": "kSameAsRequested",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(stream.handle),
    }
    return Provider(
        PROVIDER,
        Memory("cuda", index),
        options,
        # GroupQueryAttention chooses its kernel by it, and builds a new plan for every new number.
        sized_inputs=frozenset({"total_sequence_length"}),
        stream=stream,
        replays=True,
        # A width met for the first time costs plans and a recording: prompts take the widest, padded.
        fixed_widths=True,
    )


def open_cuda(index: int, *, background: bool = False, share: float = 1.0) -> CudaDevice:
    """Return a GPU by its index.

    Args:
        background: whether it is for a draft, which shares the GPU with a target.
        share: the part of its multiprocessors to compute on.

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
    return CudaDevice(index, CudaStream(index, urgent=background, share=share))


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
    driver, count = load_driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu_name(driver, index) for index in range(count.value))


def _gpu_name(driver: ctypes.CDLL, index: int) -> str:
    device = ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    return name.value.decode("utf-8", errors="replace")
