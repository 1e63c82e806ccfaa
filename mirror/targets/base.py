"""What the engine asks of a device. Each kind of device is one module beside this one.

A device loads segments and makes KV caches. It never looks at another device, and it never falls
back: a device that isn't there raises `DeviceError` naming what was found and what to install.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mirror.bundle import Compiled, Form, LayerKV, Segment

if TYPE_CHECKING:
    from mirror.targets.artefacts import Quantized

Array = NDArray[Any]


@dataclass(frozen=True, order=True)
class PassShape:
    """The free sizes of one pass.

    Attributes:
        width: rows of the pass.
        rows: rows whose logits are wanted; 0 means all of them, or a graph that doesn't ask.
    """

    width: int
    rows: int = 0

    def sizes(self, capacity: int) -> Mapping[str, int]:
        """Return the value of every symbolic dimension."""
        return {"width": self.width, "rows": self.rows, "capacity": capacity}


@dataclass(frozen=True)
class FreeMemory:
    """What is left of the memory that a device allocates from.

    Attributes:
        pool: the memory's name; devices that share one have the same.
        bytes: None where nobody says.
    """

    pool: str
    bytes: int | None


@dataclass(frozen=True)
class LoadRequest:
    """A segment of a bundle, and the passes that it is to be loaded for.

    Attributes:
        folder: the bundle's.
        shapes: the passes it will be asked for; a device that compiles ahead compiles these.
        capacity: slots of the cache it will run with.
        threads: CPU threads it may use; meaningless on other devices.
        later: passes that it may be asked for; compiled when first asked.
        spare: whether nothing else here wants the cores of these threads between two passes.
    """

    folder: Path
    segment: Segment
    shapes: Sequence[PassShape]
    capacity: int
    threads: int
    later: Sequence[PassShape] = ()
    spare: bool = False


# Waits for values that are on their way to host memory and returns them, an array of the caller's own.
Fetched = Callable[[], Array]


class Mark(Protocol):
    """A place in a stream."""

    def renew(self) -> None:
        """Move it behind all that was launched so far."""
        ...

    def wait(self) -> None:
        """Wait until the stream has come to it."""
        ...


# Launches one copy; the same one at every call. Made once, since what a copy says takes longer to say than to launch.
Copier = Callable[[], None]


class DeviceTensor(Protocol):
    """A tensor that may live on a device; only a segment on the same device can take it as it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    def numpy(self) -> Array:
        """Return the values in host memory, waiting for them if need be."""
        ...

    def numpy_part(self, start: int, count: int) -> Array:
        """Return `count` values in host memory, from the `start`-th on, as they lie one after another; see `numpy`.

        Parts that don't overlap stay valid beside each other until the next pass.
        """
        ...

    def wait(self) -> None:
        """Wait until the values are there: a pass may return before it has ended."""
        ...

    def fetch(self) -> Fetched:
        """Start to bring the values to host memory, behind what was launched so far."""
        ...


Tensor = Array | DeviceTensor


@dataclass(frozen=True)
class GivenIds:
    """Input ids that an earlier pass gives.

    Attributes:
        given: int64 `[1, n]`, what that pass gave: where it left it, until the next pass of its kind, or on its way to
            the host.
        first: the first of `given` that is taken.
        place: the id that it becomes.
        groups, count, stride: the `count` ids from `place + g * stride` on are the next of `given`, for group g.
    """

    given: DeviceTensor | Fetched
    first: int
    place: int
    groups: int
    count: int
    stride: int

    def fill(self, ids: Array) -> None:
        """Write them into ids `[1, width]`, waiting for them."""
        values = self.given() if callable(self.given) else self.given.numpy()
        taken = values[0, self.first : self.first + self.groups * self.count]
        starts = self.place + np.arange(self.groups)[:, None] * self.stride
        ids[0, (starts + np.arange(self.count)).reshape(-1)] = taken


