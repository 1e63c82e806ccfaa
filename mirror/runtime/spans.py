"""Notes of who spent which time. One log per thread; no locks, no I/O."""

from __future__ import annotations

import time
from types import TracebackType

from mirror.runtime.records import Lane, Span


class SpanLog:
    """Collects spans of one lane: `with log.span("prefix"): ...`."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._spans: list[Span] = []

    def span(self, name: str) -> _Open:
        """Return a context that notes the time spent inside it, also where it ends by an exception."""
        return _Open(self, name)

    def add(self, name: str, start_s: float, end_s: float) -> None:
        """Note a span."""
        self._spans.append(Span(name, self._lane, start_s, end_s))

    def take(self) -> tuple[Span, ...]:
        """Return what was noted since the last call."""
        taken = tuple(self._spans)
        self._spans.clear()
        return taken


class _Open:
    __slots__ = ("_log", "_name", "_start_s")

    def __init__(self, log: SpanLog, name: str) -> None:
        self._log = log
        self._name = name
        self._start_s = 0.0

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.add(self._name, self._start_s, time.perf_counter())
