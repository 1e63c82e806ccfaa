"""The CPU, by ONNX Runtime's own CPU execution provider."""

from __future__ import annotations

import onnxruntime as ort

from mirror.bundle import Form
from mirror.targets.cores import may_have_vnni
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, Provider


class CpuDevice(OnnxRuntimeDevice):
    """This machine's CPU. Takes either cache form; `inplace` writes no row twice."""

    def __init__(self, form: Form = Form.INPLACE) -> None:
        super().__init__("cpu", Provider("CPUExecutionProvider"), form)

    @property
    def int8_drafts(self) -> bool:
        """Half the time of a draft's passes, and no text depends on how a draft rounds."""
        return self.form is Form.INPLACE

    def session_options(self, segment_name: str, threads: int) -> ort.SessionOptions:
        """Return the options of one segment's session."""
        options = super().session_options(segment_name, threads)
        if not may_have_vnni():
            # Sums of two 8-bit products would overflow 16 bits. The way around takes 1.6 times as long.
            options.add_session_config_entry("session.x64quantprecision", "1")
        return options
