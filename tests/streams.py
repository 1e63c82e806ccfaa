"""A GPU's stream over host memory, and a device that computes on it: what is ordered can be read off its log."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mirror.targets.base import Copier, Mark
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, Provider


class FakeMark:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def renew(self) -> None:
        self._log.append("renew")

    def wait(self) -> None:
        self._log.append("wait")


class FakeRecording:
    """Runs again what was launched: a session on the host can do no better."""

    def __init__(self, launch: Callable[[], None], log: list[str]) -> None:
        self._launch, self._log = launch, log

    def replay(self) -> None:
        self._log.append("replay")
        self._launch()


class FakeStream:
    """A GPU's stream over host memory: device addresses are this process's own."""

    handle = 1

    def __init__(self, *, records: bool = True) -> None:
        self.records = records
        self.log: list[str] = []
        self.kept: list[np.ndarray[Any, Any]] = []

    def pinned(self, dtype: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
        self.kept.append(np.zeros(shape, dtype))
        return self.kept[-1]

    def clear(self, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def uploader(self, address: int, source: np.ndarray[Any, Any]) -> Copier:
        def upload() -> None:
            self.log.append("upload")
            ctypes.memmove(address, source.ctypes.data, source.nbytes)

        return upload

    def downloader(self, target: np.ndarray[Any, Any], address: int) -> Copier:
        def download() -> None:
            ctypes.memmove(target.ctypes.data, address, target.nbytes)

        return download

    def download(self, target: np.ndarray[Any, Any], address: int) -> None:
        self.downloader(target, address)()

    def spreader(self, target: int, pitch: int, source: int, size: int, count: int) -> Copier:
        def spread() -> None:
            self.log.append("spread")
            for piece in range(count):
                ctypes.memmove(target + piece * pitch, source + piece * size, size)

        return spread

    def wait(self) -> None:
        self.log.append("stream wait")

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        self.log.append("after")

    def record(self, launch: Callable[[], None]) -> FakeRecording | None:
        self.log.append("record")
        return FakeRecording(launch, self.log) if self.records else None

    def mark(self) -> FakeMark:
        return FakeMark(self.log)


def streamed(stream: FakeStream, *, replays: bool = False) -> OnnxRuntimeDevice:
    provider = Provider(
        "CPUExecutionProvider",
        sized_inputs=frozenset({"total_sequence_length"}),
        stream=stream,
        replays=replays,
        fixed_widths=True,
    )
    return OnnxRuntimeDevice("fake:0", provider)
