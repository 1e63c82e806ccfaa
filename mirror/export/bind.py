"""Give a normalised graph its weights, in the precision that the bundle is to have."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mirror.errors import ExportError
from mirror.export.weights import WeightFile, WeightSource

INLINE_BYTES = 1024
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Precision(Enum):
    """How weights are stored. int8 and int4 are weight-only: the rest stays float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def float_type(self) -> ir.DataType:
        """The type of activations, norms and caches."""
        return {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}.get(self.value, ir.DataType.FLOAT)

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight; None where weights stay floating point."""
        return {"int8": 8, "int4": 4}.get(self.value)


@dataclass
class Binder:
    """Binds the parameters of a bundle's graphs; each tensor is linked or written once.

    `folder` is the bundle being made.
    """

    folder: Path
    source: WeightSource
    precision: Precision
    file: WeightFile
    scope: str = ""  # keeps the tensors of two checkpoints apart in the file
    linked: dict[Path, str] = field(default_factory=dict)

    def bind(self, graph: ir.Graph, aliases: dict[str, tuple[str, ...]]) -> None:
        """Point every unbound parameter of the graph at its bytes.

        Args:
            aliases: the names that each initializer may have in the checkpoint.

        Raises:
            ExportError: the checkpoint lacks a tensor, or has it in another shape.
        """
        for name, names in aliases.items():
            value = graph.initializers.get(name)
            if value is not None and value.const_value is None:
                self._set(value, self.float_tensor(names, value))
        for value in list(graph.initializers.values()):
            self._externalise(value)

    @property
    def dtype(self) -> ir.DataType:
        """The float type of the bundle."""
        return self.precision.float_type

    def float_tensor(self, names: tuple[str, ...], value: ir.Value) -> ir.ExternalTensor:
        """Return a reference to a parameter's bytes in the bundle's float type."""
        tensor = self.find(names, value)
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype == self.dtype:
            return self._linked(tensor)
        key = f"{self.scope}{tensor.name}:{self.dtype.name}"
        return self.file.store(key, self.dtype, [int(size) for size in tensor.shape], lambda: self._converted(tensor))

    def find(self, names: tuple[str, ...], value: ir.Value) -> ir.TensorProtocol:
        """Return a parameter's checkpoint tensor, its shape checked."""
        tensor = self.source.find(names)
        if tensor is None:
            raise ExportError(f"the checkpoint has no tensor {names[0]}; it is incomplete or of another architecture")
        assert value.shape is not None
        found, expected = [int(size) for size in tensor.shape], [int(size) for size in value.shape]  # type: ignore[arg-type, call-overload]
        if found != expected:
            raise ExportError(f"tensor {names[0]} has shape {found}, config.json means {expected}; they do not belong together")
        return tensor

    def _converted(self, tensor: ir.TensorProtocol) -> np.ndarray:
        return tensor.numpy().astype(self.dtype.numpy())

    def _linked(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        path = Path(tensor.base_dir) / tensor.location
        if path not in self.linked:
            self.linked[path] = link_weights(path, self.folder / "weights", self.scope.replace(":", "-") + path.name)
        return ir.ExternalTensor(
            f"weights/{self.linked[path]}", tensor.offset, tensor.length, tensor.dtype,
            shape=ir.Shape(list(tensor.shape)), name=str(tensor.name), base_dir=self.folder,
        )  # fmt: skip

    def _externalise(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < INLINE_BYTES:
            return
        data = tensor.numpy()
        if data.dtype == np.float32 and value.dtype is not ir.DataType.FLOAT:
            data = data.astype(self.dtype.numpy())
        key = f"{value.name}:{hash(data.tobytes())}"
        self._set(value, self.file.store(key, tensor.dtype, [int(size) for size in tensor.shape], lambda: data))

    def _set(self, value: ir.Value, tensor: ir.ExternalTensor) -> None:
        value.const_value = tensor
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(list(tensor.shape))


def link_weights(path: Path, folder: Path, name: str) -> str:
    """Make a checkpoint file part of the bundle under a name, without copying it where the file system can.

    A runtime reads only what lies inside the bundle, so symbolic links don't serve. A hard link does;
    across file systems the kernel copies.
    """
    folder.mkdir(exist_ok=True)
    real = path.resolve()
    link = folder / name
    try:
        os.link(real, link)
    except OSError:
        shutil.copyfile(real, link)
    return name
