"""What segments take, read from their files, and the refusal of what does not fit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import mirror
from mirror.bundle import Form, LayerKV, Segment, read_manifest
from mirror.errors import DeviceError
from mirror.runtime.graph_count import stored_weights
from mirror.runtime.loading import Placement, draft_shapes, make_plan, memory_needs
from mirror.runtime.memory import SegmentMemory, check_room, segment_memory, slot_bytes
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.targets import free_memory, open_device
from mirror.targets.base import FreeMemory, PassShape, StoredWeights
from mirror.targets.cpu import CpuDevice
from mirror.targets.memory import HOST, _cgroup_bytes, _meminfo_bytes
from mirror.targets.names import Precision
from mirror.targets.openvino_settings import held_bytes
from tests.lookup import Lookup, LookupBundle, agreeing_table, random_table, write_bundle

GIB = 2**30
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason='needs openvino: pip install "mirror-sd[openvino]"'
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Lookup(random_table(1, 97, 23))
    draft = Lookup(agreeing_table(target.table, 0.8, 2))
    return write_bundle(tmp_path_factory.mktemp("memory") / "bundle", LookupBundle(target, draft))


def test_weights_inside_and_outside_of_a_file_are_counted(tmp_path: Path) -> None:
    inside = numpy_helper.from_array(np.ones((5, 7), np.float32), "inside")
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT16, dims=[300, 200])
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "4096"), ("length", "120000")):
        outside.external_data.add(key=key, value=value)
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "graph", [], [], [inside, outside])
    onnx.save(helper.make_model(graph, doc_string="a text of more than 127 bytes " * 9), tmp_path / "graph.onnx")
    assert stored_weights(tmp_path / "graph.onnx") == StoredWeights(5 * 7 * 4 + 120000, 0, 0, 0)


def test_matrices_of_products_are_told_from_other_weights(tmp_path: Path) -> None:
    """Turned on their way or not, and the quantized ones for themselves; an embedding is none, nor is a bias."""
    stored = {
        "embedding": np.ones((50, 8), np.float16),
        "turned": np.ones((6, 8), np.float16),
        "straight": np.ones((8, 5), np.float32),
        "bias": np.ones(5, np.float32),
        "codes": np.ones((3, 1, 16), np.uint8),
        "scales": np.ones(3, np.float16),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("Transpose", ["turned"], ["matrix"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "matrix"], ["y"]),
        helper.make_node("Gemm", ["x", "straight", "bias"], ["z"]),
        helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["w"], domain="com.microsoft", K=32, N=3, bits=4),
    ]
    weights = [numpy_helper.from_array(values, name) for name, values in stored.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], weights)), tmp_path / "graph.onnx")
    total = sum(values.nbytes for values in stored.values())
    assert stored_weights(tmp_path / "graph.onnx") == StoredWeights(total, 48 + 40, 96 + 160, 48 + 6)


DRAFT_SEGMENT = Segment("draft", (), {})


def test_each_compiled_program_holds_its_own_matrices() -> None:
    stored = StoredWeights(bytes=1000, matrix_numbers=200, matrix_bytes=400, quantized_bytes=100)
    assert held_bytes("CPU", stored, 1, Precision.BF16) == held_bytes("CPU", stored, 1, None) == 400 + 100
    assert held_bytes("CPU", stored, 3, Precision.F32) == 3 * (800 + 100)
    assert held_bytes("GPU.1", stored, 3, Precision.F16) == 500 + 3 * (400 + 100)
    assert CpuDevice().weight_bytes(DRAFT_SEGMENT, stored, [PassShape(1), PassShape(4)]) == 1000


@needs_openvino
def test_openvino_foresees_a_program_for_each_width_or_one_for_all() -> None:
    device = open_device("openvino:CPU:f32")
    shapes = [PassShape(1, 1), PassShape(4, 4), PassShape(4, 1)]
    few = StoredWeights(bytes=1000, matrix_numbers=200, matrix_bytes=400, quantized_bytes=0)
    assert device.weight_bytes(DRAFT_SEGMENT, few, shapes) == 2 * 800
    many = StoredWeights(bytes=GIB, matrix_numbers=200, matrix_bytes=400, quantized_bytes=0)
    assert device.weight_bytes(DRAFT_SEGMENT, many, shapes) == 800


@needs_openvino
def test_loading_foresees_what_programs_hold(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    plan = make_plan(manifest, EngineOptions(mode=Mode.MIRROR), shared_cpu=True)
    cpu, drafts = CpuDevice(), open_device("openvino:CPU:f32", background=True)
    needs = memory_needs(bundle, manifest, Placement(cpu, cpu, drafts), plan)
    found = {item.name: item.weight_bytes for item in needs["openvino:CPU"]}
    shapes = {"draft_trunk": [PassShape(plan.gamma + 1)], "draft": draft_shapes(plan, drafts.padded_width)}
    for name, passes in shapes.items():
        graph = manifest.segments[name].graphs[Form.ROWS]
        assert found[name] == drafts.weight_bytes(manifest.segments[name], stored_weights(bundle / graph.file), passes)


def test_a_slot_holds_a_key_and_a_value_in_each_layer() -> None:
    assert slot_bytes([LayerKV(0, 8, 128, "float16"), LayerKV(1, 4, 64, "float32")]) == 2 * (8 * 128 * 2 + 4 * 64 * 4)


def test_every_segment_of_a_bundle_has_its_memory(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    suffix = segment_memory(bundle, manifest.segments["target_suffix"], Form.INPLACE, 100)
    assert 97 * 23 * 4 <= suffix.weight_bytes < 98 * 24 * 4  # its table, and a few constants
    assert suffix.cache_bytes == 100 * 2 * 4
    assert suffix.bytes == suffix.weight_bytes + suffix.cache_bytes
    assert segment_memory(bundle, manifest.segments["exit_head"], Form.ROWS, 100).cache_bytes == 0


PREFIX, SUFFIX, DRAFT = SegmentMemory("p", 6 * GIB, GIB), SegmentMemory("s", 7 * GIB, GIB), SegmentMemory("d", GIB, 0)


def test_what_does_not_fit_is_refused_with_the_figures() -> None:
    def gpu(device: str) -> FreeMemory:
        return FreeMemory(device, 12 * GIB)

    said = r"cuda:0 has 12.00 GiB free, .* at least 15.00 GiB: p 6.00 GiB \+ 1.00 GiB of cache, s 7.00 GiB \+ 1.00 GiB"
    with pytest.raises(DeviceError, match=said):
        check_room({"cuda:0": [PREFIX, SUFFIX], "cuda:1": [DRAFT]}, gpu)
    check_room({"cuda:0": [PREFIX], "cuda:1": [SUFFIX, DRAFT]}, gpu)


def test_devices_that_share_a_memory_are_added_up() -> None:
    def host(device: str) -> FreeMemory:
        return FreeMemory("host memory", 15 * GIB)

    check_room({"cpu": [PREFIX, SUFFIX]}, host)
    with pytest.raises(
        DeviceError, match=r"host memory has 15.00 GiB free, these segments need at least 16.00 GiB: .*d 1.00"
    ):
        check_room({"cpu": [PREFIX, SUFFIX], "openvino:CPU": [DRAFT]}, host)


def test_nothing_is_refused_where_nobody_says() -> None:
    check_room({"openvino:GPU": [PREFIX, SUFFIX]}, lambda device: FreeMemory(device, None))


def test_loading_asks_the_devices(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def little(device: str) -> FreeMemory:
        asked.append(device)
        return FreeMemory("host memory", 9000)

    monkeypatch.setattr("mirror.targets.free_memory", little)
    with pytest.raises(DeviceError, match=r"host memory has 0.00 GiB free, these segments need at least"):
        mirror.load(bundle, mode="mirror")
    assert asked == ["cpu"]


def test_a_draft_that_is_not_loaded_needs_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(bundle)
    names = ("target_prefix", "exit_head", "target_suffix")
    target = sum(segment_memory(bundle, manifest.segments[name], Form.INPLACE, 68).bytes for name in names)
    monkeypatch.setattr("mirror.targets.free_memory", lambda device: FreeMemory("host memory", target))
    mirror.load(bundle, mode="plain").close()
    with pytest.raises(DeviceError, match="draft_trunk"):
        mirror.load(bundle, mode="serial")


def test_this_machine_tells_its_memory() -> None:
    found = free_memory("cpu")
    assert found.pool == free_memory("openvino:CPU:bf16").pool == free_memory("openvino:NPU").pool == HOST
    assert found.bytes is None or 2**20 < found.bytes < 2**50
    assert free_memory("cuda:0").pool == "cuda:0"


def test_limits_of_a_container_count(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert _cgroup_bytes(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_bytes(tmp_path) is None
    assert _cgroup_bytes(tmp_path / "nowhere") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert _meminfo_bytes(tmp_path / "meminfo") == 7 * 1024
