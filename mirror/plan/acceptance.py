"""How many draft tokens stand, and how often the outcome was prepared, from a draft's measured figures.

A curve is measured once for a draft and its target (`python -m mirror.distill.evaluate`). From it the tokens of a
round are said for any window and any schedule of passes: a row agrees with the target with a chance that depends on
how many stream rows lie between it and the last real one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from mirror.errors import RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.lookahead import branch_passes

DEFAULT_CURVE = "smollm2-135m"
_SOURCES = {"draft": CandidateSource.DRAFT, "exit": CandidateSource.EXIT, "draft+exit": CandidateSource.BOTH}


@dataclass(frozen=True)
class Prepared:
    """The share of outcomes that some branches prepare.

    Attributes:
        exit_share: where the exit lies, as a share of the target's layers; None where no exit is asked.
        points: (branches, share) pairs, ascending.
    """

    source: CandidateSource
    exit_share: float | None
    points: tuple[tuple[int, float], ...]

    def at(self, branches: int) -> float:
        """Return the share for some branches, on a line over their logarithm; none beyond what was measured."""
        first, last = self.points[0], self.points[-1]
        if branches <= first[0]:
            return first[1] * math.log2(1 + branches) / math.log2(1 + first[0])
        for (low, below), (high, above) in zip(self.points, self.points[1:], strict=False):
            if branches <= high:
                return below + (above - below) * math.log2(branches / low) / math.log2(high / low)
        return last[1]


@dataclass(frozen=True)
class Curve:
    """What is known of a draft's agreement with its target.

    Attributes:
        agreement: the chance that a row's token is the target's, by the stream rows since the last real row.
        prepared: by source and exit.
    """

    title: str
    agreement: tuple[float, ...]
    prepared: tuple[Prepared, ...]

    @property
    def streams(self) -> int:
        """How many stream rows it was measured with."""
        return len(self.agreement) - 1

    def tokens_per_round(self, tokens_per_pass: Sequence[int], gamma: int) -> float:
        """Return the mean of a round's tokens: the draft tokens that stand, and the target's own one."""
        stands, total = 1.0, 1.0
        for item in branch_passes(tokens_per_pass, gamma):
            for row in range(item.gives):
                stands *= self.agreement[min(row, self.streams)]
                total += stands
        return total

    def share_prepared(self, source: CandidateSource, branches: int, exit_share: float) -> float:
        """Return the share of rounds whose outcome has a branch, between measured exits on a line."""
        known = [item for item in self.prepared if item.source is source]
        if not known:
            raise RequestError(f"the curve {self.title!r} has nothing on candidates from {source.value}; name another")
        if not source.needs_exit:
            return known[0].at(branches)
        known.sort(key=lambda item: item.exit_share or 0.0)
        shares = [item.exit_share or 0.0 for item in known]
        values = [item.at(branches) for item in known]
        return _on_line(exit_share, shares, values)

    def exit_shares(self) -> tuple[float, ...]:
        """Return the exits that were measured, as shares of the target's layers, ascending."""
        return tuple(sorted({item.exit_share for item in self.prepared if item.exit_share is not None}))

    def with_agreement(self, agreement: float) -> Curve:
        """Return the curve of a draft that agrees more or less often; streams keep their ratio to it."""
        scaled = tuple(min(agreement * value / self.agreement[0], 1.0) for value in self.agreement)
        return replace(self, title=f"agreement {agreement:g}, the rest as {self.title}", agreement=scaled)


def _on_line(place: float, places: Sequence[float], values: Sequence[float]) -> float:
    if place <= places[0]:
        return values[0]
    for low, high, below, above in zip(places, places[1:], values, values[1:], strict=False):
        if place <= high:
            return below + (above - below) * (place - low) / (high - low)
    return values[-1]


def best_schedule(curve: Curve, gamma: int, passes: int, streams: int) -> tuple[int, ...] | None:
    """Return the tokens of each pass that make the most of some passes; None where streams don't reach that far."""
    found = _splits(gamma, passes, 1 + streams)
    return max(found, key=lambda parts: curve.tokens_per_round(parts, gamma), default=None)


