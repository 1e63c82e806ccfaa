"""Host work of a mirror round outside session calls: `python -m mirror.bench.host_work BUNDLE`.

Runs a bundle, whose graphs should cost next to nothing so that nothing else is measured, and adds up
the time spent inside ONNX Runtime by each thread. What remains of a thread's round is host work.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

from mirror.bench.provenance import provenance
from mirror.bundle import read_manifest
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.engine import Engine, Result
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Lane, Round
from mirror.targets.base import LoadedSegment, LoadRequest, Tensor
from mirror.targets.cpu import CpuDevice
from mirror.targets.onnxruntime_session import OnnxRuntimeSegment
from mirror.targets.watched import Pass, WatchedSegment

_WAITS = ("candidate_wait", "rollout_wait", "redraft", "draft_prefill_wait")


class SessionClock:
    """Intervals spent inside sessions, by thread."""

    def __init__(self) -> None:
        self.intervals: dict[int, list[tuple[float, float]]] = {}

    def seconds(self, thread: int, start_s: float, end_s: float) -> float:
        """Return the time that a thread spent inside sessions between two moments."""
        return sum(end - start for start, end in self.intervals.get(thread, []) if start >= start_s and end <= end_s)

    def note(self, start_s: float) -> None:
        """Note that the calling thread was inside a session from a moment until now."""
        self.intervals.setdefault(threading.get_ident(), []).append((start_s, time.perf_counter()))


class ClockedSession:
    """A session whose runs are noted."""

    def __init__(self, session: ort.InferenceSession, clock: SessionClock) -> None:
        self._session = session
        self._clock = clock

    def io_binding(self) -> ort.IOBinding:
        """Return a binding of the session itself."""
        return self._session.io_binding()

    def run_with_iobinding(self, binding: ort.IOBinding, options: ort.RunOptions | None) -> None:
        """Run, and note it."""
        start_s = time.perf_counter()
        self._session.run_with_iobinding(binding, options)
        self._clock.note(start_s)


class ClockedCpu(CpuDevice):
    """The CPU, its sessions clocked."""

    def __init__(self, clock: SessionClock) -> None:
        super().__init__()
        self._clock = clock

    def load_segment(self, request: LoadRequest) -> LoadedSegment:
        """Load a segment whose runs are noted."""
        loaded = super().load_segment(request)
        if isinstance(loaded, OnnxRuntimeSegment):
            loaded.session = ClockedSession(loaded.session, self._clock)
            return loaded
        return WatchedSegment(request, loaded, self._noted)

    def _noted(self, started: Pass) -> Mapping[str, Tensor]:
        start_s = time.perf_counter()
        outputs = started.run()
        self._clock.note(start_s)
        return outputs


def measure(bundle: Path, *, rounds: int, prompt: Sequence[int]) -> Mapping[str, object]:
    """Return the host work per round of a mirror run, in milliseconds."""
    clock = SessionClock()
    manifest = read_manifest(bundle)
    options = EngineOptions(candidates=CandidateSource.BOTH)
    with Engine(bundle, manifest, options, ClockedCpu(clock), ClockedCpu(clock)) as engine:
        engine.generate_tokens(prompt, max_new_tokens=32)
        result = engine.generate_tokens(prompt, max_new_tokens=rounds)
    target_thread = threading.get_ident()
    (draft_thread,) = set(clock.intervals) - {target_thread}
    target = [_target_host_ms(item, clock, target_thread) for item in result.rounds if item.branches]
    draft = [_draft_host_ms(item, clock, draft_thread) for item in result.rounds if item.branches]
    return {
        "what": "host work per round outside session calls",
        "gamma": engine.plan.gamma,
        "kappa": int(engine.plan.fanout.max()),
        "vocab_size": manifest.model.vocab_size,
        "rounds": len(target),
        "branches_per_round": result.statistics.branches_per_round,
        "target_thread_ms": _spread(target),
        "draft_thread_ms": _spread(draft),
        "both_ms": _spread([a + b for a, b in zip(target, draft, strict=True)]),
        "round_ms": _round_ms(result),
    }


def _target_host_ms(item: Round, clock: SessionClock, thread: int) -> float:
    waits = sum(span.seconds for span in item.spans if span.lane is Lane.TARGET and span.name in _WAITS)
    return 1e3 * (item.end_s - item.start_s - waits - clock.seconds(thread, item.start_s, item.end_s))


def _draft_host_ms(item: Round, clock: SessionClock, thread: int) -> float:
    """Return the draft's thread's work in a round: its spans, less waits and sessions."""
    spans = [span for span in item.spans if span.lane is Lane.DRAFT and span.name not in _WAITS]
    return 1e3 * sum(span.seconds - clock.seconds(thread, span.start_s, span.end_s) for span in spans)


def _spread(values: Sequence[float]) -> Mapping[str, float]:
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return {
        "p10": round(ordered[tenth], 4),
        "median": round(statistics.median(ordered), 4),
        "p90": round(ordered[-1 - tenth], 4),
    }


def _round_ms(result: Result) -> Mapping[str, float]:
    return _spread([1e3 * (item.end_s - item.start_s) for item in result.rounds if item.branches])


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=200, help="tokens to generate, about as many rounds")
    parser.add_argument("--prompt", type=int, nargs="+", default=[1, 2, 3], help="token ids")
    options = parser.parse_args()
    result = measure(options.bundle, rounds=options.rounds, prompt=options.prompt)
    print(json.dumps({**result, **provenance("mirror.bench.host_work")}))  # noqa: T201


if __name__ == "__main__":
    main()
