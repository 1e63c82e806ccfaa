"""What a draft's pass makes of its small inputs: what is named so, and that it computes what it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from mirror.bundle import Form
from mirror.export.draft_inputs import STREAMS, extend_embedding
from mirror.export.emit import Emitter
from mirror.export.lower import finish
from mirror.export.masks import Masks
from mirror.export.pass_inputs import name_pass_inputs
from mirror.targets import cuda
from mirror.targets.kernel_library import LIBRARY

VOCABULARY, WIDTH, CAPACITY = 10, 24, 40
Inputs = dict[str, NDArray[Any]]


def mask_model(window: int = 0, dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    """Return a graph whose `y` is the mask of a draft's pass."""
    graph = ir.Graph([], [], nodes=[], name="mask", opset_imports={"": 21})
    size = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, "width"]))
    emit = Emitter(graph, size)
    mask = Masks(emit, Form.INPLACE, True, dtype).get(window)
    assert mask is not None
    y = emit.op("Identity", [mask])
    y.name, y.type = "y", ir.TensorType(dtype)
    graph.outputs.append(y)
    return finish(graph, "mask")


def embedding_model(dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    """Return a graph whose `y` are the rows that a draft with two streams reads."""
    generator = np.random.default_rng(0)
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1, "width"]))
    tensors = {}
    for name, rows in (("embedding", VOCABULARY), (STREAMS, 2)):
        array = generator.standard_normal((rows, WIDTH), np.float32).astype(dtype.numpy())
        tensors[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name)
        )
    lookup = ir.node("Gather", [tensors["embedding"], ids], {"axis": 0})
    lookup.outputs[0].type, lookup.outputs[0].shape = ir.TensorType(dtype), ir.Shape([1, "width", WIDTH])
    read = ir.node("Neg", [lookup.outputs[0]])
    y = read.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), ir.Shape([1, "width", WIDTH])
    nodes, opsets = [lookup, read], {"": 21}
    graph = ir.Graph(
        [ids], [y], nodes=nodes, initializers=[tensors["embedding"]], name="embedding", opset_imports=opsets
    )
    source = ir.Graph([], [], nodes=[], initializers=[tensors[STREAMS]], name="source", opset_imports=opsets)
    extend_embedding(source, graph, 1e-5)
    return finish(graph, "embedding")


def inputs_of(made: ir.Model, rows: int, total: int) -> Inputs:
    """Return random inputs of a pass."""
    generator = np.random.default_rng(rows)
    known: Inputs = {
        "input_ids": generator.integers(0, VOCABULARY + 2, (1, rows)),
        "total_sequence_length": np.array(total, np.int32),
        "slot_branch": generator.integers(-1, 3, CAPACITY).astype(np.int32),
        "row_visible": generator.integers(0, total + 1, rows).astype(np.int32),
        "row_branch": generator.integers(-2, 3, rows).astype(np.int32),
        "position_ids": generator.integers(0, total, (1, rows)),
    }
    return {str(value.name): known[str(value.name)] for value in made.graph.inputs}


def kinds(made: ir.Model) -> list[str]:
    """Return the operators of a graph, in order."""
    return [node.op_type for node in made.graph]


def computed(made: ir.Model, given: Inputs, library: str = "", provider: str = "CPUExecutionProvider") -> NDArray[Any]:
    """Return y, by ONNX Runtime and, if a library is given, the operators that it has."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library)
    model = ir.serde.serialize_model(made).SerializeToString()
    found: NDArray[Any] = ort.InferenceSession(model, options, providers=[provider]).run(["y"], given)[0]
    return found


@pytest.mark.parametrize(
    ("make", "name", "left"),
    [(mask_model, "BranchMask", []), (embedding_model, "StreamEmbedding", ["Min", "Gather"])],
    ids=["mask", "embedding"],
)
def test_they_are_one_node_and_give_the_same(make: Any, name: str, left: list[str]) -> None:
    before, named = make(), make()
    name_pass_inputs(named)
    assert kinds(named)[:-1] == [*left, name]
    for rows, total in ((1, 1), (3, 17), (8, CAPACITY)):
        given = inputs_of(before, rows, total)
        np.testing.assert_array_equal(computed(named, given), computed(before, given))


def test_others_stay_as_they_are() -> None:
    for made in (mask_model(5), mask_model(0, ir.DataType.FLOAT), embedding_model(ir.DataType.FLOAT)):
        before = kinds(made)
        name_pass_inputs(made)
        assert kinds(made) == before
        assert not made.functions


def test_what_others_read_too_stays() -> None:
    made = mask_model()
    slots = next(node for node in made.graph if node.op_type == "Range").outputs[0]
    slots.name, slots.type = "slots", ir.TensorType(ir.DataType.INT32)
    made.graph.outputs.append(slots)
    name_pass_inputs(made)
    assert sorted(kinds(made)) == ["BranchMask", "Identity", "Range"]


@pytest.mark.gpu
@pytest.mark.parametrize("make", [mask_model, embedding_model], ids=["mask", "embedding"])
def test_the_kernels_give_the_same(make: Any) -> None:
    if reason := cuda.cuda_missing():
        pytest.skip(reason)
    ort.preload_dlls()
    before, named = make(), make()
    name_pass_inputs(named)
    for rows, total in ((1, 1), (3, 17), (300, CAPACITY)):
        given = inputs_of(before, rows, total)
        ours = computed(named, given, str(LIBRARY), cuda.PROVIDER)
        np.testing.assert_array_equal(ours, computed(before, given))