def _splits(total: int, parts: int, most: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)] if 1 <= total <= most else []
    firsts = range(1, min(most, total - parts + 1) + 1)
    return [(first, *rest) for first in firsts for rest in _splits(total - first, parts - 1, most)]


# --- reading --------------------------------------------------------------------------------------


def read_curve(source: str | None, layers: int) -> Curve:
    """Return a curve: the package's own, that of a file, or the package's with another agreement.

    Args:
        source: None, a number between 0 and 1, a curve's file, or a result of `mirror.distill.evaluate`.
        layers: the target's, for a result, which names exits by layer.

    Raises:
        RequestError: it is none of these.
    """
    if source is not None and Path(source).is_file():
        return parse_curve(source, Path(source).read_text(encoding="utf-8"), layers)
    text = resources.files("mirror").joinpath(f"plan/curves/{DEFAULT_CURVE}.json").read_text(encoding="utf-8")
    default = parse_curve(DEFAULT_CURVE, text, layers)
    if source is None:
        return default
    try:
        agreement = float(source)
    except ValueError:
        agreement = math.nan
    if not 0 < agreement < 1:
        raise RequestError(
            f"acceptance is {source!r}; give the share of draft tokens that stand, between 0 and 1, or the result of "
            "`python -m mirror.distill.evaluate`"
        )
    return default.with_agreement(agreement)


def parse_curve(name: str, text: str, layers: int) -> Curve:
    """Return the curve in a JSON text; see `read_curve`.

    Raises:
        RequestError: it isn't JSON, or lacks what a curve needs.
    """
    try:
        data = json.loads(text)
        found = data.get("greedy", data)
        gamma = int(data["options"]["gamma"]) if "greedy" in data else int(data["gamma"])
        passes = [(tuple(row["tokens_per_pass"]), float(row["tokens_per_round"])) for row in found["passes"]]
        prepared = _prepared(found["branches"], int(data.get("layers", layers)))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{name} is no acceptance curve ({type(error).__name__}: {error}); give a result of "
            "`python -m mirror.distill.evaluate`, or a file like mirror/plan/curves/smollm2-135m.json"
        ) from error
    return Curve(data.get("title", name), fit_agreement(passes, gamma), prepared)


def _prepared(rows: Sequence[Mapping[str, Any]], layers: int) -> tuple[Prepared, ...]:
    points: dict[tuple[CandidateSource, float | None], list[tuple[int, float]]] = {}
    for row in rows:
        exit_share = None if row["exit_layer"] is None else row["exit_layer"] / layers
        points.setdefault((_SOURCES[row["source"]], exit_share), []).append((row["branches"], row["shaped"]))
    return tuple(Prepared(source, exit_share, tuple(sorted(found))) for (source, exit_share), found in points.items())


def fit_agreement(measured: Sequence[tuple[tuple[int, ...], float]], gamma: int) -> tuple[float, ...]:
    """Return the chances, by stream rows since the last real one, that come closest to measured tokens per round.

    Args:
        measured: tokens of each pass, and the mean tokens of a round.
    """
    rows = max((max(schedule) for schedule, _ in measured), default=1)

    def error(chances: tuple[float, ...]) -> float:
        curve = Curve("", chances, ())
        return sum((curve.tokens_per_round(schedule, gamma) - tokens) ** 2 for schedule, tokens in measured)

    best, step = (0.5,) * rows, 0.25
    while step > 1e-4:
        near = [_moved(best, row, change) for row in range(rows) for change in (-step, step)]
        closest = min(near, key=error)
        if error(closest) < error(best):
            best = closest
        else:
            step /= 2
    return best


def _moved(chances: tuple[float, ...], row: int, change: float) -> tuple[float, ...]:
    moved = min(max(chances[row] + change, 1e-3), 1.0)
    return (*chances[:row], moved, *chances[row + 1 :])
