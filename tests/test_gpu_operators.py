"""Whether GPUs get mirror's own kernels, and what is said where they don't."""

from __future__ import annotations

import onnxruntime as ort
import pytest

from mirror.targets import cuda, kernel_library


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
