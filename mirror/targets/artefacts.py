"""Graphs compiled ahead of time: which one serves a pass, and why another does not. Files and records only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror.bundle import Compiled, Form, Segment, file_sha256
from mirror.targets.base import PassShape

_LOG = logging.getLogger("mirror")

WEIGHTS = "weights"  # among an artefact's options, where it was made from quantized weights
AS_IS = "as-is"  # weights in the arithmetic that the device computes in


@dataclass(frozen=True)
class Wanted:
    """What an artefact must have been made with; fields as in `bundle.Compiled`.

    Attributes:
        weights: how its weights must be stored: `AS_IS`, `int8`, `int4`; None for any.
    """

    device: str
    runtime: str
    options: Mapping[str, str]
    capacity: int
    weights: str | None = None


def compiled_for(folder: Path, segment: Segment, shape: PassShape, wanted: Wanted) -> Compiled | None:
    """Return the artefact that serves a pass, None where the bundle has none that fits.

    An artefact for this device that can't serve is said, with the reason: the caller compiles the graph instead.
    Not so where `weights` are asked for: then the caller is `mirror compile`, which makes one that fits.
    """
    mine = [item for item in segment.compiled if item.device == wanted.device]
    sized = [item for item in mine if (item.width, item.rows) == (shape.width, shape.rows)]
    reasons = []
    for item in sized:
        reason = _misfit(folder, segment, item, wanted)
        if reason is None:
            return item
        reasons.append(f"{item.file} is not used: {reason}")
    if wanted.weights is None:
        for reason in reasons or _absences(segment, shape, wanted, mine):
            _LOG.warning("%s; compiling %s anew (`mirror compile` makes it fit)", reason, segment.name)
    return None


def _absences(segment: Segment, shape: PassShape, wanted: Wanted, mine: Sequence[Compiled]) -> list[str]:
    """Return why a segment that was compiled ahead has nothing for a pass, nothing where it never was."""
    if mine:
        widths = ", ".join(str(width) for width in sorted({item.width for item in mine}))
        return [f"what is compiled for {wanted.device} takes {widths} rows, this pass has {shape.width}"]
    family = wanted.device.partition(":")[0]
    others = sorted({item.device for item in segment.compiled if item.device.partition(":")[0] == family})
    # A GPU's artefact beside a CPU's is no surprise; another architecture of the same NPU is.
    return (
        [f"what is compiled is for {', '.join(others)}, this is {wanted.device}"] if others and family == "qnn" else []
    )


def _misfit(folder: Path, segment: Segment, item: Compiled, wanted: Wanted) -> str | None:
    """Return why an artefact can't serve, None if it can."""
    if item.capacity != wanted.capacity:
        return f"it is for {item.capacity} slots, this engine has {wanted.capacity}"
    if item.runtime != wanted.runtime:
        return f"it was made by {item.runtime}, here is {wanted.runtime}"
    told = {name: value for name, value in item.options.items() if name != WEIGHTS}
    if other := {name for name, _ in set(told.items()) ^ set(wanted.options.items())}:
        return f"it was compiled with other options ({', '.join(sorted(other))})"
    weights = item.options.get(WEIGHTS, AS_IS)
    if wanted.weights not in (None, weights):
        return f"its weights are {weights}, {wanted.weights} was asked for"
    if item.graph_sha256 != graph_sha256(folder, segment):
        return f"{segment.graphs[Form.ROWS].file} has changed since"
    if not (folder / item.file).is_file():
        return "it is missing"
    return None


def graph_sha256(folder: Path, segment: Segment) -> str:
    """Return the sha256 of a segment's graph in rows form."""
    path = folder / segment.graphs[Form.ROWS].file
    return _sha256(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, _: int) -> str:
    return file_sha256(path)


def artefact_stem(device: str, segment: str, shape: PassShape, capacity: int) -> str:
    """Return where an artefact of a bundle lies, without its suffix: `compiled/qnn-v73/draft-8x8-2304`."""
    return f"compiled/{device.replace(':', '-')}/{segment}-{shape.width}x{shape.rows}-{capacity}"


@dataclass(frozen=True)
class Quantized:
    """A bundle's draft with quantized weights, to compile instead of its own.

    Attributes:
        folder: a bundle of the same segments.
        segments: its records, by name.
        weights: `int8`, `int4`.
    """

    folder: Path
    segments: Mapping[str, Segment]
    weights: str
