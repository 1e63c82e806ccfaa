"""Give a normalised graph its weights, in the precision that the bundle is to have."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mirror.errors import ExportError
from mirror.export.graphs import constant, insert_before, int64s, is_op, replace, sizes
from mirror.export.pack import Parts, pack_attention, pack_gates, single_parts
from mirror.export.quantize import (
    ORT,
    Quantised,
    Quantiser,
    gather_attributes,
    is_quantisable,
    matmul_attributes,
    quantise_rows,
)
from mirror.export.trace import DOMAIN, Aliases
from mirror.export.weights import DRAFT_SCOPE, FileTensor, Found, MemoryTensor, WeightFile, WeightSource

INLINE_BYTES = 1024


class Precision(Enum):
    """How weights are stored. int8 and int4 are weight-only: the rest is float32, or float16, which GPUs want."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    INT8_FP16 = "int8-fp16"
    INT4_FP16 = "int4-fp16"

    @property
    def float_type(self) -> ir.DataType:
        """The type of activations, norms and caches."""
        if self is Precision.BF16:
            return ir.DataType.BFLOAT16
        return ir.DataType.FLOAT16 if self.value.endswith("fp16") else ir.DataType.FLOAT

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight; None where weights stay floating point."""
        return {"int8": 8, "int4": 4}.get(self.value.partition("-")[0])


@dataclass
class Binder:
    """Binds the parameters of a bundle's graphs; each tensor is linked or written once.

    `folder` is the bundle being made. With `integers`, products are of 8-bit integers and the rest is float32,
    whatever the bundle's precision: for a draft on a CPU.
    """

    folder: Path
    source: WeightSource
    precision: Precision
    file: WeightFile
    linked: dict[Path, str] = field(default_factory=dict)
    quantised: dict[str, Quantised] = field(default_factory=dict)
    integers: bool = False

    def of(self, source: WeightSource) -> Binder:
        """Return a binder over other tensors that shares what this one has linked and written."""
        return dataclasses.replace(self, source=source)

    def of_integers(self) -> Binder:
        """Return a binder of the same tensors for products of integers; it shares what this one has written."""
        return dataclasses.replace(self, integers=True)

    @property
    def dtype(self) -> ir.DataType:
        """The float type of the graphs that it binds."""
        return ir.DataType.FLOAT if self.integers else self.precision.float_type

    def bind(self, graph: ir.Graph, parameters: Mapping[str, Aliases]) -> None:
        """Point every parameter of the graph at its bytes.

        Args:
            parameters: the names that each initializer may have in the checkpoint.

        Raises:
            ExportError: the checkpoint lacks a tensor, or has it in another shape.
        """
        parts = single_parts({name: names for name, names in parameters.items() if name in graph.initializers})
        # Graphs in 16 bits are a GPU's, whose narrow products cost more than writing these matrices anew.
        if self._writes(graph, parts) or self.dtype is not ir.DataType.FLOAT:
            parts = pack_gates(graph, pack_attention(graph, parts, normed=self.integers))
        if self.integers:
            self._use_integers(graph, parts)
            self._use_own_tables(graph, parts)
        elif self.precision.bits is not None:
            self._quantise(graph, parts, Quantiser(self.precision.bits, self.file, self.dtype))
        for name, pieces in parts.items():
            value = graph.initializers[name]
            if value.const_value is not None:
                continue
            if list(value.uses()):
                self._set(value, self._float_tensor(pieces, value))
            else:
                del graph.initializers[name]
        for value in list(graph.initializers.values()):
            self._externalise(value)

    def _writes(self, graph: ir.Graph, parts: Mapping[str, Parts]) -> bool:
        """Whether weights are converted; then it costs nothing to lay them out anew."""
        if self.integers or self.precision.bits is not None:
            return True
        largest = max(parts, key=lambda name: int(np.prod(sizes(graph.initializers[name]))))
        return not self._is_usable(self._find(parts[largest][0]).tensor)

    def _is_usable(self, tensor: FileTensor | MemoryTensor) -> TypeGuard[FileTensor]:
        """Whether a tensor's bytes can serve where they lie."""
        return isinstance(tensor, FileTensor) and tensor.dtype == self.dtype

    # --- floating point ---------------------------------------------------------------------------

    def _float_tensor(self, pieces: Parts, value: ir.Value) -> ir.ExternalTensor:
        """Return a reference to a parameter's bytes in the bundle's float type."""
        self._check_shape(pieces, value)
        usable = [tensor for tensor in (self._find(piece).tensor for piece in pieces) if self._is_usable(tensor)]
        whole = adjoining(usable) if len(usable) == len(pieces) else None
        if whole is not None:
            return self._linked(whole, self._key(pieces))
        key = f"{self._key(pieces)}:{self.dtype.name}"
        return self.file.store(key, self.dtype, sizes(value), lambda: self._array(pieces, self.dtype))

    def _key(self, pieces: Parts) -> str:
        return "+".join(self._find(piece).key for piece in pieces)

    def _array(self, pieces: Parts, dtype: ir.DataType) -> NDArray[np.generic]:
        return np.concatenate([self._find(piece).tensor.numpy().astype(dtype.numpy(), copy=False) for piece in pieces])

    def _float_array(self, pieces: Parts) -> NDArray[np.float32]:
        return self._array(pieces, ir.DataType.FLOAT).astype(np.float32, copy=False)

    def _find(self, names: Aliases) -> Found:
        found = self.source.find(names)
        if found is None:
            raise ExportError(f"the checkpoint has no tensor {names[0]}; it is incomplete or of another architecture")
        return found

    def _check_shape(self, pieces: Parts, value: ir.Value) -> None:
        shapes = [list(self._find(piece).tensor.shape) for piece in pieces]
        found = [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes[0] else []
        if found != sizes(value):
            raise ExportError(
                f"tensor {pieces[0][0]} has shape {found}, config.json means {sizes(value)}; "
                "they do not belong together"
            )

    def _linked(self, tensor: FileTensor, key: str) -> ir.ExternalTensor:
        path = tensor.path
        if path not in self.linked:
            name = "draft-" + path.name if key.startswith(DRAFT_SCOPE) else path.name
            link_weights(path, self.folder / "weights", name)
            self.linked[path] = name
        location, shape = f"weights/{self.linked[path]}", ir.Shape(tensor.shape)
        return ir.ExternalTensor(
            location, tensor.offset, tensor.length, tensor.dtype, shape=shape, name=key, base_dir=self.folder
        )

    # --- quantised --------------------------------------------------------------------------------

    def _quantise(self, graph: ir.Graph, parts: Mapping[str, Parts], quantiser: Quantiser) -> None:
        """Turn linear layers into `MatMulNBits`, and embeddings tied to one into `GatherBlockQuantized`."""
        known = self.quantised
        for node, pieces, shape in self._quantisable(graph, parts):
            key = self._key(pieces)
            known[key] = quantiser.quantise(key, shape, partial(self._float_array, pieces))
            self._use_quantised(graph, node, known[key])
        for node in list(graph):
            table = node.inputs[0] if is_op(node, "Gather") else None
            if table is None or str(table.name) not in parts:
                continue
            key = self._key(parts[str(table.name)])
            if key in known:
                self._gather_quantised(graph, node, known[key])

    def _quantisable(
        self, graph: ir.Graph, parts: Mapping[str, Parts]
    ) -> Iterator[tuple[ir.Node, Parts, tuple[int, int]]]:
        """Yield the linear layers that are to be quantised, with their weights' parts and shape `(out, in)`."""
        for node in list(graph):
            weight = node.inputs[1] if is_op(node, "Linear", DOMAIN) else None
            if weight is None or weight.name not in parts or not is_quantisable(str(weight.name)):
                continue
            pieces = parts[str(weight.name)]
            self._check_shape(pieces, weight)
            rows, columns = sizes(weight)
            yield node, pieces, (rows, columns)

    def _use_quantised(self, graph: ir.Graph, node: ir.Node, weight: Quantised) -> None:
        inputs = [node.inputs[0], self._tensor(graph, weight.blocks), self._tensor(graph, weight.scales)]
        output = node.outputs[0]
        product = insert_before(
            graph, node, "MatMulNBits", inputs, domain=ORT, attributes=matmul_attributes(weight), like=output
        )
        if len(node.inputs) > 2:
            product = insert_before(graph, node, "Add", [product, node.inputs[2]], like=output)
        replace(graph, node, product)

    # --- products of integers ---------------------------------------------------------------------

    def _use_integers(self, graph: ir.Graph, parts: Mapping[str, Parts]) -> None:
        """Turn linear layers into `DynamicQuantizeMatMul`, which rounds all that it multiplies by one scale."""
        for node, pieces, shape in self._quantisable(graph, parts):
            made = partial(self._float_array, pieces)
            values, scales = quantise_rows(self.file, self._key(pieces), shape, made)
            largest = self._largest_of_rows(graph, node)
            x, output = node.inputs[0], node.outputs[0]
            if largest is not None:
                x = insert_before(graph, node, "Div", [x, largest], like=x)
            inputs = [x, self._tensor(graph, values), self._tensor(graph, scales)]
            product = insert_before(graph, node, "DynamicQuantizeMatMul", inputs, domain=ORT, like=output)
            if largest is not None:
                product = insert_before(graph, node, "Mul", [product, largest], like=output)
            if len(node.inputs) > 2:
                product = insert_before(graph, node, "Add", [product, node.inputs[2]], like=output)
            replace(graph, node, product)

    def _largest_of_rows(self, graph: ir.Graph, node: ir.Node) -> ir.Value | None:
        """Return the largest magnitude of each of a linear layer's input rows, None where norms keep rows alike.

        What an activation gives can be a thousand times as large for a text's first token as for the others, of
        which a common scale would leave nothing.
        """
        maker = node.inputs[0].producer() if node.inputs[0] is not None else None
        if maker is None or maker.op_type != "Mul":
            return None
        magnitudes = insert_before(graph, node, "Abs", [node.inputs[0]], like=node.inputs[0])
        last = int64s(graph, -1)
        largest = insert_before(graph, node, "ReduceMax", [magnitudes, last], {"keepdims": 1})
        least = constant(graph, "least_magnitude", np.array(1e-12, np.float32))
        return insert_before(graph, node, "Max", [largest, least])

    def _use_own_tables(self, graph: ir.Graph, parts: Mapping[str, Parts]) -> None:
        """Look embeddings up in the bundle's own precision, as its other graphs do: they are large, rows are few."""
        own = dataclasses.replace(self, integers=False)
        for node in list(graph):
            table = node.inputs[0] if is_op(node, "Gather") else None
            if table is None or str(table.name) not in parts:
                continue
            pieces = parts[str(table.name)]
            quantised = self.quantised.get(self._key(pieces))
            if quantised is not None:
                rows = self._quantised_rows(graph, node, quantised)
            else:
                self._set(table, own._float_tensor(pieces, table))
                rows = insert_before(graph, node, "Gather", node.inputs, {"axis": 0}, like=node.outputs[0])
            if own.dtype is not self.dtype:
                rows.type = ir.TensorType(own.dtype)
                rows = insert_before(graph, node, "Cast", [rows], {"to": self.dtype}, like=node.outputs[0])
            replace(graph, node, rows)

    # --- embeddings -------------------------------------------------------------------------------

    def _gather_quantised(self, graph: ir.Graph, node: ir.Node, weight: Quantised) -> None:
        replace(graph, node, self._quantised_rows(graph, node, weight))

    def _quantised_rows(self, graph: ir.Graph, node: ir.Node, weight: Quantised) -> ir.Value:
        flat = [weight.rows, int(np.prod(sizes(weight.blocks)[1:]))]
        data = self.file.store(str(weight.blocks.name), ir.DataType.UINT8, flat, lambda: np.zeros(0, np.uint8))
        inputs = [self._tensor(graph, data, "flat"), node.inputs[1], self._tensor(graph, weight.scales)]
        return insert_before(
            graph,
            node,
            "GatherBlockQuantized",
            inputs,
            domain=ORT,
            attributes=gather_attributes(weight),
            like=node.outputs[0],
        )

    def _tensor(self, graph: ir.Graph, tensor: ir.ExternalTensor, suffix: str = "") -> ir.Value:
        name = f"{tensor.name}{suffix}"
        if name not in graph.initializers:
            graph.initializers[name] = ir.Value(name=name)
            self._set(graph.initializers[name], tensor)
        return graph.initializers[name]

    def add(self, graph: ir.Graph, name: str, values: NDArray[np.generic], key: str) -> None:
        """Add an initializer that no node of this graph uses yet, in the bundle's float type."""
        graph.initializers[name] = ir.Value(name=name)
        reference = self.file.store(
            f"{key}:{self.dtype.name}", self.dtype, list(values.shape), lambda: values.astype(self.dtype.numpy())
        )
        self._set(graph.initializers[name], reference)

    # --- everything else --------------------------------------------------------------------------

    def _externalise(self, value: ir.Value) -> None:
        """Move a larger buffer (a rotary table, say) out of the graph, in the bundle's float type."""
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < INLINE_BYTES:
            return
        data = tensor.numpy()
        key = f"{value.name}:{hash(data.tobytes())}"
        self._set(value, self.file.store(key, tensor.dtype, [int(size) for size in data.shape], lambda: data))

    def _set(self, value: ir.Value, tensor: ir.ExternalTensor) -> None:
        value.const_value = tensor
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(list(tensor.shape))


def suits_integers(graph: ir.Graph, parameters: Mapping[str, Aliases]) -> bool:
    """Return whether all matrices of a normalised graph belong to linear layers or are looked up by rows."""
    matrices = [graph.initializers[name] for name in parameters if name in graph.initializers]
    readers = {use.node for value in matrices if len(sizes(value)) > 1 for use in value.uses()}
    return all(is_op(node, "Linear", DOMAIN) or is_op(node, "Gather") for node in readers)


def adjoining(tensors: Sequence[FileTensor]) -> FileTensor | None:
    """Return tensors that lie one behind the other in a file as one, joined along their first dimension."""
    whole = tensors[0]
    for tensor in tensors[1:]:
        if tensor.path != whole.path or tensor.offset != whole.offset + whole.length:
            return None
        shape = whole.shape[0] + tensor.shape[0], *whole.shape[1:]
        whole = dataclasses.replace(whole, length=whole.length + tensor.length, shape=shape)
    return whole


def link_weights(path: Path, folder: Path, name: str) -> None:
    """Make a checkpoint file part of the bundle under a name, without copying it where the file system can.

    A runtime reads only what lies inside the bundle, so symbolic links don't serve. A hard link does;
    across file systems the kernel copies.
    """
    folder.mkdir(exist_ok=True)
    real = path.resolve()
    try:
        os.link(real, folder / name)
    except OSError:
        shutil.copyfile(real, folder / name)
