"""How much memory a bundle's segments take, and whether a device has it. Reads graph files, no weights.

A graph names its weights as byte ranges of other files, so their sizes are in the graph's own file. The
few fields of the ONNX format that say so are read here: no runtime library is needed to know what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror.bundle import Form, LayerKV, Segment
from mirror.errors import DeviceError
from mirror.runtime.graph_count import stored_weights
from mirror.targets.base import FreeMemory, StoredWeights

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class SegmentMemory:
    """What one segment takes on its device, in bytes; activations come on top."""

    name: str
    weight_bytes: int
    cache_bytes: int

    @property
    def bytes(self) -> int:
        """Weights and cache."""
        return self.weight_bytes + self.cache_bytes


def segment_memory(
    folder: Path,
    segment: Segment,
    form: Form,
    capacity: int,
    held: Callable[[StoredWeights], int] = lambda stored: stored.bytes,
) -> SegmentMemory:
    """Return what a segment takes in one cache form, its cache having `capacity` slots; 0 for a missing graph.

    Args:
        held: what a device takes of memory for a graph's weights; as many bytes as the files, if not given.
    """
    graph = segment.graphs.get(form)
    weights = 0 if graph is None else held(stored_weights(folder / graph.file))
    return SegmentMemory(segment.name, weights, capacity * slot_bytes(segment.kv))


def slot_bytes(layers: Sequence[LayerKV]) -> int:
    """Return the bytes of one slot of a cache: a key and a value in each of its layers."""
    return sum(2 * layer.heads * layer.head_dim * _ITEM_BYTES.get(layer.dtype, 4) for layer in layers)


def check_room(needs: Mapping[str, Sequence[SegmentMemory]], free: Callable[[str], FreeMemory]) -> None:
    """Refuse segments that can't fit where they are to run.

    Args:
        needs: the segments of each device, by its name.
        free: tells what a device has left; devices may share one memory.

    Raises:
        DeviceError: a memory is smaller than the weights and caches meant for it.
    """
    pools: dict[str, list[SegmentMemory]] = {}
    found = {device: free(device) for device in needs}
    for device, segments in needs.items():
        pools.setdefault(found[device].pool, []).extend(segments)
    for memory in found.values():
        segments = pools[memory.pool]
        total = sum(segment.bytes for segment in segments)
        if memory.bytes is not None and total > memory.bytes:
            raise DeviceError(
                f"{memory.pool} has {_gib(memory.bytes)} free, these segments need at least {_gib(total)}: "
                f"{', '.join(_sentence(segment) for segment in segments)}; ask for a smaller max_length, place "
                "segments on other devices, or export with a smaller --precision"
            )


def _sentence(segment: SegmentMemory) -> str:
    cache = f" + {_gib(segment.cache_bytes)} of cache" if segment.cache_bytes else ""
    return f"{segment.name} {_gib(segment.weight_bytes)}{cache}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
