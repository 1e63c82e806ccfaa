"""A device that notes how long each pass took, and what candidates came out of it.

Wrapped around the real devices of an engine, it sees all that tuning needs while the engine makes its
usual text: no measuring code stands in the round loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mirror.runtime.records import Ints
from mirror.targets.base import Device, Tensor, to_host
from mirror.targets.watched import Pass, WatchedDevice

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


def observed(device: Device, notes: Notes) -> Device:
    """Return a device like another, whose passes are noted."""
    return WatchedDevice(device, lambda item: _noted(item, notes))


def _noted(item: Pass, notes: Notes) -> Mapping[str, Tensor]:
    """Run a pass and note it."""
    start_s = time.perf_counter()
    outputs = item.run()
    for output in outputs.values():
        if not isinstance(output, np.ndarray):
            output.wait()  # a GPU's pass is only launched by now
    seconds = time.perf_counter() - start_s
    positions, wanted = to_host(item.feeds["position_ids"])[0], _wanted(item.feeds)
    # A pass that wants few of its rows' logits reads a prompt; it is no measure of one in a round.
    if 2 * wanted.shape[0] >= positions.shape[0]:
        notes.seconds.setdefault((item.segment, positions.shape[0]), []).append(seconds)
    if item.segment in _CANDIDATES:
        rows = positions if item.segment == "exit_head" else positions[wanted]
        notes.note_candidates(item.segment, rows, to_host(outputs["candidate_ids"])[0, : rows.shape[0]])
    return outputs


def _wanted(feeds: Mapping[str, Tensor]) -> Ints:
    """Return the rows whose logits a pass wants, int64 [rows]; all where it doesn't say."""
    rows: Ints = (
        to_host(feeds["logit_rows"]) if "logit_rows" in feeds else np.arange(to_host(feeds["position_ids"]).size)
    )
    return rows
