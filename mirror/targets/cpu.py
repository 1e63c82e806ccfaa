"""The CPU: ONNX Runtime's own execution provider, and this package's kernels for the drafts that they know."""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime as ort

from mirror.bundle import Form, Segment
from mirror.targets.base import LoadedSegment, LoadRequest, PassShape, StoredWeights
from mirror.targets.cores import may_have_vnni
from mirror.targets.kernel_library import chosen_kernels
from mirror.targets.kernel_segment import load_kernel_segment
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, Provider


class CpuDevice(OnnxRuntimeDevice):
    """This machine's CPU. Takes either cache form; `inplace` writes no row twice."""

    def __init__(self, form: Form = Form.INPLACE) -> None:
        super().__init__("cpu", Provider("CPUExecutionProvider"), form)

    @property
    def int8_drafts(self) -> bool:
        """Half the time of a draft's passes, and no text depends on how a draft rounds."""
        return self.form is Form.INPLACE

    def weight_bytes(self, segment: Segment, stored: StoredWeights, shapes: Sequence[PassShape]) -> int:
        """A session holds them once; the kernels hold a draft's once for its two segments."""
        return 0 if segment.name == "draft_trunk" and self._has_kernels(segment) else stored.bytes

    def load_segment(self, request: LoadRequest) -> LoadedSegment:
        """Load a segment; see `base.Device.load_segment`.

        Raises:
            DeviceError: the bundle lacks this cache form, or nothing here can take the graph.
            BundleError: a draft's program can't be read.
        """
        by_kernels = load_kernel_segment(request) if self._has_kernels(request.segment) else None
        return by_kernels or super().load_segment(request)

    def _has_kernels(self, segment: Segment) -> bool:
        return segment.program is not None and self.form is Form.INPLACE and chosen_kernels() is not None

    def session_options(self, segment_name: str, threads: int) -> ort.SessionOptions:
        """Return the options of one segment's session."""
        options = super().session_options(segment_name, threads)
        if not may_have_vnni():
            # Sums of two 8-bit products would overflow 16 bits. The way around takes 1.6 times as long.
            options.add_session_config_entry("session.x64quantprecision", "1")
        return options
