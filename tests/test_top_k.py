"""Greatest logits by blocks: what TopK and ArgMax would have found."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mirror.export.cut import _likeliest
from mirror.export.emit import Emitter
from mirror.export.top_k import BLOCK, first_greatest, first_greatest_plainly, greatest

SIZES = [1, 97, 15 * BLOCK, 16 * BLOCK, 16 * BLOCK + 1, 50257, 151936]


def _session(size: int, count: int | None) -> ort.InferenceSession:
    numbers = ir.Value(name="numbers", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", size]))
    graph = ir.Graph([numbers], [], nodes=[], opset_imports={"": 23}, name="top")
    emit = Emitter(graph, numbers)
    found = [first_greatest(emit, numbers, size)] if count is None else list(greatest(emit, numbers, size, count))
    for value, name in zip(found, ("places",) if count is None else ("values", "places"), strict=True):
        value.name = name
        dtype = ir.DataType.FLOAT if name == "values" else ir.DataType.INT64
        value.type, value.shape = ir.TensorType(dtype), ir.Shape([1, "rows", *([] if count is None else [count])])
        graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 9, 65, 200])
def test_the_greatest_come_in_falling_order_with_their_places(size: int, count: int) -> None:
    if count > size:
        pytest.skip("there aren't so many")
    numbers = np.random.default_rng(size).standard_normal((1, 3, size), np.float32)
    numbers[0, 1] *= -1e30  # far below and above what padding must stay under
    values, places = _session(size, count).run(["values", "places"], {"numbers": numbers})
    expected = np.argsort(-numbers, axis=-1, kind="stable")[..., :count]
    assert np.array_equal(places, expected)
    assert np.array_equal(values, np.take_along_axis(numbers, expected, -1))


@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_equals_is_the_greatest(size: int) -> None:
    """Greedy drafts must not depend on the order in which blocks are looked at."""
    numbers = np.random.default_rng(size).integers(-9, 3, (1, 7, size)).astype(np.float32)
    (places,) = _session(size, None).run(["places"], {"numbers": numbers})
    assert np.array_equal(places, numbers.argmax(-1))


@pytest.mark.parametrize("size", SIZES)
def test_the_plain_form_finds_the_same(size: int) -> None:
    """Ties in a block, between blocks and between rows: many equal numbers of few values."""
    numbers = ir.Value(name="numbers", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "rows", size]))
    graph = ir.Graph([numbers], [], nodes=[], opset_imports={"": 23}, name="top")
    places = first_greatest_plainly(Emitter(graph, numbers), numbers, size)
    places.name, places.type, places.shape = "places", ir.TensorType(ir.DataType.INT32), ir.Shape([1, "rows"])
    graph.outputs.append(places)
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    random = np.random.default_rng(size)
    for values in (random.integers(-9, 3, (1, 7, size)), random.standard_normal((1, 7, size)) * 1e30):
        given = values.astype(np.float32)
        (found,) = session.run(["places"], {"numbers": given})
        assert np.array_equal(found, given.argmax(-1))


def test_many_equals_are_all_greatest() -> None:
    numbers = np.zeros((1, 2, 50257), np.float32)
    values, places = _session(50257, 9).run(["values", "places"], {"numbers": numbers})
    assert not values.any()
    assert all(len(set(row)) == 9 and max(row) < 50257 for row in places[0].tolist())


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_a_row_whose_greatest_logit_is_no_finite_number_names_no_token(dtype: ir.DataType) -> None:
    size = 20 * BLOCK
    logits = ir.Value(name="given", type=ir.TensorType(dtype), shape=ir.Shape([1, "rows", size]))
    graph = ir.Graph([logits], [], nodes=[], opset_imports={"": 23}, name="likeliest")
    graph.outputs.extend(_likeliest(Emitter(graph, logits), logits)[1:])
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    numbers = np.random.default_rng(0).standard_normal((1, 5, size)).astype(dtype.numpy())
    numbers[0, 1], numbers[0, 2, 7], numbers[0, 3] = np.nan, np.inf, -np.inf
    numbers[0, 4], numbers[0, 4, 11] = -np.inf, -3
    (tokens,) = session.run(["token_ids"], {"given": numbers})
    assert tokens.tolist() == [[int(numbers[0, 0].argmax()), -1, -1, -1, 11]]
