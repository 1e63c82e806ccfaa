"""What OpenVINO is told to do, natively and through ONNX Runtime's plugin alike."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mirror.bundle import Form, Graph, Segment
from mirror.errors import DeviceError
from mirror.targets.base import StoredWeights
from mirror.targets.cores import allowed_cpus, may_have_amx
from mirror.targets.names import Precision
from mirror.targets.static_shapes import BRANCH_MAP, NPU_ROWS

# Each number of slots is planned anew at its first pass (2 to 10 ms of the default draft), and every slot costs.
_SLOT_STEP = 256

_CPU_ROWS = 8


def default_precision(unit: str, *, background: bool = False, has_bf16: bool = False) -> Precision:
    """Return what a device computes in unless told otherwise: exact on the CPU, its own arithmetic elsewhere.

    No text depends on a draft's arithmetic, so a draft takes bfloat16 on a CPU that has it: half the bytes of
    every pass, and the matrix units where there are any. Left alone, OpenVINO would do so for targets too.
    Where the process has one CPU, `settle_precision` may make that f32.

    Args:
        background: whether it is for a draft.
        has_bf16: whether the CPU computes in bfloat16.
    """
    if unit != "CPU":
        return Precision.F16
    return Precision.BF16 if background and has_bf16 else Precision.F32


def least_threads(unit: str, precision: Precision | None) -> int:
    """Return the fewest threads that OpenVINO may compile for, in a precision or, for None, in one of its choice.

    On matrix units it gives each part of a gated MLP in 16 bits half the threads: compiled for one thread, it
    divides by zero, which ends the process (openvinotoolkit/openvino issue 33300).
    """
    return 2 if unit == "CPU" and precision is not Precision.F32 and may_have_amx() else 1


def settle_precision(unit: str, asked: Precision | None, default: Precision | None, threads: int) -> Precision | None:
    """Return what a device computes in: what was asked for, or its default unless that needs more threads.

    None stands for OpenVINO's own choice.

    Args:
        threads: the most that a CPU may use.

    Raises:
        DeviceError: what was asked for needs more threads.
    """
    needed = least_threads(unit, asked or default)
    if threads >= needed:
        return asked or default
    if asked is None:
        return Precision.F32
    raise DeviceError(
        f"openvino:CPU:{asked.value} needs {needed} threads on this CPU, which has matrix units, and OpenVINO may use "
        f"{threads}; allow this process {needed} CPUs, or ask for openvino:CPU:f32"
    )


def check_precision(unit: str, precision: Precision | None) -> None:
    """Check that a device can compute in a precision.

    Raises:
        DeviceError: an NPU is asked for something else than float16.
    """
    if unit == "NPU" and precision not in (None, Precision.F16):
        raise DeviceError(f"openvino:NPU computes in f16 only, asked for {precision.value}; leave the precision out")


def compile_settings(unit: str, precision: Precision | None, threads: int, cache: Path | None) -> dict[str, Any]:
    """Return OpenVINO's properties for one segment.

    Args:
        precision: the arithmetic, None for OpenVINO's own choice.
        threads: CPU threads, or more where OpenVINO can't do with so few; other devices don't take it.
        cache: where compiled programs are kept, None for nowhere.
    """
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision.value
    if unit != "NPU":
        settings["NUM_STREAMS"] = "1"
    if unit == "CPU":
        least = least_threads(unit, precision)
        settings["INFERENCE_NUM_THREADS"] = max(threads, least)
        if 1 < least == allowed_cpus():
            # They may be one core's; for low latency OpenVINO would then take but one of them.
            settings["ENABLE_HYPER_THREADING"] = True
        # Pinned threads would stay on cores that the target's threads are using.
        settings["ENABLE_CPU_PINNING"] = False
    if cache is not None:
        settings["CACHE_DIR"] = str(cache)
    return settings


def kernel_cache(unit: str) -> Path | None:
    """Return where a device keeps compiled programs for the next start, None for nowhere.

    GPUs and NPUs take seconds to minutes to compile. A CPU compiles in about the time of reading
    the program back, and its stored program holds another copy of the weights.
    """
    return None if unit == "CPU" else kernel_cache_folder()


def kernel_cache_folder() -> Path:
    """Return the folder of compiled programs: under `MIRROR_CACHE`, or the user's cache folder."""
    if chosen := os.environ.get("MIRROR_CACHE"):
        return Path(chosen) / "openvino"
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "mirror" / "openvino"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "mirror" / "cache" / "openvino"
    return Path.home() / ".cache" / "mirror" / "openvino"


def takes_any_slots(unit: str, graph: Graph) -> bool:
    """Return whether a graph's passes are given the cache's filled slots alone, not all: a draft's on a CPU.

    A target's take all: with another number of slots a position might be rounded otherwise, and `pinned` not hold.
    GPUs and NPUs want fixed shapes.
    """
    return unit == "CPU" and any(spec.name == BRANCH_MAP for spec in graph.inputs)


def padded_width(unit: str) -> int:
    """Return the rows up to which a draft's passes are padded to share a program.

    Each program has its own copy of the weights. On a CPU a proposal of passes of 1, 2 and 5 rows in a program each
    takes 1.4 times as long as three of 5 rows in one, perhaps because each finds the caches full of another's weights.
    """
    return NPU_ROWS if unit == "NPU" else _CPU_ROWS


def held_bytes(unit: str, stored: StoredWeights, programs: int, precision: Precision | None) -> int:
    """Return the memory that weights take at least where every program packs its own copy of what products read.

    Quantized ones stay so. What no product reads, the embedding, a CPU looks up in the file's own pages.

    Args:
        precision: the arithmetic, None for OpenVINO's own choice: two bytes or more.
    """
    size = 4 if precision is Precision.F32 else 2
    others = 0 if unit == "CPU" else stored.bytes - stored.matrix_bytes - stored.quantized_bytes
    return others + programs * (size * stored.matrix_numbers + stored.quantized_bytes)


def slots_for(filled: int, capacity: int) -> int:
    """Return how many slots to give to a pass that ends with so many filled: whole steps, the capacity at most."""
    return min(-(-filled // _SLOT_STEP) * _SLOT_STEP, capacity)


def rows_graph(segment: Segment, device: str) -> Graph:
    """Return a segment's graph in rows form.

    Raises:
        DeviceError: it has none.
    """
    graph = segment.graphs.get(Form.ROWS)
    if graph is None:
        forms = ", ".join(sorted(form.value for form in segment.graphs))
        raise DeviceError(
            f"{device} needs {segment.name} in rows form and the bundle has {forms}; export the bundle again"
        )
    return graph
