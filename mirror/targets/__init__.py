"""The devices of this machine, by name.

Importing this package loads no runtime library; opening or listing devices loads those that it
needs. ONNX Runtime and OpenVINO both report usage by default; here neither
does (`mirror` itself turns ONNX Runtime's off).
"""

from __future__ import annotations

from mirror.errors import DeviceError
from mirror.targets.base import AheadCompiler, Device, FreeMemory
from mirror.targets.kernel_library import row_chooser
from mirror.targets.memory import free_memory
from mirror.targets.names import DeviceFamily, DeviceName, parse_device_name
from mirror.targets.survey import DeviceInfo, list_devices, npu_name, openvino_missing

__all__ = [
    "DeviceFamily",
    "DeviceInfo",
    "DeviceName",
    "FreeMemory",
    "free_memory",
    "list_devices",
    "open_compiler",
    "open_device",
    "parse_device_name",
    "row_chooser",
]


def open_device(name: str, *, background: bool = False) -> Device:
    """Return a device by the name that a user writes: `cpu`, `cuda:0`, `openvino:CPU|GPU|NPU`, `qnn:htp`, `npu`.

    Args:
        background: whether it is for a draft, which may share a GPU with a target, and whose arithmetic
            changes no text.

    Raises:
        DeviceError: no such name, or the device or its library isn't there; the message says what
            to install.
    """
    parsed = parse_device_name(npu_name() if name.strip().lower() == "npu" else name)
    match parsed.family:
        case DeviceFamily.CPU:
            from mirror.targets.cpu import CpuDevice

            return CpuDevice()
        case DeviceFamily.CUDA:
            from mirror.targets.cuda import open_cuda

            return open_cuda(int(parsed.unit), background=background, share=parsed.share)
        case DeviceFamily.OPENVINO:
            return _open_openvino(parsed, background=background)
        case DeviceFamily.QNN:
            from mirror.targets.qnn import open_qnn

            return open_qnn(parsed.unit, parsed.chip)


def open_compiler(name: str) -> AheadCompiler:
    """Return what compiles ahead of time for a device: `qnn:v73` (any architecture), `openvino:CPU|GPU|NPU`.

    Raises:
        DeviceError: no such name, it takes nothing compiled ahead, or its compiler isn't here.
    """
    family, _, rest = name.strip().lower().partition(":")
    if family == "qnn" and rest.startswith("v"):
        from mirror.targets.qnn import open_qnn_compiler

        return open_qnn_compiler(parse_device_name(f"qnn:htp:{rest}").chip or rest)
    parsed = None if family == "npu" else parse_device_name(name)
    if parsed is None or parsed.family is not DeviceFamily.OPENVINO:
        raise DeviceError(
            f"nothing is compiled ahead of time for {name}; the choices are qnn:v73 (an architecture), openvino:CPU, "
            "openvino:GPU, openvino:NPU"
        )
    if (missing := openvino_missing()) is not None:
        raise DeviceError(f"{parsed} can't be compiled for: {missing}")
    from mirror.targets.openvino import open_native_compiler

    return open_native_compiler(parsed.unit, parsed.precision)


def _open_openvino(name: DeviceName, *, background: bool) -> Device:
    """Open OpenVINO itself where it is installed, ONNX Runtime's plugin for it where only that is."""
    from mirror.targets.survey import plugin_units

    if (missing := openvino_missing()) is not None:
        if name.unit not in plugin_units():
            raise DeviceError(f"{name} isn't there: {missing}")
        from mirror.targets.openvino_plugin import open_plugin_device

        return open_plugin_device(name.unit, name.precision, background=background)
    from mirror.targets.openvino import open_native_device

    return open_native_device(name.unit, name.precision, background=background)
