"""What OpenVINO is told to do, natively and through ONNX Runtime's plugin alike."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mirror.bundle import Form, Graph, Segment
from mirror.errors import DeviceError
from mirror.targets.names import Precision


def default_precision(unit: str, *, background: bool = False, has_bf16: bool = False) -> Precision:
    """Return what a device computes in unless told otherwise: exact on the CPU, its own arithmetic elsewhere.

    No text depends on a draft's arithmetic, so a draft takes bfloat16 on a CPU that has it: half the bytes of
    every pass, and the matrix units where there are any. Left alone, OpenVINO would do so for targets too.

    Args:
        background: whether it is for a draft.
        has_bf16: whether the CPU computes in bfloat16.
    """
    if unit != "CPU":
        return Precision.F16
    return Precision.BF16 if background and has_bf16 else Precision.F32


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
        threads: CPU threads; other devices don't take it.
        cache: where compiled programs are kept, None for nowhere.
    """
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision.value
    if unit != "NPU":
        settings["NUM_STREAMS"] = "1"
    if unit == "CPU":
        settings["INFERENCE_NUM_THREADS"] = threads
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
