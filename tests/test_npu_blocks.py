"""Weights in 4-bit blocks: what rounding loses where inputs go together, and the graphs that come out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mirror.export.npu_blocks import BLOCK, Blocks, round_graphs, round_weight

INPUTS, OUTPUTS = 2 * BLOCK, 48


def text_like(random: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Return inputs `[rows, INPUTS]` that go together: a few causes behind all of them."""
    causes = random.normal(size=(rows, 6)) @ np.random.default_rng(9).normal(size=(6, INPUTS))
    return (causes + 0.1 * random.normal(size=(rows, INPUTS))).astype(np.float32)


def lost(inputs: NDArray[np.float32], weight: NDArray[np.float32], blocks: Blocks) -> float:
    return float(np.square(inputs @ (blocks.weight - weight)).mean())


def test_rounding_makes_up_for_what_it_loses() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(INPUTS, OUTPUTS)).astype(np.float32)
    inputs = text_like(random, 500).astype(np.float64)
    knowing = round_weight(weight, inputs.T @ inputs)
    blind = round_weight(weight, np.eye(INPUTS))
    unseen = text_like(random, 100)
    assert lost(unseen, weight, knowing) < 0.5 * lost(unseen, weight, blind)
    assert np.abs(blind.weight - weight).mean() < 0.1


def test_what_fits_the_grid_comes_back() -> None:
    random = np.random.default_rng(1)
    numbers = random.integers(-7, 8, (INPUTS, OUTPUTS))
    numbers[::BLOCK] = 7
    weight = (numbers * 0.25).astype(np.float32)
    found = round_weight(weight, np.eye(INPUTS))
    np.testing.assert_array_equal(found.weight, weight)
    assert found.scales.shape == (2, OUTPUTS)


def test_a_column_of_zeros_and_unmoved_inputs_are_no_trouble() -> None:
    weight = np.zeros((INPUTS, 2), np.float32)
    weight[:, 1] = 1.0
    found = round_weight(weight, np.zeros((INPUTS, INPUTS)))
    np.testing.assert_allclose(found.weight, weight, atol=0.1)


def write_graph(path: Path, weights: dict[str, NDArray[np.float32]]) -> None:
    """Write `x -> x @ first -> sum over the second product`, with a weight in no blocks beside."""
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["hidden"], name="one"),
        helper.make_node("MatMul", ["hidden", "odd"], ["small"], name="two"),
        helper.make_node("MatMul", ["x", "hidden_t"], ["scores"], name="three"),
        helper.make_node("Transpose", ["hidden"], ["hidden_t"], perm=[0, 2, 1]),
    ]
    nodes = [nodes[0], nodes[1], nodes[3], nodes[2]]
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "rows", INPUTS])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("hidden", "small", "scores")]
    tensors = [numpy_helper.from_array(weight, name) for name, weight in weights.items()]
    graph = helper.make_graph(nodes, "products", [rows], outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    random = np.random.default_rng(2)
    first = random.normal(size=(INPUTS, INPUTS)).astype(np.float32)
    for name in ("draft", "draft_trunk"):  # they share one weight and differ in the other
        odd = random.normal(size=(INPUTS, 5)).astype(np.float32)
        write_graph(tmp_path / f"{name}.onnx", {"first": first, "odd": odd})
    return {name: tmp_path / f"{name}.onnx" for name in ("draft", "draft_trunk")}


def test_graphs_compute_with_the_rounded_weights(files: dict[str, Path], tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    passes = {name: [{"x": text_like(random, 40)[None]}] for name in files}
    targets = {name: tmp_path / f"{name}.int4.onnx" for name in files}
    round_graphs(files, targets, passes)
    x = text_like(random, 7)[None]
    found = {name: dict(zip(("hidden", "small"), run(path, x)[:2], strict=True)) for name, path in targets.items()}
    np.testing.assert_array_equal(found["draft"]["hidden"], found["draft_trunk"]["hidden"])
    original = dict(zip(files, (run(path, x) for path in files.values()), strict=True))
    error = np.abs(found["draft"]["hidden"] - original["draft"][0]).max()
    assert 0 < error < 0.1 * np.abs(original["draft"][0]).max()
    operators = [node.op_type for node in onnx.load(targets["draft"]).graph.node]
    assert sorted(operators) == ["MatMul", "MatMulNBits", "MatMulNBits", "Transpose"], (
        "two weights, one product of none"
    )
    assert not list(tmp_path.glob("*.watched.onnx"))


def run(path: Path, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(["hidden", "small", "scores"], {"x": x}))
