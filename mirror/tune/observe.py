"""A device that notes how long each pass took, and what candidates came out of it.

Wrapped around the real devices of an engine, it sees all that tuning needs while the engine makes its
usual text: no measuring code stands in the round loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mirror.bundle import Form, LayerKV, Segment
from mirror.runtime.records import Ints
from mirror.targets.base import Device, KVCache, LoadedSegment, PassShape, Tensor, to_host

_CANDIDATES = ("exit_head", "draft_trunk")


@dataclass
class Notes:
    """What was seen since the last `clear`.

    Attributes:
        seconds: the durations of a segment's passes, by segment and width.
        candidates: by segment and absolute position, the ids offered for the token after it. A position is
            run again until its context is the text's own, so the last note is the one that counts.
    """

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    candidates: dict[str, dict[int, Ints]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything."""
        self.seconds.clear()
        self.candidates.clear()

    def note_candidates(self, segment: str, positions: Ints, ids: Ints) -> None:
        """Keep ids `[rows, top]` under their positions `[rows]`."""
        known = self.candidates.setdefault(segment, {})
        known.update((int(position), row.copy()) for position, row in zip(positions, ids, strict=True))

    def table(self, segment: str, positions: Iterable[int], top: int) -> Ints:
        """Return the ids at some positions, int64 [positions, top]; -1 where there are none."""
        known, missing = self.candidates.get(segment, {}), np.full(top, -1, np.int64)
        rows = [known.get(position, missing)[:top] for position in positions]
        return np.array(rows, np.int64).reshape(len(rows), top)


class ObservedSegment:
    """A loaded segment that takes notes of its passes."""

    def __init__(self, name: str, inner: LoadedSegment, notes: Notes) -> None:
        self._name = name
        self._inner = inner
        self._notes = notes

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The inner segment's."""
        return self._inner.widths

    @property
    def input_names(self) -> frozenset[str]:
        """The inner segment's."""
        return self._inner.input_names

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        """Run the inner segment's pass."""
        start_s = time.perf_counter()
        outputs = self._inner.run(feeds, cache, past_length)
        for output in outputs.values():
            if not isinstance(output, np.ndarray):
                output.wait()  # a GPU's pass is only launched by now
        seconds = time.perf_counter() - start_s
        positions, wanted = to_host(feeds["position_ids"])[0], _wanted(feeds)
        # A pass that wants few of its rows' logits reads a prompt; it is no measure of one in a round.
        if 2 * wanted.shape[0] >= positions.shape[0]:
            self._notes.seconds.setdefault((self._name, positions.shape[0]), []).append(seconds)
        if self._name in _CANDIDATES:
            rows = positions if self._name == "exit_head" else positions[wanted]
            self._notes.note_candidates(self._name, rows, to_host(outputs["candidate_ids"])[0, : rows.shape[0]])
        return outputs


def _wanted(feeds: Mapping[str, Tensor]) -> Ints:
    """Return the rows whose logits a pass wants, int64 [rows]; all where it doesn't say."""
    rows: Ints = (
        to_host(feeds["logit_rows"]) if "logit_rows" in feeds else np.arange(to_host(feeds["position_ids"]).size)
    )
    return rows


class ObservedDevice:
    """A device whose segments take notes."""

    def __init__(self, inner: Device, notes: Notes) -> None:
        self._inner = inner
        self._notes = notes

    @property
    def name(self) -> str:
        """The inner device's."""
        return self._inner.name

    @property
    def form(self) -> Form:
        """The inner device's."""
        return self._inner.form

    def load_segment(
        self,
        folder: Path,
        segment: Segment,
        *,
        capacity: int,
        shapes: Sequence[PassShape],
        threads: int,
        later: Sequence[PassShape] = (),
    ) -> ObservedSegment:
        """Load a segment on the inner device."""
        loaded = self._inner.load_segment(
            folder, segment, capacity=capacity, shapes=shapes, threads=threads, later=later
        )
        return ObservedSegment(segment.name, loaded, self._notes)

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> KVCache:
        """Return the inner device's cache."""
        return self._inner.make_cache(layers, capacity)
