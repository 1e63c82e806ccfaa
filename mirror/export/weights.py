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

from mirror.errors import ExportError

_ALIGNMENT = 4096  # pages, so that a runtime can map what it reads
_SAFETENSORS_TYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}


class WeightSource(Protocol):
    """Named checkpoint tensors."""

    def find(self, names: tuple[str, ...]) -> ir.TensorProtocol | None:
        """Return the tensor with the first of these names that exists."""
        ...


@dataclass(frozen=True)
class SafetensorsSource:
    """The tensors of a checkpoint folder, as byte ranges of its files."""

    tensors: Mapping[str, ir.ExternalTensor]
    prefix: str

    @staticmethod
    def open(folder: Path, prefix: str) -> SafetensorsSource:
        """Read the headers of the folder's safetensors files; `prefix` is the base model's attribute."""
        tensors: dict[str, ir.ExternalTensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(_header(path))
        return SafetensorsSource(tensors, prefix)

    def find(self, names: tuple[str, ...]) -> ir.TensorProtocol | None:
        """Return a reference to the tensor's bytes; base-model checkpoints leave the prefix out."""
        for name in names:
            for key in (name, name.removeprefix(f"{self.prefix}.")):
                if key in self.tensors:
                    return self.tensors[key]
        return None


@dataclass(frozen=True)
class MemorySource:
    """Tensors already in memory, from a loaded model."""

    arrays: Mapping[str, np.ndarray]

    def find(self, names: tuple[str, ...]) -> ir.TensorProtocol | None:
        """Return the array."""
        for name in names:
            if name in self.arrays:
                return ir.tensor(self.arrays[name], name=name)
        return None


def _header(path: Path) -> dict[str, ir.ExternalTensor]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > path.stat().st_size:
            raise ExportError(f"{path.name} is not a safetensors file: its header claims {length} bytes; fetch it again")
        header = json.loads(stream.read(length))
    tensors = {}
    for name, facts in header.items():
        if name == "__metadata__" or facts["dtype"] not in _SAFETENSORS_TYPES:
            continue
        start, end = facts["data_offsets"]
        tensors[name] = ir.ExternalTensor(
            path.name,
            8 + length + start,
            end - start,
            _SAFETENSORS_TYPES[facts["dtype"]],
            shape=ir.Shape(facts["shape"]),
            name=name,
            base_dir=path.parent,
        )
    return tensors


@dataclass
class WeightFile:
    """The one file that converted weights are appended to; equal keys are written once."""

    path: Path
    location: str
    on_written: Callable[[int], None] = lambda _: None
    _known: dict[str, ir.ExternalTensor] = field(default_factory=dict)

    def store(self, key: str, dtype: ir.DataType, shape: list[int], make: Callable[[], np.ndarray]) -> ir.ExternalTensor:
        """Return a reference to the tensor `key`, writing what `make` gives if it is not there yet.

        Args:
            make: gives the bytes as an array of any dtype with the tensor's size in bytes.
        """
        if key not in self._known:
            data = np.ascontiguousarray(make())
            with self.path.open("ab") as stream:
                stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                offset = stream.tell()
                stream.write(data.data if data.size else b"")
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