@dataclass(frozen=True)
class FollowOn:
    """Input ids of which some are tokens that earlier passes give, unread by the host; a `DeviceTensor` itself.

    A segment on a device that can order itself behind those passes copies them there; any other waits for them.

    Attributes:
        ids: int64 `[1, width]`, the ids that are known; anything where they aren't.
        parts: the others.
    """

    ids: Array
    parts: tuple[GivenIds, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return self.ids.shape

    def numpy(self) -> Array:
        """Return all ids, waiting for those that were given."""
        ids = self.ids.copy()
        for part in self.parts:
            part.fill(ids)
        return ids

    def numpy_part(self, start: int, count: int) -> Array:
        """Return some of the ids, waiting for all that were given."""
        return self.numpy().reshape(-1)[start : start + count]

    def wait(self) -> None:
        """Wait for the given tokens."""
        self.numpy()

    def fetch(self) -> Fetched:
        """Return the ids, waiting at once."""
        ids = self.numpy()
        return lambda: ids


def to_host(tensor: Tensor) -> Array:
    """Return a tensor's values in host memory."""
    return tensor if isinstance(tensor, np.ndarray) else tensor.numpy()


@dataclass(frozen=True)
class StoredWeights:
    """A graph's weights, as its files hold them.

    Attributes:
        bytes: of all.
        matrix_numbers, matrix_bytes: of the matrices in floating point that products read.
        quantized_bytes: of those in integers, their scales among them.
    """

    bytes: int
    matrix_numbers: int
    matrix_bytes: int
    quantized_bytes: int


class RowTable(Protocol):
    """Rows of float32 on a device, which a host writes between passes."""

    @property
    def tensor(self) -> DeviceTensor:
        """The table `[rows, columns]`, as segments on the same device take it."""
        ...

    def write(self, row: int, values: Array) -> None:
        """Write one row, float32 [columns], in order: behind what was launched so far. See `wait`."""
        ...

    def wait(self) -> None:
        """Wait until the rows written so far have arrived; a row must have before it is written again."""
        ...


class KVCache(Protocol):
    """The key and value buffers of some layers on one device, `[1, heads, capacity, head_dim]` each."""

    @property
    def capacity(self) -> int:
        """The number of slots."""
        ...


class LoadedSegment(Protocol):
    """One graph, loaded on one device."""

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The widths that `run` takes, ascending; None when it takes any."""
        ...

    @property
    def input_names(self) -> frozenset[str]:
        """The catalogue inputs (`bundle.INPUT_NAMES`) that the graph declares; `run` ignores others."""
        ...

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        """Run one pass and write its new KV rows to slots `past_length..` of the cache.

        Args:
            feeds: catalogue inputs by name, with the dtypes and shapes of `bundle.INPUT_NAMES`.
                Copied or consumed before this returns.
            cache: the segment's cache, made by the same device; None for a segment without one.
            past_length: filled slots before this pass, in slots.

        Returns:
            The graph's outputs by name, without the `present` ones. They are owned by the segment
            and stay valid until its next run at the same width.
        """
        ...


class Device(Protocol):
    """One device of this machine."""

    @property
    def name(self) -> str:
        """As the user writes it: `cpu`, `cuda:0`, `openvino:CPU`."""
        ...

    @property
    def form(self) -> Form:
        """The cache form of the graphs that this device takes."""
        ...

    @property
    def int8_drafts(self) -> bool:
        """Whether drafts run in the segments of `bundle.INT8_SEGMENTS` here, where a bundle has them."""
        ...

    @property
    def padded_width(self) -> int:
        """Rows up to which a draft's pass takes little longer than for one: they are padded to share a program.

        1 where a session takes every shape.
        """
        ...

    def weight_bytes(self, segment: Segment, stored: StoredWeights, shapes: Sequence[PassShape]) -> int:
        """Return the memory that a segment's weights take at least, once it is loaded for some passes.

        Args:
            segment: as it is placed here, under its usual name.
            stored: what its graph's files hold.
        """
        ...

    def load_segment(self, request: LoadRequest) -> LoadedSegment:
        """Load a segment of a bundle.

        Raises:
            DeviceError: the device can't take this segment.
        """
        ...

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> KVCache:
        """Return a zeroed cache for these layers."""
        ...

    @property
    def launches(self) -> bool:
        """Whether passes are only launched: they follow each other without the host, and outputs are waited for."""
        ...

    def make_table(self, rows: int, columns: int) -> RowTable:
        """Return a zeroed table.

        Raises:
            DeviceError: passes are not only launched here; a host can do itself what a table is for.
        """
        ...


class AheadCompiler(Protocol):
    """What compiles segments ahead of time, for a device that may not be here."""

    @property
    def compiles_for(self) -> str:
        """The device in the artefacts' records: `qnn:v73`, `openvino:CPU`."""
        ...

    @property
    def padded_width(self) -> int:
        """As the device's."""
        ...

    def fitting(self, request: LoadRequest, shape: PassShape, weights: str | None = None) -> Compiled | None:
        """Return the artefact that a bundle already has for one pass of a request, None where none would be used.

        Args:
            weights: how they must be stored, as in `artefacts.Wanted`.
        """
        ...

    def compile_segment(self, request: LoadRequest, shape: PassShape, quantized: Quantized | None = None) -> Compiled:
        """Compile a segment for one pass of a request into the bundle's folder; return its record.

        Args:
            quantized: what to compile in place of the bundle's own graph.

        Raises:
            DeviceError: the device can't take the graph.
        """
        ...


def is_cpu(name: str) -> bool:
    """Return whether a device, as users write it, is this machine's CPU."""
    return re.fullmatch(r"cpu|openvino:cpu(:.*)?", name.strip(), re.IGNORECASE) is not None


def share_cpu(targets: Iterable[str], draft: str) -> bool:
    """Return whether a draft's device and one of its target's are both this machine's CPU."""
    return is_cpu(draft) and any(map(is_cpu, targets))


def share_device(targets: Iterable[str], draft: str) -> bool:
    """Return whether a draft computes where one of its target's does, so that it takes its time from it.

    A part of a GPU (`cuda:0:0.25`) counts as a device of its own: who names one wants both at work.
    """
    targets = tuple(targets)
    place = _whole_device(draft)
    return share_cpu(targets, draft) or (place is not None and place in map(_whole_device, targets))


def _whole_device(name: str) -> tuple[str, ...] | None:
    """Return family and unit of a device, as users write it; None for a part of a GPU."""
    family, *rest = name.strip().lower().split(":")
    return None if family == "cuda" and len(rest) > 1 else (family, *rest[:1])
