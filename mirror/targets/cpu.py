"""The CPU, by ONNX Runtime's own CPU execution provider."""

from __future__ import annotations

from mirror.bundle import Form
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, Provider


class CpuDevice(OnnxRuntimeDevice):
    """This machine's CPU. Takes either cache form; `inplace` writes no row twice."""

    def __init__(self, form: Form = Form.INPLACE) -> None:
        super().__init__("cpu", Provider("CPUExecutionProvider"), form)
