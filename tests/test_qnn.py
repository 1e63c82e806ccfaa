"""The Hexagon NPU's emulator against ONNX Runtime's CPU on one graph, and mirror mode with a draft on it.

The emulator computes in float16, as the NPU does, so numbers are compared loosely and choices exactly.
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mirror.bundle import Form, Graph, Segment, TensorSpec
from mirror.errors import DeviceError
from mirror.targets import list_devices, open_device, parse_device_name
from mirror.targets.base import Device, LoadRequest, PassShape, to_host
from mirror.targets.cpu import CpuDevice
from mirror.targets.hexagon import Chip, chip
from mirror.targets.names import DeviceFamily, DeviceName
from tests.rows_graph import write_segment

needs_emulator = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None or platform.machine() not in ("x86_64", "AMD64"),
    reason='needs onnxruntime-qnn on x86-64: pip install "mirror-sd[qnn]"',
)

CAPACITY, WIDTH = 16, 4
TOLERANCE = 0.1  # float16, logits up to 11; a wrong slot or branch moves them by more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def segment(folder: Path) -> Segment:
    return write_segment(folder)


class Line:
    """A loaded segment and its cache, fed by tokens in one line."""

    def __init__(self, device: Device, folder: Path, segment: Segment) -> None:
        shapes = [PassShape(WIDTH)]
        self.loaded = device.load_segment(LoadRequest(folder, segment, shapes, CAPACITY, 1))
        self.cache = device.make_cache(segment.kv, CAPACITY)

    def run(self, tokens: Sequence[int], past: int, branches: Sequence[int], rows: int) -> Mapping[str, NDArray[Any]]:
        slots = np.full(CAPACITY, -1, np.int32)
        slots[past : past + WIDTH] = np.maximum(branches, -1)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "position_ids": past + np.arange(WIDTH)[None],
            "logit_rows": np.arange(rows),
            "past_length": np.array([past], np.int32),
            "row_visible": np.where(np.array(branches) >= 0, past, past + np.arange(WIDTH) + 1).astype(np.int32),
            "row_branch": np.array(branches, np.int32),
            "slot_branch": slots,
        }
        outputs = self.loaded.run(feeds, self.cache, past)
        return {name: np.array(to_host(tensor)) for name, tensor in outputs.items()}


@needs_emulator
def test_passes_compute_what_the_cpu_computes(folder: Path, segment: Segment) -> None:
    npu, cpu = (Line(device, folder, segment) for device in (open_device("qnn:htp"), CpuDevice(Form.ROWS)))
    assert npu.loaded.widths == (WIDTH,)
    random = np.random.default_rng(3)
    for past, branches, rows in ((0, [-2] * WIDTH, WIDTH), (WIDTH, [0, 0, 1, 1], 2), (2 * WIDTH, [-2] * WIDTH, WIDTH)):
        tokens = random.integers(0, 96, WIDTH).tolist()
        found, expected = npu.run(tokens, past, branches, rows), cpu.run(tokens, past, branches, rows)
        assert found["logits"].shape == expected["logits"].shape
        np.testing.assert_allclose(found["logits"], expected["logits"], atol=TOLERANCE)
        np.testing.assert_allclose(found["hidden_states"], expected["hidden_states"], atol=TOLERANCE)
        chosen = np.take_along_axis(expected["logits"][0], found["token_ids"][0, :rows, None], axis=1)
        assert (expected["logits"][0].max(axis=1, keepdims=True) - chosen < TOLERANCE).all(), "not a likeliest token"
    with pytest.raises(DeviceError, match=r"compiled for widths \(4,\), asked for 2"):
        npu.loaded.run({"input_ids": np.zeros((1, 2), np.int64)}, npu.cache, 0)


@needs_emulator
def test_the_emulator_is_named_as_such() -> None:
    assert open_device("qnn:htp").name == open_device("qnn:emulator").name == "qnn:emulator"
    (listed,) = [device for device in list_devices() if device.name.startswith("qnn")]
    assert (listed.name, listed.available, listed.segments) == ("qnn:emulator", True, "draft")
    assert "emulated" in listed.description


@needs_emulator
def test_npu_takes_an_npu_and_never_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match=r"no NPU.*openvino:NPU: .*qnn:emulator can check"):
        open_device("npu")
    monkeypatch.setattr("mirror.targets.npu_name", lambda: "qnn:htp")
    assert open_device("NPU").name == "qnn:emulator"


@needs_emulator
@pytest.mark.parametrize("name", ["v75", "v81"])
def test_other_architectures_compile_and_run(folder: Path, segment: Segment, name: str) -> None:
    line = Line(open_device(f"qnn:htp:{name}"), folder, segment)
    assert line.run([1, 2, 3, 4], 0, [-2] * WIDTH, WIDTH)["token_ids"].shape == (1, WIDTH)


def _odd_segment(folder: Path) -> Segment:
    """Write a graph with a node that the NPU's compiler refuses and one that the provider doesn't know."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["token_ids"], name="look_up"),
        helper.make_node("Cast", ["input_ids"], ["floats"], name="as_floats", to=TensorProto.FLOAT),
        helper.make_node("NonZero", ["floats"], ["places"], name="where_are_they"),
        helper.make_node("ReduceSum", ["places"], ["sum"], name="sum_up", keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "width"])],
        [
            helper.make_tensor_value_info("token_ids", TensorProto.INT64, [1, "width"]),
            helper.make_tensor_value_info("sum", TensorProto.INT64, []),
        ],
        [numpy_helper.from_array(np.arange(9), "table")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "odd.rows.onnx"
    )
    ids = TensorSpec("input_ids", "int64", (1, "width"))
    return Segment(
        "odd", (), {Form.ROWS: Graph("odd.rows.onnx", (ids,), (TensorSpec("token_ids", "int64", ids.shape),))}
    )


