"""What a bundle says of a draft that this package's own kernels can run: `draft_int8.json`, read."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirror.errors import BundleError
from mirror.targets.base import Array

_FORMAT = 1


@dataclass(frozen=True)
class Matrix:
    """A linear layer: int8 `[in, out]`, float32 scales `[out]`, and perhaps a float32 bias `[out]`."""

    values: Array
    scales: Array
    bias: Array | None


@dataclass(frozen=True)
class ProgramLayer:
    """A decoder layer; q, k and v are one matrix, gate and up another."""

    attention_norm: Array
    query_norm: Array | None
    key_norm: Array | None
    mlp_norm: Array
    qkv: Matrix
    output: Matrix
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Embedding:
    """A table of `[tokens, hidden]`: `float32`, `float16`, `bfloat16` (as uint16), or `blocks_4` and `blocks_8`."""

    kind: str
    values: Array
    scales: Array | None
    scale_kind: str


@dataclass(frozen=True)
class Program:
    """A draft's sizes and tensors, mapped from the bundle's files."""

    sizes: Mapping[str, int]
    epsilon: float
    scale: float
    embedding: Embedding
    stream_rows: Array | None
    cosines: Array
    sines: Array
    layers: tuple[ProgramLayer, ...]
    norm: Array
    head: Matrix
    vocabulary: Array | None


SIZES = ("hidden", "heads", "kv_heads", "head_dim", "inner", "tokens", "streams", "positions")


def read_program(folder: Path, name: str) -> Program | None:
    """Return the program in a file of a bundle, None if it is of a format that came later: its graphs serve then.

    Raises:
        BundleError: the file is missing, isn't a program, or names tensors that its files don't hold.
    """
    path = folder / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            return None
        return _Reader(folder).program(data)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a draft's program ({error!r}); export the bundle again") from error


@dataclass(frozen=True)
class _Reader:
    folder: Path

    def program(self, data: Any) -> Program:
        table = data["embedding"]
        scales = table["scales"]
        return Program(
            sizes={name: int(data[name]) for name in SIZES},
            epsilon=float(data["epsilon"]),
            scale=float(data["scale"]),
            embedding=Embedding(
                table["kind"],
                self._tensor(table["values"]),
                None if scales is None else self._tensor(scales),
                "float32" if scales is None else scales["dtype"],
            ),
            stream_rows=self._maybe(data["stream_rows"]),
            cosines=self._tensor(data["cosines"]),
            sines=self._tensor(data["sines"]),
            layers=tuple(self._layer(layer) for layer in data["layers"]),
            norm=self._tensor(data["norm"]),
            head=self._matrix(data["head"]),
            vocabulary=self._maybe(data["vocabulary"]),
        )

    def _layer(self, data: Any) -> ProgramLayer:
        return ProgramLayer(
            attention_norm=self._tensor(data["attention_norm"]),
            query_norm=self._maybe(data["query_norm"]),
            key_norm=self._maybe(data["key_norm"]),
            mlp_norm=self._tensor(data["mlp_norm"]),
            qkv=self._matrix(data["qkv"]),
            output=self._matrix(data["output"]),
            gate_up=self._matrix(data["gate_up"]),
            down=self._matrix(data["down"]),
        )

    def _matrix(self, data: Any) -> Matrix:
        return Matrix(self._tensor(data["values"]), self._tensor(data["scales"]), self._maybe(data["bias"]))

    def _maybe(self, data: Any) -> Array | None:
        return None if data is None else self._tensor(data)

    def _tensor(self, data: Any) -> Array:
        dtype = np.dtype("uint16" if data["dtype"] == "bfloat16" else data["dtype"])
        shape = tuple(data["shape"])
        if "data" in data:
            return np.frombuffer(base64.b64decode(data["data"]), dtype).reshape(shape)
        path = self.folder / data["file"]
        return np.memmap(path, dtype, "r", offset=data["offset"], shape=shape)
