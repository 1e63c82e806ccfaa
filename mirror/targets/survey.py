"""What this machine offers, and what is missing for the rest.

Cheap: a library that isn't installed is never imported, and no model is loaded. Every reason that
something is missing ends in what to do about it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path

from mirror.errors import DeviceError

INSTALL_OPENVINO = 'pip install "mirror-sd[openvino]"'
INSTALL_QNN = 'pip install "mirror-sd[qnn]"'

_BOTH = "target, draft"
_DRIVERS = {
    "GPU": "install Intel's GPU driver (intel-opencl-icd on Linux) and let this user into the render group",
    "NPU": "it takes an Intel Core Ultra and Intel's NPU driver (intel-driver-compiler-npu on Linux)",
}


@dataclass(frozen=True)
class DeviceInfo:
    """One device, present or missing.

    Attributes:
        name: as `open_device` takes it.
        description: the hardware's own name, empty when missing.
        runtime, version: the library that serves it, empty when missing.
        segments: what it can run: `target, draft` or `draft`.
        reason: why it is missing and what to do, None when it is there.
    """

    name: str
    available: bool
    description: str = ""
    runtime: str = ""
    version: str = ""
    segments: str = ""
    reason: str | None = None


def list_devices() -> tuple[DeviceInfo, ...]:
    """Return every device that this machine offers, then the missing ones with the reason."""
    found = (_cpu(), *_cuda(), *_openvino(), _qnn())
    return tuple(sorted(found, key=lambda device: not device.available))


def _cpu() -> DeviceInfo:
    from mirror.targets.kernel_library import kernels_here, kernels_missing

    drafts = kernels_missing() or f"drafts by mirror's kernels ({kernels_here()})"
    return DeviceInfo("cpu", True, f"{_cpu_name()}; {drafts}", "onnxruntime", _onnxruntime_version(), _BOTH)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _cuda() -> tuple[DeviceInfo, ...]:
    import onnxruntime

    from mirror.targets.cuda import cuda_missing, driver_gpus
    from mirror.targets.kernel_library import operators_missing

    missing = cuda_missing()
    if missing is not None:
        return (DeviceInfo("cuda:0", False, reason=missing),)
    # The libraries that come as Python packages.
    onnxruntime.preload_dlls(cudnn=False)
    missing = operators_missing()
    kernels = f"; by ONNX Runtime's kernels alone: {missing}" if missing else "; with mirror's own kernels"
    version = _onnxruntime_version()
    return tuple(
        DeviceInfo(f"cuda:{index}", True, gpu + kernels, "onnxruntime", version, _BOTH)
        for index, gpu in enumerate(driver_gpus())
    )


def _openvino() -> tuple[DeviceInfo, ...]:
    missing = openvino_missing()
    plugin = plugin_units()
    if missing is not None and not plugin:
        return tuple(DeviceInfo(f"openvino:{unit}", False, reason=missing) for unit in ("CPU", "GPU", "NPU"))
    native = {} if missing is not None else _native_units()
    units = sorted({*native, *plugin})
    present = [_openvino_device(unit, native.get(unit, unit), plugin=unit not in native) for unit in units]
    absent = [kind for kind in ("CPU", "GPU", "NPU") if not any(unit.startswith(kind) for unit in units)]
    return (*present, *(_no_openvino_device(kind, units) for kind in absent))


def _openvino_device(unit: str, description: str, *, plugin: bool) -> DeviceInfo:
    package = "onnxruntime-ep-openvino" if plugin else "openvino"
    segments = "draft" if unit == "NPU" else _BOTH
    return DeviceInfo(f"openvino:{unit}", True, description, package, importlib.metadata.version(package), segments)


def _qnn() -> DeviceInfo:
    from mirror.targets.qnn import is_emulated, qnn_missing

    missing = qnn_missing()
    if missing is not None:
        return DeviceInfo("qnn:htp", False, reason=missing)
    version = importlib.metadata.version("onnxruntime-qnn")
    if is_emulated():
        what = "Hexagon NPU, emulated on the CPU: right tokens, no speed (also as qnn:htp)"
        return DeviceInfo("qnn:emulator", True, what, "onnxruntime-qnn", version, "draft")
    return DeviceInfo("qnn:htp", True, "Hexagon NPU", "onnxruntime-qnn", version, "draft")


def npu_name() -> str:
    """Return the name of whichever NPU this machine has; an emulator is none.

    Raises:
        DeviceError: it has none that a library here sees; the message says what each says.
    """
    found = {device.name: device for device in (*_openvino(), _qnn())}
    present = [name for name in ("qnn:htp", "openvino:NPU") if name in found and found[name].available]
    if present:
        return present[0]
    reasons = [f"{name}: {found[name].reason}" for name in ("openvino:NPU", "qnn:htp") if name in found]
    emulated = ["qnn:emulator can check an NPU's programs, slowly"] if "qnn:emulator" in found else []
    raise DeviceError(f"this machine has no NPU that a library here sees; {'; '.join(reasons + emulated)}")


def _no_openvino_device(kind: str, units: list[str]) -> DeviceInfo:
    return DeviceInfo(f"openvino:{kind}", False, reason=no_such_unit(kind, units))


def no_such_unit(unit: str, units: list[str]) -> str:
    """Return why OpenVINO doesn't offer a unit, and what to do."""
    seen = ", ".join(units) or "nothing"
    remedy = _DRIVERS.get(unit.partition(".")[0], "the package may be built for another processor; reinstall it")
    return f"OpenVINO sees {seen} here and no {unit}; {remedy}"


def openvino_missing() -> str | None:
    """Return why the openvino package can't be used and what to do, None if it can."""
    if importlib.util.find_spec("openvino") is None:
        return f"the openvino package is not installed; run: {INSTALL_OPENVINO}"
    return None


def plugin_units() -> tuple[str, ...]:
    """Return the OpenVINO units that ONNX Runtime's plugin offers; none where it isn't installed."""
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        return ()
    from mirror.targets.openvino_plugin import registered_devices

    return tuple(registered_devices())


def virtual_npus() -> tuple[str, ...]:
    """Return the Intel NPUs that ONNX Runtime's plugin can name without having one; none where it isn't installed."""
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        return ()
    from mirror.targets.openvino_plugin import virtual_platforms

    return virtual_platforms()


@functools.cache
def _native_units() -> dict[str, str]:
    from mirror.targets.openvino import available_units

    return available_units()
