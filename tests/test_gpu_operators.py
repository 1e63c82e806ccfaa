"""Whether GPUs get mirror's own kernels, and what is said where they don't."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnxruntime as ort
import pytest

from mirror.bundle import LayerKV, Segment
from mirror.targets import cuda, kernel_library
from mirror.targets.base import LoadRequest


def test_without_a_driver_the_library_says_what_is_missing() -> None:
    if cuda.driver_gpus():
        pytest.skip("this machine has a driver")
    assert "no NVIDIA driver (libcuda.so.1); install it" in str(kernel_library.operators_missing())
    assert not kernel_library.chosen_operators()
    with pytest.raises(Exception, match=r"no NVIDIA driver"):
        ort.SessionOptions().register_custom_ops_library(str(kernel_library.LIBRARY))


def test_the_variable_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "operators_missing", lambda: None)
    assert kernel_library.chosen_operators()
    monkeypatch.setenv(kernel_library.VARIABLE, "off")
    assert not kernel_library.chosen_operators()


def test_a_package_built_without_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "_library", lambda: None)
    assert "install a C++ compiler" in str(kernel_library.operators_missing())
    monkeypatch.setattr(kernel_library, "_library", lambda: object())
    assert "Linux alone" in str(kernel_library.operators_missing())


class GpuThatLoads(cuda.CudaDevice):
    """A GPU whose sessions are none."""

    def __init__(self) -> None:
        super().__init__(0, SimpleNamespace(handle=1))  # type: ignore[arg-type]

    def _session_on(self, *_: object) -> ort.InferenceSession:
        return SimpleNamespace(get_provider_graph_assignment_info=list)  # type: ignore[return-value]

    def load(self, dtype: str) -> None:
        """Load a segment whose only layer is in some precision, and one that has no layer."""
        for kv in ((LayerKV(0, 1, 64, dtype),), ()):
            self._open_session(Path("draft.onnx"), LoadRequest(Path(), Segment("draft", kv, {}), (), 64, 1))


def test_a_gpu_without_them_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernel_library, "operators_missing", lambda: "there is no compiler; install it")
    said = "cuda:0 computes by ONNX Runtime's kernels alone, which take longer: there is no compiler; install it"
    GpuThatLoads().load("bfloat16")
    assert not caplog.messages
    device = GpuThatLoads()
    device.load("float16")
    device.load("float16")
    assert caplog.messages == [said]
    monkeypatch.setenv(kernel_library.VARIABLE, "off")
    GpuThatLoads().load("float16")
    assert caplog.messages == [said]
