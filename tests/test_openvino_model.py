"""Graphs as OpenVINO gets them: the same function and edges, and no copy of the weights in each program."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

if importlib.util.find_spec("openvino") is None:
    pytest.skip('needs openvino: pip install "mirror-sd[openvino]"', allow_module_level=True)

from mirror.targets.openvino_model import read_model
from mirror.targets.openvino_package import ov

HIDDEN, INNER, SLOTS, HEAD_DIM = 512, 1024, 6, 64
FLOAT16, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
STATUS = Path("/proc/self/status")


def write_graph(folder: Path, inner: int = INNER, *, quantized: bool = False) -> Path:
    """Write a graph in float16: a product with a float32 output and one in float16, and a cache that is scaled."""
    numbers = np.random.default_rng(0)
    weights = (numbers.standard_normal((HIDDEN, inner)) / 16).astype(np.float16)
    initializers = {"scale": numbers.standard_normal((1, 1, 1, HEAD_DIM)).astype(np.float16)}
    nodes = []
    if quantized:
        initializers |= {"codes": numbers.integers(0, 255, weights.shape).astype(np.uint8), "step": np.float16(0.001)}
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "step"], ["weights"]))
    else:
        initializers["weights"] = weights
    nodes += [
        helper.make_node("MatMul", ["hidden_states", "weights"], ["product"]),
        helper.make_node("Cast", ["product"], ["logits"], to=FLOAT),
        helper.make_node("Cast", ["logits"], ["states"], to=FLOAT16),
        helper.make_node("Mul", ["past_key_values.0.key", "scale"], ["present.0.key"]),
    ]
    cache = [1, 1, SLOTS, HEAD_DIM]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("hidden_states", FLOAT16, [1, 3, HIDDEN]),
            helper.make_tensor_value_info("past_key_values.0.key", FLOAT16, cache),
        ],
        [
            helper.make_tensor_value_info("logits", FLOAT, [1, 3, inner]),
            helper.make_tensor_value_info("states", FLOAT16, [1, 3, inner]),
            helper.make_tensor_value_info("present.0.key", FLOAT16, cache),
        ],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in initializers.items()],
    )
    path = folder / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def types(model: Any) -> dict[str, str]:
    return {port.get_any_name(): port.get_element_type().to_string() for port in (*model.inputs, *model.outputs)}


def in_float16(model: Any) -> set[str]:
    """Return the kinds of operators that give float16."""
    return {
        node.get_type_name()
        for node in model.get_ops()
        for output in node.outputs()
        if output.get_element_type() == ov.Type.f16
    }


def compiled(model: Any) -> Any:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})


def computed(model: Any) -> dict[str, Any]:
    numbers, request = np.random.default_rng(1), compiled(model).create_infer_request()
    for name, shape in (("hidden_states", (1, 3, HIDDEN)), ("past_key_values.0.key", (1, 1, SLOTS, HEAD_DIM))):
        request.get_tensor(name).data[...] = numbers.standard_normal(shape).astype(np.float16)
    request.infer()
    return {name: request.get_tensor(name).data.copy() for name in ("logits", "states", "present.0.key")}


def test_a_graph_in_float16_computes_in_float32_on_its_own_weights(tmp_path: Path) -> None:
    path, core = write_graph(tmp_path), ov.Core()
    plain, read = core.read_model(path), read_model(core, path, "CPU")
    assert "MatMul" in in_float16(plain)
    assert in_float16(read) == {"Constant", "Parameter", "Convert", "Result"}
    kept = [node for node in read.get_ops() if node.get_type_name() == "Constant" and node.get_byte_size() > 4096]
    assert [node.get_element_type() for node in kept] == [ov.Type.f16]
    assert types(read) == types(plain)
    found, expected = computed(read), computed(plain)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-3, atol=2e-3)


def test_a_cache_in_another_type_changes_no_other_edge(tmp_path: Path) -> None:
    path, core = write_graph(tmp_path), ov.Core()
    for unit in ("CPU", "GPU"):
        read = types(read_model(core, path, unit, ov.Type.bf16))
        cache = {"past_key_values.0.key": "bf16", "present.0.key": "bf16"}
        assert read == types(core.read_model(path)) | cache


def test_other_units_and_quantized_weights_keep_their_graphs(tmp_path: Path) -> None:
    path, core = write_graph(tmp_path), ov.Core()
    assert "MatMul" in in_float16(read_model(core, path, "GPU"))
    path = write_graph(tmp_path, quantized=True)
    assert "MatMul" in in_float16(read_model(core, path, "CPU"))


@pytest.mark.skipif(not STATUS.is_file(), reason="reads what Linux says of this process")
def test_a_program_holds_no_weights_in_float32_but_those_that_it_packs(tmp_path: Path) -> None:
    inner = 32768
    read = read_model(ov.Core(), write_graph(tmp_path, inner), "CPU")
    programs, sizes = [], []
    for _ in range(3):
        programs.append(compiled(read))
        sizes.append(resident_bytes())
    packed = 4 * HIDDEN * inner
    assert sizes[2] - sizes[1] < 1.5 * packed  # with a copy in float32 it is twice


def resident_bytes() -> int:
    """Return the memory that this process has to itself."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