@needs_emulator
def test_a_graph_that_does_not_fit_whole_is_refused_node_by_node(tmp_path: Path) -> None:
    segment = _odd_segment(tmp_path)
    with pytest.raises(DeviceError) as caught:
        open_device("qnn:htp").load_segment(LoadRequest(tmp_path, segment, [PassShape(2)], 4, 1))
    said = str(caught.value)
    assert "qnn:emulator can't take odd.rows.onnx whole" in said
    assert "Gather look_up (its compiler refused it, error 3110)" in said
    assert "NonZero where_are_they (no form of it on the NPU)" in said


@needs_emulator
def test_a_file_that_is_no_graph_is_refused_with_what_the_runtime_says(folder: Path, tmp_path: Path) -> None:
    segment = write_segment(tmp_path)
    (tmp_path / segment.graphs[Form.ROWS].file).write_bytes(b"not a graph")
    with pytest.raises(DeviceError, match=r"qnn:emulator can't load tiny\.rows\.onnx: "):
        open_device("qnn:htp").load_segment(LoadRequest(tmp_path, segment, [PassShape(2)], 4, 1))


@needs_emulator
def test_a_bundle_without_rows_form_is_refused(folder: Path, segment: Segment) -> None:
    other = Segment("tiny", segment.kv, {Form.INPLACE: segment.graphs[Form.ROWS]})
    with pytest.raises(DeviceError, match="qnn:emulator needs tiny in rows form and the bundle has inplace"):
        open_device("qnn:htp").load_segment(LoadRequest(folder, other, [PassShape(2)], 4, 1))


@needs_emulator
def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime_qnn" else find(name))
    with pytest.raises(DeviceError, match=r'onnxruntime-qnn is not installed; run: pip install "mirror-sd\[qnn\]"'):
        open_device("qnn:htp")
    (listed,) = [device for device in list_devices() if device.name.startswith("qnn")]
    assert not listed.available


@needs_emulator
def test_a_package_without_its_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirror.targets.qnn.backend_path", lambda: "/nowhere/libQnnHtp.so")
    with pytest.raises(DeviceError, match=r"libQnnHtp\.so is not in the package onnxruntime-qnn; reinstall"):
        open_device("qnn:htp")


@needs_emulator
def test_a_snapdragon_without_a_driver_and_a_pc_that_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirror.targets.qnn.registered_device", lambda: None)
    with pytest.raises(DeviceError, match="lists no Hexagon NPU on this machine"):
        open_device("qnn:htp")
    monkeypatch.undo()
    monkeypatch.setattr("mirror.targets.qnn.is_emulated", lambda: False)
    with pytest.raises(DeviceError, match="only x86-64 machines have it"):
        open_device("qnn:emulator")
    assert open_device("qnn:htp").name == "qnn:htp"


def test_names_and_chips() -> None:
    assert parse_device_name("qnn:HTP") == DeviceName(DeviceFamily.QNN, "htp")
    assert parse_device_name("qnn:htp:V75") == DeviceName(DeviceFamily.QNN, "htp", chip="v75")
    assert str(parse_device_name("qnn:htp:v73.43")) == "qnn:htp"
    assert chip("v73").options == {"htp_arch": "73", "soc_model": "60"}
    assert chip("v68.30") == Chip("v68", 30)
    with pytest.raises(DeviceError, match=r"architecture v68 is known here, only v73, v75.*as in v68\.60"):
        chip("v68")
    with pytest.raises(DeviceError, match="asks for chip '75'; write its architecture, as in qnn:htp:v73"):
        parse_device_name("qnn:htp:75")
    with pytest.raises(DeviceError, match="doesn't say which qnn device"):
        parse_device_name("qnn:gpu")


@needs_emulator
def test_loading_says_nothing_where_all_is_well(
    folder: Path, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="mirror"):
        Line(open_device("qnn:htp"), folder, segment)
    assert caplog.messages == []
