"""Products that our kernels have: what is named so, and that it computes what it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from mirror.bundle import Form, read_manifest
from mirror.export.build import ExportOptions, export_bundle
from mirror.export.products import name_products
from mirror.runtime.graph_count import count_graph, stored_weights
from tests.families import make_checkpoint

INNER, WIDTH = 24, 64
X = (0.3 * np.random.default_rng(0).standard_normal((1, 3, WIDTH))).astype(np.float16)


def gate(first: str = "gate", second: str = "up", *, sizes: Sequence[int] = ()) -> list[NodeProto]:
    """Return the nodes that make y of p's halves; `sizes` are those that Split is told."""
    split = helper.make_node("Split", ["p", "sizes"] if sizes else ["p"], ["gate", "up"], axis=-1)
    if not sizes:
        split.attribute.append(helper.make_attribute("num_outputs", 2))
    return [
        split,
        helper.make_node("Sigmoid", [first], ["open"]),
        helper.make_node("Mul", [first, "open"], ["silu"]),
        helper.make_node("Mul", [second, "silu"], ["y"]),
    ]


def model(
    nodes: Sequence[NodeProto], *, also: Sequence[str] = (), halves: bool = True, sizes: Sequence[int] = ()
) -> ir.Model:
    """Return a graph that multiplies x and goes on with p; `also` are further outputs."""
    kind, number = (TensorProto.FLOAT16, np.float16) if halves else (TensorProto.FLOAT, np.float32)
    weights = (0.1 * np.random.default_rng(1).standard_normal((2 * INNER, WIDTH))).astype(number)
    tensors = [helper.make_tensor("w", kind, weights.shape, weights.tobytes(), raw=True)]
    if sizes:
        tensors.append(helper.make_tensor("sizes", TensorProto.INT64, [2], list(sizes)))
    product = helper.make_node("FusedMatMul", ["x", "w"], ["p"], domain="com.microsoft", transB=1, alpha=1.0)
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in ("y", *also)]
    x = helper.make_tensor_value_info("x", kind, [1, "rows", WIDTH])
    products = [helper.make_tensor_value_info("p", kind, None)]
    graph = helper.make_graph([product, *nodes], "gated", [x], outputs, tensors, value_info=products)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made: ir.Model = ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    return made


def kinds(made: ir.Model) -> list[str]:
    """Return the operators of a graph, in order."""
    return [node.op_type for node in made.graph]


def computed(made: ir.Model) -> NDArray[np.float16]:
    """Return y for X, by ONNX Runtime's CPU."""
    proto: ModelProto = ir.serde.serialize_model(made)
    found: NDArray[np.float16] = ort.InferenceSession(proto.SerializeToString()).run(["y"], {"x": X})[0]
    return found


@pytest.mark.parametrize("sizes", [(), (INNER, INNER)])
def test_a_gated_product_is_one_node_and_gives_the_same(sizes: tuple[int, ...]) -> None:
    made = model(gate(sizes=sizes), sizes=sizes)
    before = computed(made)
    name_products(made)
    assert kinds(made) == ["GatedFusedMatMul"]
    assert [value.name for value in made.graph.outputs] == ["y"]
    np.testing.assert_array_equal(computed(made), before)


def test_other_graphs_stay_as_they_are() -> None:
    left = [
        model(gate("up", "gate")),  # the second half is the gate
        model(gate("gate", "gate")),
        model(gate(), halves=False),
        model(gate(sizes=(INNER + 4, INNER - 4)), sizes=(INNER + 4, INNER - 4)),
        *(model(gate(), also=[name]) for name in ("p", "gate", "up", "open", "silu")),
        model([*gate(), helper.make_node("Neg", ["up"], ["z"])], also=["z"]),
    ]
    for made in left:
        before = kinds(made)
        name_products(made)
        assert [kind.removeprefix("Small") for kind in kinds(made)] == before
        assert not any(name.startswith("Gated") for _, name, _ in made.functions)


def test_a_small_product_is_named_with_its_sizes_and_gives_the_same() -> None:
    made = model([helper.make_node("Neg", ["p"], ["y"])])
    before = computed(made)
    name_products(made)
    assert kinds(made) == ["SmallFusedMatMul", "Neg"]
    sizes = {name: made.graph[0].attributes[name].as_int() for name in ("N", "K")}
    assert sizes == {"N": 2 * INNER, "K": WIDTH}
    np.testing.assert_array_equal(computed(made), before)


def test_other_products_keep_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned_otherwise(made: ir.Model) -> ir.Model:
        made.graph[0].attributes["transA"] = ir.AttrInt64("transA", 1)
        return made

    def of_an_unknown_matrix(made: ir.Model) -> ir.Model:
        made.graph.inputs.append(made.graph.initializers.pop("w"))
        return made

    plain = [helper.make_node("Neg", ["p"], ["y"])]
    left = [model(plain, halves=False), turned_otherwise(model(plain)), of_an_unknown_matrix(model(plain))]
    for limit, others in ((2 * INNER * WIDTH, left), (2 * INNER * WIDTH - 1, [model(plain)])):
        monkeypatch.setattr("mirror.export.products.SMALL_MATRIX", limit)
        for made in others:
            name_products(made)
            assert kinds(made) == ["FusedMatMul", "Neg"]
    monkeypatch.setattr("mirror.export.products.SMALL_MATRIX", 2 * INNER * WIDTH)
    name_products(made := model(plain))
    assert kinds(made) == ["SmallFusedMatMul", "Neg"]


@pytest.mark.parametrize("precision", ["fp32", "int4", "fp16", "bf16", "int8-fp16", "int4-fp16"])
def test_graphs_of_gpus_have_them(precision: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint")
    options = ExportOptions(
        exit_layer="1", precision=precision, draft="layers:0,1", max_length=64, allow_failed_check=True
    )
    export_bundle(str(checkpoint), tmp_path / "bundle", options)
    name = {"fp16": "GatedFusedMatMul", "int8-fp16": "GatedMatMulNBits", "int4-fp16": "GatedMatMulNBits"}.get(precision)
    for segment, facts in read_manifest(tmp_path / "bundle").segments.items():
        counts = {}
        for form, graph in facts.graphs.items():
            path = tmp_path / "bundle" / graph.file
            operators = kinds(ir.load(path))
            wanted = name is not None and form is Form.INPLACE and segment != "exit_head"
            assert {kind for kind in operators if kind.startswith("Gated")} == ({name} if wanted else set()), segment
            small = precision == "fp16" and form is Form.INPLACE
            assert ("SmallFusedMatMul" in operators) == small, segment
            assert not (small and "FusedMatMul" in operators), segment
            counts[form] = count_graph(path), stored_weights(path)
        # What the plan and the memory check count is there in both forms.
        if len(counts) == 2 and precision in ("fp16", "int4-fp16"):
            inplace, rows = (counts[form][0].products for form in (Form.INPLACE, Form.ROWS))
            assert sorted((item.matrices, item.precision) for item in inplace) == sorted(
                (item.matrices, item.precision) for item in rows
            )
