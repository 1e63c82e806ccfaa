"""Where a graph's weights come from and where they go, one tensor at a time.

A checkpoint tensor that needs no conversion is never read: the graph points at its bytes in the
checkpoint's own safetensors file, which the bundle links. What is converted goes to one file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mirror.errors import ExportError

DRAFT_SCOPE = "draft:"
_ALIGNMENT = 4096  # pages, so that a runtime can map what it reads
_SAFETENSORS_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor as a range of bytes of a checkpoint file; nothing is read before `numpy`."""

    path: Path
    offset: int
    length: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    def numpy(self) -> NDArray[np.generic]:
        """Return the values, mapped from the file."""
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.length,))
        return data.view(self.dtype.numpy()).reshape(self.shape)


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor that is in memory already."""

    array: NDArray[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.array.shape

    def numpy(self) -> NDArray[np.generic]:
        """Return the values."""
        return self.array


@dataclass(frozen=True)
class Found:
    """A checkpoint tensor and the key that tells it from every other tensor of the bundle."""

    key: str
    tensor: FileTensor | MemoryTensor


class WeightSource(Protocol):
    """Named checkpoint tensors."""

    def find(self, names: tuple[str, ...]) -> Found | None:
        """Return the tensor that has one of these names; all of them mean the same (tied) tensor."""
        ...


@dataclass(frozen=True)
class SafetensorsSource:
    """The tensors of a checkpoint folder, as byte ranges of its files."""

    tensors: Mapping[str, FileTensor]
    prefix: str
    scope: str = ""

    @staticmethod
    def open(folder: Path, prefix: str, scope: str = "") -> SafetensorsSource:
        """Read the headers of the folder's safetensors files.

        Args:
            prefix: the base model's attribute, which base-model checkpoints leave out of their names.
            scope: put in front of keys, to tell two checkpoints of one bundle apart.
        """
        tensors: dict[str, FileTensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(_header(path))
        return SafetensorsSource(tensors, prefix, scope)

    def find(self, names: tuple[str, ...]) -> Found | None:
        """Return a reference to the tensor's bytes."""
        for name in sorted(names):
            for key in (name, name.removeprefix(f"{self.prefix}.")):
                if key in self.tensors:
                    return Found(self.scope + key, self.tensors[key])
        return None


@dataclass(frozen=True)
class MemorySource:
    """Tensors already in memory, from a loaded model."""

    arrays: Mapping[str, NDArray[np.generic]]
    scope: str = ""

    def find(self, names: tuple[str, ...]) -> Found | None:
        """Return the array."""
        for name in sorted(names):
            if name in self.arrays:
                return Found(self.scope + name, MemoryTensor(self.arrays[name]))
        return None


@dataclass(frozen=True)
class ChainedSource:
    """Looks in one source after the other: a draft that borrows its target's embedding, say."""

    sources: tuple[WeightSource, ...]

    def find(self, names: tuple[str, ...]) -> Found | None:
        """Return the first source's tensor."""
        return next((found for source in self.sources if (found := source.find(names)) is not None), None)


def _header(path: Path) -> dict[str, FileTensor]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > path.stat().st_size:
            raise ExportError(
                f"{path.name} is not a safetensors file: its header claims {length} bytes; fetch it again"
            )
        header = json.loads(stream.read(length))
    tensors = {}
    for name, facts in header.items():
        if name == "__metadata__" or facts["dtype"] not in _SAFETENSORS_TYPES:
            continue
        start, end = facts["data_offsets"]
        dtype = _SAFETENSORS_TYPES[facts["dtype"]]
        tensors[name] = FileTensor(path, 8 + length + start, end - start, dtype, tuple(facts["shape"]))
    return tensors


@dataclass
class WeightFile:
    """The one file that converted weights are appended to; equal keys are written once."""

    path: Path
    location: str
    on_written: Callable[[int], None] = lambda _: None
    _known: dict[str, ir.ExternalTensor] = field(default_factory=dict)

    def store(
        self, key: str, dtype: ir.DataType, shape: list[int], make: Callable[[], NDArray[np.generic]]
    ) -> ir.ExternalTensor:
        """Return a reference to the tensor `key`, writing what `make` gives if it is not there yet.

        Args:
            make: gives the bytes as an array of any dtype with the tensor's size in bytes.
        """
        if key not in self._known:
            data = np.ascontiguousarray(make())
            with self.path.open("ab") as stream:
                stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                offset = stream.tell()
                stream.write(data.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
            self.on_written(data.nbytes)
            self._known[key] = self._reference(key, dtype, shape, offset, data.nbytes)
        known = self._known[key]
        if list(known.shape) == shape and known.dtype == dtype:
            return known
        return self._reference(key, dtype, shape, known.offset or 0, known.length or 0)

    def _reference(self, key: str, dtype: ir.DataType, shape: list[int], offset: int, length: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            self.location, offset, length, dtype, shape=ir.Shape(shape), name=key, base_dir=self.path.parent.parent
        )
