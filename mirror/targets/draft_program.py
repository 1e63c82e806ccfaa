"""What a bundle says of a draft that this package's own kernels can run: `draft_int8.json`, read."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirror.bundle import PROGRAM_FORMAT
from mirror.errors import BundleError
from mirror.targets.base import Array


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
        if data["format"] != PROGRAM_FORMAT:
            return None
        return _Reader(folder, data).program()
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a draft's program ({error!r}); export the bundle again") from error


class _Reader:
    """Reads a program; a `ValueError` where a tensor isn't what the sizes say, since kernels trust what they get."""

    def __init__(self, folder: Path, data: Any) -> None:
        self._folder = folder
        self._data = data
        self._sizes = {name: int(data[name]) for name in SIZES}

    def program(self) -> Program:
        data, sizes = self._data, self._sizes
        hidden, streams, table = sizes["hidden"], sizes["streams"], (sizes["positions"], sizes["head_dim"] // 2)
        head_size = int(data["head"]["values"]["shape"][1])
        return Program(
            sizes=sizes,
            epsilon=float(data["epsilon"]),
            scale=float(data["scale"]),
            embedding=self._embedding(data["embedding"]),
            stream_rows=self._maybe(data["stream_rows"], "float32", (streams, hidden)) if streams else None,
            cosines=self._tensor(data["cosines"], "float32", table),
            sines=self._tensor(data["sines"], "float32", table),
            layers=tuple(self._layer(layer) for layer in data["layers"]),
            norm=self._tensor(data["norm"], "float32", (hidden,)),
            head=self._matrix(data["head"], hidden, head_size),
            vocabulary=self._maybe(data["vocabulary"], "int64", (head_size,)),
        )

    def _embedding(self, data: Any) -> Embedding:
        kind, shape = data["kind"], (self._sizes["tokens"], self._sizes["hidden"])
        if not kind.startswith("blocks_"):
            return Embedding(kind, self._tensor(data["values"], kind, shape), None, "float32")
        scale_kind = data["scales"]["dtype"]
        values = self._tensor(data["values"], "uint8", (shape[0], shape[1] * int(kind.removeprefix("blocks_")) // 8))
        return Embedding(kind, values, self._tensor(data["scales"], scale_kind, (shape[0], shape[1] // 32)), scale_kind)

    def _layer(self, data: Any) -> ProgramLayer:
        hidden, inner, head_dim = (self._sizes[name] for name in ("hidden", "inner", "head_dim"))
        heads, kv_heads = self._sizes["heads"] * head_dim, self._sizes["kv_heads"] * head_dim
        return ProgramLayer(
            attention_norm=self._tensor(data["attention_norm"], "float32", (hidden,)),
            query_norm=self._maybe(data["query_norm"], "float32", (head_dim,)),
            key_norm=self._maybe(data["key_norm"], "float32", (head_dim,)),
            mlp_norm=self._tensor(data["mlp_norm"], "float32", (hidden,)),
            qkv=self._matrix(data["qkv"], hidden, heads + 2 * kv_heads),
            output=self._matrix(data["output"], heads, hidden),
            gate_up=self._matrix(data["gate_up"], hidden, 2 * inner),
            down=self._matrix(data["down"], inner, hidden),
        )

    def _matrix(self, data: Any, rows: int, columns: int) -> Matrix:
        return Matrix(
            self._tensor(data["values"], "int8", (rows, columns)),
            self._tensor(data["scales"], "float32", (columns,)),
            self._maybe(data["bias"], "float32", (columns,)),
        )

    def _maybe(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Array | None:
        return None if data is None else self._tensor(data, dtype, shape)

    def _tensor(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Array:
        if (data["dtype"], tuple(data["shape"])) != (dtype, shape):
            raise ValueError(f"a tensor is {data['dtype']} {data['shape']}, the sizes mean {dtype} {list(shape)}")
        stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        if "data" in data:
            return np.frombuffer(base64.b64decode(data["data"]), stored).reshape(shape)
        return np.memmap(self._folder / data["file"], stored, "r", offset=data["offset"], shape=shape)
