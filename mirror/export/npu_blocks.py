"""A draft's weights in 4 bits for NPUs: each 16 inputs of an output share a scale, and rounding knows real text.

Rounding follows GPTQ (Frantar and others, arXiv 2210.17323): inputs are rounded in turn, and the ones still to come
make up for what was lost, as far as they go together in text. Products become `MatMulNBits`, whose other side stays in
floating point: nothing else of the graph changes, and no range is guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Feeds = Mapping[str, NDArray[Any]]
Floats = NDArray[np.float64]

BLOCK = 16
_LEAST, _MOST = -8, 7
# Shares of a block's largest weight that its scale may reach to; what lies past it is cut off.
_REACHES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_DAMPING = 0.01  # of the mean second moment: inputs that text hardly moves make up for nothing


@dataclass(frozen=True)
class Blocks:
    """A weight in whole numbers.

    Attributes:
        numbers: int8 [in, out], -8 to 7.
        scales: float32 [in / 16, out].
    """

    numbers: NDArray[np.int8]
    scales: NDArray[np.float32]

    @property
    def weight(self) -> NDArray[np.float32]:
        """What the numbers stand for, float32 [in, out]."""
        return self.numbers.astype(np.float32) * np.repeat(self.scales, BLOCK, axis=0)


def round_graphs(
    sources: Mapping[str, Path], targets: Mapping[str, Path], passes: Mapping[str, Sequence[Feeds]]
) -> None:
    """Write graphs like others, whose products with a weight take it in blocks; one that they share is rounded once.

    Weights whose inputs don't fill blocks stay as they are.

    Args:
        sources, targets: files by the same keys.
        passes: by the same keys, inputs of some passes over real text.
    """
    import onnx

    models = {name: onnx.load(path) for name, path in sources.items()}
    moments: dict[str, Floats] = {}
    weights: dict[str, NDArray[np.float32]] = {}
    for name, model in models.items():
        found = _weights(model)
        for key, seen in _moments(sources[name], model, passes[name]).items():
            digest = _digest(found[key])
            weights[digest] = found[key]
            moments[digest] = moments.get(digest, np.zeros_like(seen)) + seen
    rounded = {digest: round_weight(weight, moments[digest]) for digest, weight in weights.items()}
    for name, model in models.items():
        found = _weights(model)
        _replace(model, {key: rounded[_digest(weight)] for key, weight in found.items()})
        onnx.save(model, targets[name], save_as_external_data=True, location=f"{targets[name].name}.data")


def round_weight(weight: NDArray[np.float32], moments: Floats) -> Blocks:
    """Return a weight in blocks.

    Args:
        weight: float32 [in, out]; `in` is a multiple of 16.
        moments: [in, in], the sum over text of products of two inputs.

    Source: GPTQ, arXiv 2210.17323, algorithm 1.
    """
    factor, importance = _inverse_factor(moments), np.diag(moments)[:, None]
    left = weight.astype(np.float64)
    numbers = np.empty(weight.shape, np.int8)
    scales = np.empty((weight.shape[0] // BLOCK, weight.shape[1]), np.float32)
    for start in range(0, weight.shape[0], BLOCK):
        end = start + BLOCK
        scale = scales[start // BLOCK] = _best_scale(left[start:end], importance[start:end])
        lost = np.empty((BLOCK, weight.shape[1]))
        for row in range(start, end):
            numbers[row] = _nearest(left[row], scale)
            lost[row - start] = (left[row] - numbers[row] * scale) / factor[row, row]
            left[row + 1 : end] -= np.outer(factor[row, row + 1 : end], lost[row - start])
        left[end:] -= factor[start:end, end:].T @ lost
    return Blocks(numbers, scales)


def _inverse_factor(moments: Floats) -> Floats:
    """Return the upper Cholesky factor of the damped moments' inverse, [in, in]."""
    damped = moments + np.eye(moments.shape[0]) * (_DAMPING * np.diag(moments).mean() or 1.0)
    factor: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def _best_scale(block: Floats, importance: Floats) -> NDArray[np.float32]:
    """Return the scale of each output of a block `[16, out]` whose rounding loses least, float32 [out]."""
    largest = np.abs(block).max(axis=0)
    largest[largest == 0] = 1.0
    scales = np.array([(reach * largest / _MOST).astype(np.float32) for reach in _REACHES])
    losses = [((block - _nearest(block, scale) * scale) ** 2 * importance).sum(axis=0) for scale in scales]
    best: NDArray[np.float32] = scales[np.argmin(losses, axis=0), np.arange(block.shape[1])]
    return best


def _nearest(values: Floats, scale: NDArray[np.float32]) -> Floats:
    whole: Floats = np.clip(np.rint(values / scale), _LEAST, _MOST)
    return whole


# Graphs.


def _weights(model: onnx.ModelProto) -> dict[str, NDArray[np.float32]]:
    """Return the weights that products take and that fill blocks, float32 [in, out], by initializer."""
    from onnx import numpy_helper

    known = {item.name: item for item in model.graph.initializer}
    used = {node.input[1] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in known}
    return {name: numpy_helper.to_array(known[name]) for name in sorted(used) if known[name].dims[0] % BLOCK == 0}


def _digest(weight: NDArray[np.float32]) -> str:
    return hashlib.sha256(weight.tobytes()).hexdigest()


def _moments(path: Path, model: onnx.ModelProto, passes: Sequence[Feeds]) -> dict[str, Floats]:
    """Return, for each weight of `_weights`, the summed products `[in, in]` of what it is multiplied with."""
    weights = _weights(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    names = sorted({node.input[0] for node in products})
    sums = {name: np.zeros(()) for name in names}
    session = _session_with(path, names)
    for feeds in passes:
        for name, values in zip(names, session.run(names, dict(feeds)), strict=True):
            rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
            sums[name] = sums[name] + rows.T @ rows
    return {node.input[1]: sums[node.input[0]] for node in products}


def _session_with(path: Path, names: Sequence[str]) -> Any:
    """Return a session over a graph that gives some inner values too; the file beside it goes at once."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(path, load_external_data=False)
    given = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in given
    )
    beside = path.with_suffix(".watched.onnx")
    onnx.save(model, beside)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(beside, options, providers=["CPUExecutionProvider"])
    beside.unlink()
    return session


def _replace(model: onnx.ModelProto, rounded: Mapping[str, Blocks]) -> None:
    """Let products take weights in blocks."""
    from onnx import helper, numpy_helper

    for node in (node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in rounded):
        blocks, name = rounded[node.input[1]], node.input[1]
        rows, columns = blocks.numbers.shape
        node.CopyFrom(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{name}.blocks", f"{name}.scales"],
                list(node.output),
                name=node.name,
                domain="com.microsoft",
                K=rows,
                N=columns,
                bits=4,
                block_size=BLOCK,
            )
        )
    kept = [item for item in model.graph.initializer if item.name not in rounded]
    for name, blocks in rounded.items():
        kept.append(numpy_helper.from_array(_packed(blocks.numbers), f"{name}.blocks"))
        kept.append(numpy_helper.from_array(np.ascontiguousarray(blocks.scales.T), f"{name}.scales"))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if all(item.domain != "com.microsoft" for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _packed(numbers: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return int8 [in, out] as `MatMulNBits` reads it: uint8 [out, in / 16, 8], two numbers a byte, 8 for zero."""
    places = (numbers.T + 8).astype(np.uint8).reshape(numbers.shape[1], -1, BLOCK)
    return places[..., 0::2] | np.left_shift(places[..., 1::2], np.uint8(4))
