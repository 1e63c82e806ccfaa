"""Segments and caches on ONNX Runtime: slots, bindings, and what a refused pass says."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from mirror.bundle import Form, Graph, LayerKV, Segment, TensorSpec, read_manifest
from mirror.errors import DeviceError
from mirror.runtime.feeds import FeedPool
from mirror.targets.base import LoadRequest, PassShape, to_host
from mirror.targets.cpu import CpuDevice
from mirror.targets.onnxruntime_session import (
    Buffer,
    Memory,
    OnnxRuntimeCache,
    OnnxRuntimeDevice,
    OnnxRuntimeSegment,
    Provider,
    make_buffer,
)
from mirror.targets.openvino_plugin import FedSegment
from tests.lookup import Lookup, LookupBundle, random_table, write_bundle
from tests.streams import FakeStream, streamed

CAPACITY = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Lookup(random_table(1, 31, 11))
    return write_bundle(tmp_path_factory.mktemp("session") / "b", LookupBundle(target, target))


@pytest.mark.parametrize("form", list(Form))
def test_rows_land_in_their_slots_and_nowhere_else(bundle: Path, form: Form) -> None:
    device = CpuDevice(form)
    segment = read_manifest(bundle).segments["target_prefix"]
    loaded = device.load_segment(LoadRequest(bundle, segment, [PassShape(3)], CAPACITY, 1))
    cache = device.make_cache(segment.kv, CAPACITY)
    buffer = cache.buffers["past_key_values.0.key"].array
    assert buffer is not None
    buffer[:] = -5
    pool = FeedPool(CAPACITY, 100)
    feeds = pool.at(3)
    feeds.fill_causal(np.array([4, 5, 6]), 2)
    loaded.run(feeds.tensors, cache, 2)
    expected = np.full(CAPACITY, -5.0)
    expected[2:5] = [4 * 3, 5 * 4, 6 * 5]  # id * (1 + position % 7)
    assert buffer[0, 0, :, 0].tolist() == expected.tolist()


def test_both_forms_compute_the_same(bundle: Path) -> None:
    outputs = []
    for form in Form:
        device = CpuDevice(form)
        segment = read_manifest(bundle).segments["draft"]
        loaded = device.load_segment(LoadRequest(bundle, segment, [PassShape(1), PassShape(3)], CAPACITY, 1))
        cache = device.make_cache(segment.kv, CAPACITY)
        pool, tokens = FeedPool(CAPACITY, 100), []
        for past, ids in ((0, [1, 2, 3]), (3, [4]), (2, [9, 9, 9])):
            feeds = pool.at(len(ids))
            feeds.fill_causal(np.array(ids), past)
            tokens.append(
                np.array(
                    loaded.run({**feeds.tensors, "logit_rows": np.arange(len(ids))}, cache, past)["token_ids"]
                ).tolist()
            )
        outputs.append(tokens)
    assert outputs[0] == outputs[1]


def test_device_tensors_are_bound_as_they_are(tmp_path: Path) -> None:
    """bfloat16 has no numpy form, so such a state can only pass from graph to graph by its buffer."""
    spec = (TensorSpec("hidden_states", "bfloat16", (1, "width", 2)),)
    names = [_cast_graph(tmp_path, "give", "float32", "bfloat16"), _cast_graph(tmp_path, "take", "bfloat16", "float32")]
    floats = TensorSpec("position_ids", "float32", (1, "width"))
    give = _load(tmp_path, Graph(names[0], (floats,), spec))
    take = _load(tmp_path, Graph(names[1], (TensorSpec("hidden_states", "bfloat16", (1, "width")),), (floats,)))
    for values in ([[1.0, 2.0]], [[3.0, -4.0]]):
        positions = np.array(values, np.float32)
        state = make_buffer(Memory(), "bfloat16", (1, 2))
        assert state.array is None
        out = give.run({"position_ids": positions}, None, 0)["hidden_states"]
        assert isinstance(out, Buffer)
        back = take.run({"position_ids": positions, "hidden_states": out}, None, 0)["position_ids"]
        assert np.array_equal(back, positions)  # type: ignore[arg-type]


def _cast_graph(folder: Path, name: str, source: str, target: str) -> str:
    types = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}
    ends = {"float32": "position_ids", "bfloat16": "hidden_states"}
    graph = helper.make_graph(
        [helper.make_node("Cast", [ends[source]], [ends[target]], to=types[target])],
        name,
        [helper.make_tensor_value_info(ends[source], types[source], [1, "width"])],
        [helper.make_tensor_value_info(ends[target], types[target], [1, "width"])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / f"{name}.onnx"
    )
    return f"{name}.onnx"


def _load(folder: Path, graph: Graph) -> "object":
    if graph.outputs[0].name == "hidden_states":
        graph = Graph(graph.file, graph.inputs, (TensorSpec("hidden_states", "bfloat16", (1, "width")),))
    segment = Segment("target_prefix", (), {Form.INPLACE: graph})
    return CpuDevice().load_segment(LoadRequest(folder, segment, [PassShape(2)], 1, 1))


def test_bindings_of_many_widths_do_not_pile_up(bundle: Path) -> None:
    segment = read_manifest(bundle).segments["target_prefix"]
    loaded = CpuDevice().load_segment(LoadRequest(bundle, segment, [PassShape(1)], 200, 1))
    cache = CpuDevice().make_cache(segment.kv, 200)
    pool = FeedPool(200, 300)
    for width in range(1, 140):
        feeds = pool.at(width)
        feeds.fill_causal(np.arange(width) % 11, 0)
        loaded.run(feeds.tensors, cache, 0)
    assert len(loaded._bound) == 128


def test_a_cache_of_another_device_is_refused(bundle: Path) -> None:
    segment = read_manifest(bundle).segments["target_prefix"]
    loaded = CpuDevice().load_segment(LoadRequest(bundle, segment, [PassShape(1)], CAPACITY, 1))
    feeds = FeedPool(CAPACITY, 100).at(1)
    feeds.fill_causal(np.array([1]), 0)
    with pytest.raises(DeviceError, match="target_prefix keeps a KV cache"):
        loaded.run(feeds.tensors, None, 0)


def test_a_provider_that_is_not_there_is_an_error_and_no_cpu_in_its_place(bundle: Path) -> None:
    device = OnnxRuntimeDevice("nowhere:0", Provider("NowhereExecutionProvider"))
    segment = read_manifest(bundle).segments["exit_head"]
    with pytest.raises(DeviceError, match=r"nowhere:0 needs NowhereExecutionProvider, this onnxruntime offers .*CPU"):
        device.load_segment(LoadRequest(bundle, segment, [PassShape(1)], 1, 1))


def test_caches_start_zeroed_in_every_dtype() -> None:
    layers = [LayerKV(0, 2, 3, "float32"), LayerKV(1, 2, 3, "float16"), LayerKV(2, 2, 3, "bfloat16")]
    cache = OnnxRuntimeCache(layers, 5, Memory())
    assert cache.capacity == 5
    assert set(cache.buffers) == {f"past_key_values.{layer}.{part}" for layer in range(3) for part in ("key", "value")}
    for name, buffer in cache.buffers.items():
        assert list(buffer.value.shape()) == [1, 2, 5, 3]
        assert (buffer.array is None) == (".2." in name)
        if buffer.array is not None:
            assert not buffer.array.any()


@pytest.mark.parametrize("name", ["target_prefix", "target_suffix", "draft"])
def test_a_stream_brings_all_inputs_in_one_copy_and_the_pass_computes_the_same(bundle: Path, name: str) -> None:
    stream, found = FakeStream(), []
    for device in (streamed(stream), CpuDevice()):
        segment = read_manifest(bundle).segments[name]
        loaded = device.load_segment(LoadRequest(bundle, segment, [PassShape(3)], CAPACITY, 1))
        cache, feeds, results = device.make_cache(segment.kv, CAPACITY), FeedPool(CAPACITY, 100).at(3), []
        for past, ids in ((0, [1, 2, 3]), (3, [4, 5, 6]), (2, [9, 9, 9])):
            feeds.fill_causal(np.array(ids), past)
            state = np.arange(12, dtype=np.float32).reshape(1, 3, 4) % 7
            given = {**feeds.tensors, "logit_rows": np.arange(3), "hidden_states": state}
            outputs = loaded.run(given, cache, past)
            results.append({key: np.array(to_host(value)) for key, value in outputs.items()})
        found.append(results)
    for launched, plain in zip(*found, strict=True):
        assert all(np.array_equal(launched[key], plain[key]) for key in plain)
    assert [entry for entry in stream.log if entry in ("upload", "wait")] == ["wait", "upload"] * 3


def test_the_total_that_chooses_a_kernel_is_the_capacity_at_every_pass(bundle: Path) -> None:
    """A cursor there would make a GPU choose, and plan, another kernel for every token."""
    device, segment = streamed(FakeStream()), read_manifest(bundle).segments["target_suffix"]
    loaded = device.load_segment(LoadRequest(bundle, segment, [PassShape(3)], CAPACITY, 1))
    cache, feeds = device.make_cache(segment.kv, CAPACITY), FeedPool(CAPACITY, 100).at(3)
    feeds.fill_causal(np.array([1, 2, 3]), 0)
    loaded.run(
        {**feeds.tensors, "logit_rows": np.arange(3), "hidden_states": np.zeros((1, 3, 4), np.float32)}, cache, 0
    )
    (bound,) = loaded._bound.values()
    assert "total_sequence_length" not in bound.staging
    totals = [value for value in bound.held if isinstance(value, ort.OrtValue) and list(value.shape()) == []]
    assert [int(value.numpy()) for value in totals] == [CAPACITY]


def test_branches_get_a_total_little_above_what_is_filled(tmp_path: Path) -> None:
    """Their attention looks at every slot below it; a number of its own for each pass could not be recorded."""
    nodes = [
        helper.make_node("Cast", ["total_sequence_length"], ["total"], to=TensorProto.INT64),
        helper.make_node("Shape", ["slot_branch"], ["slots"]),
        helper.make_node("Mul", ["position_ids", "slots"], ["none"]),
        helper.make_node("Add", ["none", "total"], ["token_ids"]),
    ]
    inputs = (
        TensorSpec("position_ids", "int64", (1, "width")),
        TensorSpec("total_sequence_length", "int32", ()),
        TensorSpec("slot_branch", "int32", ("capacity",)),
    )
    types = {"int64": TensorProto.INT64, "int32": TensorProto.INT32}
    infos = [helper.make_tensor_value_info(spec.name, types[spec.dtype], list(spec.shape)) for spec in inputs]
    end = helper.make_tensor_value_info("token_ids", TensorProto.INT64, [1, "width"])
    made = helper.make_model(
        helper.make_graph(nodes, "draft", infos, [end]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    onnx.save(made, tmp_path / "draft.onnx")
    graph = Graph("draft.onnx", inputs, (TensorSpec("token_ids", "int64", (1, "width")),))
    segment, device = Segment("draft", (), {Form.INPLACE: graph}), streamed(FakeStream(), replays=True)
    loaded = device.load_segment(LoadRequest(tmp_path, segment, [PassShape(3)], 700, 1))
    cache, feeds, totals = device.make_cache((), 700), FeedPool(700, 1000).at(3), []
    for past in (0, 1, 253, 254, 600):
        feeds.fill_causal(np.array([1, 2, 3]), past)
        positions = np.zeros((1, 3), np.int64)
        totals.append(
            int(to_host(loaded.run({**feeds.tensors, "position_ids": positions}, cache, past)["token_ids"])[0, 0])
        )
    assert totals == [256, 256, 256, 512, 700]
    assert len(loaded._bound) == 3


@pytest.mark.parametrize("records", [True, False])
def test_the_third_pass_is_recorded_and_replayed_from_then_on(bundle: Path, records: bool) -> None:
    stream = FakeStream(records=records)
    device, segment = streamed(stream, replays=True), read_manifest(bundle).segments["target_prefix"]
    request = LoadRequest(bundle, segment, [PassShape(3)], CAPACITY, 1)
    loaded = device.load_segment(request)
    assert loaded.widths == (3,)
    cache, feeds = device.make_cache(segment.kv, CAPACITY), FeedPool(CAPACITY, 100).at(3)
    for first in range(5):
        feeds.fill_causal(np.array([first, 2, 3]), 0)
        outputs = loaded.run(feeds.tensors, cache, 0)
        assert to_host(outputs["hidden_states"])[0, :, 0].tolist() == [first, 2, 3]
    launches = [entry for entry in stream.log if entry in ("record", "replay")]
    assert launches == (["record"] + ["replay"] * 3 if records else ["record"])


def test_a_tensor_of_the_same_stream_is_bound_and_another_is_copied(bundle: Path) -> None:
    streams = FakeStream(), FakeStream()
    segment = read_manifest(bundle).segments["exit_head"]
    loaded = streamed(streams[0]).load_segment(LoadRequest(bundle, segment, [PassShape(3)], 1, 1))
    positions = np.zeros((1, 3), np.int64)
    for stream in streams:
        state = make_buffer(Memory(), "float32", (1, 3, 4))
        state.stream = stream
        loaded.run({"position_ids": positions, "hidden_states": state}, None, 0)
        state.wait()
        assert stream.log[-1] == "stream wait"
    own, other = loaded._bound.values()
    assert "hidden_states" not in own.staging
    assert "hidden_states" in other.staging


def test_a_segment_that_is_fed_anew_computes_the_same(bundle: Path) -> None:
    segment = read_manifest(bundle).segments["draft"]
    graph, results = segment.graphs[Form.ROWS], []
    provider = Provider("CPUExecutionProvider")
    session = ort.InferenceSession(bundle / graph.file, providers=["CPUExecutionProvider"])
    for loaded in (
        FedSegment("draft", session, graph, provider, any_slots=False),
        FedSegment("draft", session, graph, provider, any_slots=True),
        OnnxRuntimeSegment("draft", session, graph, Form.ROWS, provider),
    ):
        cache, feeds, tokens = CpuDevice(Form.ROWS).make_cache(segment.kv, CAPACITY), FeedPool(CAPACITY, 100).at(3), []
        for past, ids in ((0, [1, 2, 3]), (3, [4, 5, 6]), (2, [9, 9, 9])):
            feeds.fill_causal(np.array(ids), past)
            outputs = loaded.run({**feeds.tensors, "logit_rows": np.arange(3)}, cache, past)
            tokens.append(np.array(outputs["token_ids"]).tolist())
        results.append((tokens, {name: buffer.array.tolist() for name, buffer in cache.buffers.items()}))
    assert results[0] == results[1] == results[2]
