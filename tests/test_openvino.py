"""OpenVINO devices against ONNX Runtime's CPU on one graph, and against themselves along another path."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mirror.bundle import Form, Graph, Segment, TensorSpec
from mirror.errors import DeviceError
from mirror.targets import open_device
from mirror.targets.base import Device, KVCache, LoadedSegment, LoadRequest, PassShape, to_host
from mirror.targets.cores import allowed_cpus, may_have_amx
from mirror.targets.cpu import CpuDevice
from mirror.targets.names import Precision
from mirror.targets.openvino_settings import (
    compile_settings,
    default_precision,
    kernel_cache,
    kernel_cache_folder,
    least_threads,
    settle_precision,
    slots_for,
    takes_any_slots,
)
from mirror.targets.static_shapes import covering_shape, first_shapes
from tests.rows_graph import KV_HEADS, LAYERS, VOCAB, write_segment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason='needs openvino: pip install "mirror-sd[openvino]"'
)

CAPACITY = 24
WIDTHS = (1, 4, 6)
TOLERANCE = 1e-4
STALE = 1e3  # what a slot holds that nothing may read: large enough to show in any sum


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def segment(folder: Path) -> Segment:
    return write_segment(folder)


def prefill_last(widths: Sequence[int]) -> list[PassShape]:
    """Return the widths as shapes; the widest, like prefill, wants one row's logits."""
    return [PassShape(width, 1 if len(widths) > 1 and width == max(widths) else 0) for width in widths]


class Runner:
    """A loaded segment with its cache, fed by plain lists."""

    def __init__(self, device: Device, folder: Path, segment: Segment, widths: Sequence[int] = WIDTHS) -> None:
        shapes = prefill_last(widths)
        self.loaded: LoadedSegment = device.load_segment(LoadRequest(folder, segment, shapes, CAPACITY, 1))
        self.cache: KVCache = device.make_cache(segment.kv, CAPACITY)
        self.slot_branch = np.full(CAPACITY, -1, np.int32)

    def line(self, tokens: Sequence[int], past: int, *, width: int | None = None, rows: int | None = None) -> Any:
        """Run tokens that follow `past` slots in one line, padded to a width; return host copies."""
        width = width or len(tokens)
        count = len(tokens) if rows is None else rows
        places = past + np.arange(width)
        return self.run(
            np.resize(np.array(tokens), width), places, places + 1, np.full(width, -2), past, np.arange(count)
        )

    def run(
        self,
        tokens: NDArray[Any],
        positions: NDArray[Any],
        visible: NDArray[Any],
        branches: NDArray[Any],
        past: int,
        logit_rows: NDArray[Any],
    ) -> Mapping[str, NDArray[Any]]:
        feeds = {
            "input_ids": tokens.astype(np.int64)[None],
            "position_ids": positions.astype(np.int64)[None],
            "logit_rows": logit_rows.astype(np.int64),
            "past_length": np.array([past], np.int32),
            "row_visible": visible.astype(np.int32),
            "row_branch": branches.astype(np.int32),
            "slot_branch": self.slot_branch,
        }
        outputs = self.loaded.run(feeds, self.cache, past)
        return {name: np.array(to_host(tensor)) for name, tensor in outputs.items()}

    def slots(self) -> NDArray[np.float32]:
        """Return every buffer of the cache, float32 [buffers, heads, capacity, head_dim]."""
        buffers = self.cache.tensors if hasattr(self.cache, "tensors") else self.cache.buffers  # type: ignore[attr-defined]
        arrays = [getattr(buffer, "data", None) for buffer in buffers.values()]
        if arrays[0] is None:
            arrays = [buffer.array for buffer in buffers.values()]
        return np.concatenate([np.asarray(array) for array in arrays])


@pytest.fixture
def openvino(folder: Path, segment: Segment) -> Runner:
    return Runner(open_device("openvino:CPU"), folder, segment)


@pytest.fixture
def reference(folder: Path, segment: Segment) -> Runner:
    return Runner(CpuDevice(Form.ROWS), folder, segment)


def random_tokens(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def assert_same(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=TOLERANCE, err_msg=name)


def test_every_width_computes_what_onnx_runtime_computes(openvino: Runner, reference: Runner) -> None:
    tokens, past = random_tokens(17), 0
    for width in (6, 4, 1, 6):
        chunk = tokens[past : past + width]
        assert_same(openvino.line(chunk, past), reference.line(chunk, past))
        past += width
    np.testing.assert_allclose(openvino.slots(), reference.slots(), atol=TOLERANCE)


def test_a_pass_writes_its_own_slots_and_no_others(openvino: Runner) -> None:
    openvino.line(random_tokens(6), 0)
    before = openvino.slots()
    openvino.line(random_tokens(4, seed=2), 6)
    changed = np.abs(openvino.slots() - before).max(axis=(1, 3)) > 0  # [buffers, capacity]
    assert changed.shape[0] == 2 * LAYERS
    assert changed[:, 6:10].all()
    assert not changed[:, :6].any()
    assert not changed[:, 10:].any()


def test_rolling_back_is_moving_the_length(openvino: Runner, folder: Path, segment: Segment) -> None:
    trunk, refused, taken = random_tokens(6), random_tokens(4, seed=2), random_tokens(4, seed=3)
    openvino.line(trunk, 0)
    openvino.line(refused, 6)
    after_rollback = openvino.line(taken, 6)
    fresh = Runner(open_device("openvino:CPU"), folder, segment)
    fresh.line(trunk, 0)
    assert_same(after_rollback, fresh.line(taken, 6))


def test_padding_rows_change_nothing(openvino: Runner, folder: Path, segment: Segment) -> None:
    trunk, tail = random_tokens(6), random_tokens(4, seed=2)
    openvino.line(trunk, 0)
    padded = openvino.line(tail[:2], 6, width=4)
    following = openvino.line(tail[2:3], 8)
    exact = Runner(open_device("openvino:CPU"), folder, segment)
    exact.line(trunk, 0)
    for place, token in enumerate(tail[:2]):
        alone = exact.line([token], 6 + place)
        np.testing.assert_allclose(padded["logits"][:, place], alone["logits"][:, 0], atol=TOLERANCE)
    assert_same(following, exact.line(tail[2:3], 8))


def test_padding_past_the_last_slot_is_dropped(openvino: Runner) -> None:
    past = 0
    for width in (6, 6, 6, 4):
        openvino.line(random_tokens(width, seed=past), past)
        past += width
    before = openvino.slots()
    openvino.line([5], past, width=4)  # slots 22..25 of 24
    np.testing.assert_array_equal(openvino.slots()[:, :, :past], before[:, :, :past])


def test_fewer_logit_rows_are_the_first_of_all(openvino: Runner) -> None:
    tokens = random_tokens(4)
    every = openvino.line(tokens, 0)["logits"]
    for count in (1, 3):
        some = openvino.line(tokens, 0, rows=count)["logits"]
        assert some.shape == (1, count, VOCAB)
        np.testing.assert_allclose(some, every[:, :count], atol=TOLERANCE)


def test_prefill_wants_one_row_and_can_have_all(openvino: Runner, reference: Runner) -> None:
    tokens = random_tokens(6)
    for rows in (1, 6):
        assert_same(openvino.line(tokens, 0, rows=rows), reference.line(tokens, 0, rows=rows))


def test_the_last_row_alone(openvino: Runner, reference: Runner) -> None:
    tokens, places = np.array(random_tokens(6)), np.arange(6)
    arguments = (tokens, places, places + 1, np.full(6, -2), 0, np.array([5]))
    found = openvino.run(*arguments)
    assert found["logits"].shape == (1, 1, VOCAB)
    assert_same(found, reference.run(*arguments))


# A rollout over the trunk: branches leave after these trunk positions, one row each and step.
LEAVES = (1, 1, 3, 5)
STEPS = 3


def roll_out(runner: Runner, trunk: Sequence[int], tokens: NDArray[Any]) -> list[Mapping[str, NDArray[Any]]]:
    """Run `tokens` [steps, branches] as branches of a trunk, in the layout of docs/bundle.md."""
    runner.line(trunk, 0)
    count = len(LEAVES)
    branches, visible = np.arange(count), np.array(LEAVES) + 1
    passes = []
    for step in range(STEPS):
        past = len(trunk) + step * count
        runner.slot_branch[past : past + count] = branches
        passes.append(runner.run(tokens[step], visible + step, visible, branches, past, np.arange(count)))
    return passes


@pytest.mark.parametrize("kind", ["openvino", "reference"])
def test_branch_rows_see_their_own_branch_only(
    kind: str, folder: Path, segment: Segment, request: pytest.FixtureRequest
) -> None:
    """Every branch must get what it would get alone, in one line after its part of the trunk."""
    trunk = random_tokens(6)
    tokens = np.random.default_rng(4).integers(0, VOCAB, (STEPS, len(LEAVES)))
    passes = roll_out(request.getfixturevalue(kind), trunk, tokens)
    for branch, leave in enumerate(LEAVES):
        alone = Runner(CpuDevice(Form.ROWS), folder, segment)
        for place, token in enumerate(trunk[: leave + 1]):
            alone.line([token], place)
        for step in range(STEPS):
            expected = alone.line([int(tokens[step, branch])], leave + 1 + step)
            np.testing.assert_allclose(passes[step]["logits"][0, branch], expected["logits"][0, 0], atol=TOLERANCE)
            assert passes[step]["token_ids"][0, branch] == expected["token_ids"][0, 0]


def test_stale_rows_past_the_length_are_not_read(openvino: Runner) -> None:
    trunk, tail = random_tokens(6), random_tokens(4, seed=2)
    openvino.line(trunk, 0)
    clean = openvino.line(tail, 6)
    for tensor in openvino.cache.tensors.values():  # type: ignore[attr-defined]
        tensor.data[:, :, 6:] = STALE
    assert_same(openvino.line(tail, 6), clean)
    for tensor in openvino.cache.tensors.values():  # type: ignore[attr-defined]
        tensor.data[:, :, 5:6] = STALE
    assert np.abs(openvino.line(tail, 6)["logits"] - clean["logits"]).max() > TOLERANCE  # it does read the cache


def test_two_caches_take_turns(openvino: Runner, folder: Path, segment: Segment) -> None:
    first_cache, first, second = openvino.cache, random_tokens(6), random_tokens(6, seed=2)
    other = open_device("openvino:CPU").make_cache(segment.kv, CAPACITY)
    openvino.line(first, 0)
    openvino.cache = other
    openvino.line(second, 0)
    expected = []
    for tokens in (second, first):
        fresh = Runner(open_device("openvino:CPU"), folder, segment)
        fresh.line(tokens, 0)
        expected.append(fresh.line([7], 6))
    assert_same(openvino.line([7], 6), expected[0])
    openvino.cache = first_cache
    assert_same(openvino.line([7], 6), expected[1])


def test_outputs_stay_valid_while_another_width_runs(openvino: Runner) -> None:
    kept = openvino.loaded.run(_line_feeds(random_tokens(6), 0), openvino.cache, 0)
    copies = {name: np.array(to_host(tensor)) for name, tensor in kept.items()}
    openvino.line(random_tokens(4, seed=2), 6)
    for name, tensor in kept.items():
        np.testing.assert_array_equal(to_host(tensor), copies[name])


def _line_feeds(tokens: Sequence[int], past: int) -> dict[str, Any]:
    width = len(tokens)
    places = past + np.arange(width)
    return {
        "input_ids": np.array([tokens], np.int64),
        "position_ids": places[None],
        "logit_rows": np.arange(width),
        "past_length": np.array([past], np.int32),
        "row_visible": (places + 1).astype(np.int32),
        "row_branch": np.full(width, -2, np.int32),
        "slot_branch": np.full(CAPACITY, -1, np.int32),
    }


def test_one_program_for_all_widths_computes_the_same(
    folder: Path, segment: Segment, reference: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit on copies of the weights, widths share one program of free width."""
    from mirror.targets import openvino

    monkeypatch.setattr(openvino, "_STATIC_WEIGHTS_BYTES", 0)
    shared = Runner(open_device("openvino:CPU"), folder, segment)
    assert shared.loaded._compiler._shared is not None  # type: ignore[attr-defined]
    past = 0
    for width in (6, 4, 1, 4):
        tokens = random_tokens(width, seed=past)
        assert_same(shared.line(tokens, past), reference.line(tokens, past))
        past += width


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes take their slots by steps of 8, so that a context of this file's capacity takes several."""
    from mirror.targets import openvino_settings

    monkeypatch.setattr(openvino_settings, "_SLOT_STEP", 8)


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("shared", [False, True])
def test_a_draft_s_cache_is_as_long_as_what_is_filled(
    folder: Path, segment: Segment, reference: Runner, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """To the last slot, back to a shorter context, which keeps the length, and to a new one, which doesn't."""
    from mirror.targets import openvino

    if shared:
        monkeypatch.setattr(openvino, "_STATIC_WEIGHTS_BYTES", 0)
    runner = Runner(open_device("openvino:CPU"), folder, segment)
    slots = []
    pasts = [(0, 6), (6, 1), (7, 1), (8, 6), (14, 4), (18, 6), (9, 4), (13, 4), (2, 1), (0, 4), (4, 1), (5, 6)]
    for number, (past, width) in enumerate(pasts):
        tokens = random_tokens(width, seed=number)
        found, expected = runner.line(tokens, past), reference.line(tokens, past)
        assert_same(found, expected)
        np.testing.assert_array_equal(found["token_ids"], expected["token_ids"])
        slots.append(runner.cache.slots)  # type: ignore[attr-defined]
    assert slots == [8, 8, 8, 16, 24, 24, 24, 24, 24, 8, 8, 16]
    assert runner.cache.capacity == CAPACITY


@pytest.mark.usefixtures("stepwise")
def test_a_draft_by_the_plugin_is_given_the_filled_slots(folder: Path, segment: Segment, reference: Runner) -> None:
    """The plugin's segment, over a session of ONNX Runtime's CPU, which shows what it is given."""
    from mirror.targets.onnxruntime_session import OnnxRuntimeSegment, Provider
    from mirror.targets.openvino_plugin import FedSegment

    fed = Runner(CpuDevice(Form.ROWS), folder, segment)
    assert isinstance(fed.loaded, OnnxRuntimeSegment)
    session, slots = fed.loaded.session, []

    class Watched:
        io_binding = session.io_binding

        def run(self, names: Sequence[str], given: Mapping[str, NDArray[Any]]) -> Any:
            slots.append({given["slot_branch"].shape[0], given["past_key_values.1.value"].shape[2]})
            return session.run(names, given)

    provider = Provider("CPUExecutionProvider")
    fed.loaded = FedSegment("tiny", Watched(), segment.graphs[Form.ROWS], provider, any_slots=True)  # type: ignore[arg-type]
    tokens = np.random.default_rng(4).integers(0, VOCAB, (STEPS, len(LEAVES)))
    trunk = random_tokens(6)
    for found, expected in zip(roll_out(fed, trunk, tokens), roll_out(reference, trunk, tokens), strict=True):
        assert_same(found, expected)
    assert_same(fed.line(random_tokens(6), 18), reference.line(random_tokens(6), 18))
    assert slots == [{8}, {16}, {16}, {24}, {24}]


@pytest.mark.usefixtures("stepwise")
def test_padding_past_the_capacity_is_dropped_at_any_length(openvino: Runner, reference: Runner) -> None:
    for runner in (openvino, reference):
        for past in (0, 6, 12):
            runner.line(random_tokens(6, seed=past), past)
    for token, past in enumerate(range(18, CAPACITY)):
        padded, exact = openvino.line([token], past, width=6), reference.line([token], past)
        np.testing.assert_allclose(padded["logits"][:, 0], exact["logits"][:, 0], atol=TOLERANCE)
    assert openvino.cache.slots == CAPACITY  # type: ignore[attr-defined]


@pytest.mark.usefixtures("stepwise")
def test_branches_that_grow_the_cache_keep_their_rows(openvino: Runner, reference: Runner) -> None:
    """Trunk, branches and branch map go through two growths: 6 slots of the trunk, then 4 of each pass."""
    tokens = np.random.default_rng(4).integers(0, VOCAB, (STEPS, len(LEAVES)))
    trunk = random_tokens(6)
    for found, expected in zip(roll_out(openvino, trunk, tokens), roll_out(reference, trunk, tokens), strict=True):
        assert_same(found, expected)
    assert openvino.cache.slots == 24  # type: ignore[attr-defined]


@pytest.mark.usefixtures("stepwise")
def test_stale_rows_of_a_longer_context_are_not_read(openvino: Runner, reference: Runner) -> None:
    for runner in (openvino, reference):
        runner.line(random_tokens(6), 0)
        runner.line(random_tokens(6, seed=2), 6)
    for tensor in openvino.cache.tensors.values():  # type: ignore[attr-defined]
        tensor.data[:, :, 3:] = STALE
    tail = random_tokens(4, seed=3)
    assert_same(openvino.line(tail, 3), reference.line(tail, 3))


@pytest.mark.usefixtures("stepwise")
def test_a_program_compiled_ahead_takes_the_whole_capacity(folder: Path, segment: Segment, tmp_path: Path) -> None:
    """Beside one of any number of slots, on one cache: rows written by either are read by the other."""
    import shutil

    bundle = Path(shutil.copytree(folder, tmp_path / "bundle"))
    device = open_device("openvino:CPU")
    request = LoadRequest(bundle, segment, [PassShape(4, 4)], CAPACITY, 1)
    item = device.compile_segment(request, PassShape(4, 4))  # type: ignore[attr-defined]
    ahead = Segment(segment.name, segment.kv, segment.graphs, compiled=(item,))
    mixed, reference = Runner(device, bundle, ahead), Runner(CpuDevice(Form.ROWS), folder, segment)
    past, slots = 0, []
    for width in (1, 4, 1, 6, 4):
        tokens = random_tokens(width, seed=past)
        assert_same(mixed.line(tokens, past), reference.line(tokens, past))
        slots.append(mixed.cache.slots)  # type: ignore[attr-defined]
        past += width
    assert slots == [8, CAPACITY, CAPACITY, CAPACITY, CAPACITY]


def test_only_drafts_on_a_cpu_take_any_number_of_slots(segment: Segment) -> None:
    """A target's passes keep one number, for equal rounding; GPUs and NPUs keep fixed shapes."""
    graph = segment.graphs[Form.ROWS]
    target = Graph(graph.file, tuple(spec for spec in graph.inputs if spec.name != "slot_branch"), graph.outputs)
    assert takes_any_slots("CPU", graph)
    assert not any(takes_any_slots(unit, one) for unit, one in (("CPU", target), ("GPU.1", graph), ("NPU", graph)))
    assert [slots_for(filled, 600) for filled in (1, 256, 257, 599, 700)] == [256, 256, 512, 600, 600]


def test_two_threads_run_two_segments(folder: Path, segment: Segment) -> None:
    """As a target and a draft on one device do: neither may disturb the other."""
    device = open_device("openvino:CPU")
    runners = [Runner(device, folder, segment) for _ in range(2)]
    expected = [runners[0].line(random_tokens(6, seed=seed), 0)["logits"] for seed in (1, 2)]
    wrong: list[float] = []

    def repeat(runner: Runner, seed: int, logits: NDArray[Any]) -> None:
        for _ in range(30):
            found = runner.line(random_tokens(6, seed=seed), 0)["logits"]
            wrong.append(float(np.abs(found - logits).max()))

    threads = [
        threading.Thread(target=repeat, args=(runner, seed, logits))
        for runner, seed, logits in zip(runners, (1, 2), expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60
    assert max(wrong) == 0


def test_what_is_refused(openvino: Runner, folder: Path, segment: Segment) -> None:
    with pytest.raises(DeviceError, match=r"loaded for widths \(1, 4, 6\), asked for 5"):
        openvino.line(random_tokens(5), 0)
    openvino.cache = CpuDevice(Form.ROWS).make_cache(segment.kv, CAPACITY)
    with pytest.raises(DeviceError, match="needs a cache of 24 slots made by openvino:CPU"):
        openvino.line([1], 0)
    openvino.cache = open_device("openvino:CPU").make_cache(segment.kv, CAPACITY + 1)
    with pytest.raises(DeviceError, match="needs a cache of 24 slots"):
        openvino.line([1], 0)


def test_a_segment_without_rows_form_is_refused(folder: Path, segment: Segment) -> None:
    inplace = Segment(segment.name, segment.kv, {Form.INPLACE: segment.graphs[Form.ROWS]})
    with pytest.raises(DeviceError, match="needs tiny in rows form and the bundle has inplace; export"):
        Runner(open_device("openvino:CPU"), folder, inplace)


def test_an_unreadable_graph_is_named(tmp_path: Path, segment: Segment) -> None:
    graph = segment.graphs[Form.ROWS]
    (tmp_path / graph.file).write_bytes(b"not a graph")
    with pytest.raises(DeviceError, match=r"OpenVINO can't read tiny\.rows\.onnx"):
        Runner(open_device("openvino:CPU"), tmp_path, segment)


def test_precision_is_what_was_asked_for(folder: Path, segment: Segment, reference: Runner) -> None:
    """f32 on the CPU unless told otherwise, although OpenVINO itself would take bf16 where the CPU can."""
    exact = open_device("openvino:CPU")
    assert exact.precision is Precision.F32  # type: ignore[attr-defined]
    loose = open_device("openvino:CPU:bf16")
    assert loose.precision is Precision.BF16  # type: ignore[attr-defined]
    assert compile_settings("CPU", Precision.BF16, 1, None)["INFERENCE_PRECISION_HINT"] == "bf16"
    tokens = random_tokens(6)
    expected = reference.line(tokens, 0)["logits"]
    found = Runner(loose, folder, segment).line(tokens, 0)["logits"]
    if _cpu_has_bf16():
        assert np.abs(found - expected).max() > TOLERANCE
    np.testing.assert_allclose(found, expected, atol=0.5)


def test_a_draft_takes_bfloat16_where_the_cpu_has_it() -> None:
    """No text depends on a draft's arithmetic; what the user writes still holds."""
    wanted = Precision.BF16 if _cpu_has_bf16() else Precision.F32
    assert open_device("openvino:CPU", background=True).precision is wanted  # type: ignore[attr-defined]
    assert open_device("openvino:CPU:f32", background=True).precision is Precision.F32  # type: ignore[attr-defined]
    assert default_precision("CPU", background=True, has_bf16=False) is Precision.F32
    assert default_precision("CPU", has_bf16=True) is Precision.F32
    assert default_precision("NPU", background=True, has_bf16=True) is Precision.F16


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    from mirror.targets import openvino_settings

    monkeypatch.setattr(openvino_settings, "may_have_amx", lambda: True)


@pytest.mark.usefixtures("amx")
def test_matrix_units_get_two_threads_or_f32() -> None:
    """OpenVINO's gated MLP divides by half the number of threads there, and the process dies of it."""
    assert [least_threads("CPU", one) for one in (Precision.F32, Precision.BF16, Precision.F16, None)] == [1, 2, 2, 2]
    assert least_threads("GPU", Precision.F16) == least_threads("NPU", Precision.F16) == 1
    told = [
        compile_settings("CPU", precision, threads, None)["INFERENCE_NUM_THREADS"]
        for precision, threads in ((Precision.BF16, 1), (Precision.BF16, 3), (None, 1), (Precision.F32, 1))
    ]
    assert told == [2, 3, 2, 1]
    bf16, f32 = Precision.BF16, Precision.F32
    assert settle_precision("CPU", None, bf16, 2) is settle_precision("CPU", bf16, f32, 2) is bf16
    assert settle_precision("CPU", None, None, 2) is None
    assert settle_precision("CPU", None, bf16, 1) is settle_precision("CPU", None, None, 1) is f32
    assert settle_precision("CPU", f32, bf16, 1) is f32
    assert settle_precision("GPU", None, Precision.F16, 1) is Precision.F16
    with pytest.raises(DeviceError, match=r"openvino:CPU:bf16 needs 2 threads.*may use 1; allow.*or ask for openvino"):
        settle_precision("CPU", bf16, f32, 1)


def test_other_cpus_take_bfloat16_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    from mirror.targets import openvino_settings

    monkeypatch.setattr(openvino_settings, "may_have_amx", lambda: False)
    assert settle_precision("CPU", None, Precision.BF16, 1) is Precision.BF16
    assert compile_settings("CPU", Precision.BF16, 1, None)["INFERENCE_NUM_THREADS"] == 1


@pytest.mark.usefixtures("amx")
def test_two_hyper_threads_of_one_core_are_both_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from mirror.targets import openvino_settings

    for cpus, taken in ((1, False), (2, True), (3, False)):
        monkeypatch.setattr(openvino_settings, "allowed_cpus", lambda cpus=cpus: cpus)
        assert ("ENABLE_HYPER_THREADING" in compile_settings("CPU", Precision.BF16, 1, None)) is taken
        assert "ENABLE_HYPER_THREADING" not in compile_settings("CPU", Precision.F32, 1, None)


# Compiles a gated MLP for drafts of one thread, in a process of so many CPUs.
_GATED = """
import os, sys
from pathlib import Path
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[2])])
from tests.test_openvino import gated_segment
from mirror.errors import DeviceError
from mirror.targets import open_device
from mirror.targets.base import LoadRequest, PassShape

folder = Path(sys.argv[1])
request = LoadRequest(folder, gated_segment(folder), [PassShape(8)], 0, 1)
for name in ("openvino:CPU", "openvino:CPU:bf16"):
    try:
        device = open_device(name, background=True)
        device.load_segment(request)
        print(device.precision.value)
    except DeviceError:
        print("refused")
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not may_have_amx() or allowed_cpus() < 2, reason="needs two CPUs with AMX"
)
@pytest.mark.parametrize(("cpus", "said"), [(1, ["f32", "refused"]), (2, ["bf16", "bf16"])])
def test_a_draft_of_one_thread_does_not_end_the_process(tmp_path: Path, cpus: int, said: list[str]) -> None:
    """It did: OpenVINO divides by half the number of threads, rounded down."""
    done = subprocess.run(
        [sys.executable, "-c", _GATED, str(tmp_path), str(cpus)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]}"
    assert done.stdout.split() == said


def gated_segment(folder: Path) -> Segment:
    """Write a gated MLP of a size that OpenVINO computes as one operator on matrix units; return its record."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    sizes = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
    weights = [
        numpy_helper.from_array(random.standard_normal(size).astype(np.float32) / 8, name)
        for name, size in sizes.items()
    ]
    nodes = [
        helper.make_node(operator, inputs, [output])
        for operator, inputs, output in (
            ("MatMul", ["hidden_states", "gate"], "gated"),
            ("Sigmoid", ["gated"], "opening"),
            ("Mul", ["gated", "opening"], "opened"),
            ("MatMul", ["hidden_states", "up"], "upper"),
            ("Mul", ["opened", "upper"], "both"),
            ("MatMul", ["both", "down"], "out"),
        )
    ]
    edges = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, "width", 64))] for name in _GATED_EDGES]
    model = helper.make_model(
        helper.make_graph(nodes, "gated", *edges, weights), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, folder / "gated.rows.onnx")
    specs = [(TensorSpec(name, "float32", (1, "width", 64)),) for name in _GATED_EDGES]
    return Segment("gated", (), {Form.ROWS: Graph("gated.rows.onnx", *specs)})


_GATED_EDGES = ("hidden_states", "out")


def test_a_cache_in_bfloat16_takes_rows_as_they_are(folder: Path, segment: Segment) -> None:
    """Rows written by one pass are what the next reads: one pass over six tokens, or two over four and two."""
    device = open_device("openvino:CPU:bf16")
    whole, parts = (Runner(device, folder, segment, (2, 4, 6)) for _ in range(2))
    tokens = random_tokens(6)
    expected = whole.line(tokens, 0)["logits"]
    parts.line(tokens[:4], 0)
    found = parts.line(tokens[4:], 4)["logits"]
    np.testing.assert_allclose(found[0], expected[0, -2:], atol=0.2)  # bf16 keeps 8 bits
    rows = _bfloat16(parts.slots())
    exact = Runner(open_device("openvino:CPU:f32"), folder, segment, (2, 4, 6))
    exact.line(tokens, 0)
    np.testing.assert_allclose(rows, exact.slots(), atol=0.1)
    assert np.abs(rows[:, :, :6]).min(axis=(1, 3)).max() > 0
    assert not rows[:, :, 6:].any()


def _bfloat16(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Return bfloat16 numbers, which numpy holds as any 16 bits, as float32."""
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def test_a_draft_by_the_plugin_leaves_the_choice_to_openvino() -> None:
    from mirror.targets.openvino_plugin import plugin_options, plugin_precision

    assert plugin_precision("CPU", None, background=True) is None
    assert plugin_precision("CPU", Precision.F32, background=True) is Precision.F32
    assert plugin_precision("CPU", None, background=False) is Precision.F32
    assert plugin_precision("GPU", None, background=True) is Precision.F16
    assert "INFERENCE_PRECISION_HINT" not in plugin_options("CPU", None, 2)


def _cpu_has_bf16() -> bool:
    from mirror.targets.openvino import ov

    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_settings_are_taken_by_the_runtime(folder: Path, segment: Segment) -> None:
    runner = Runner(open_device("openvino:CPU"), folder, segment)
    program = next(iter(runner.loaded._programs.values()))  # type: ignore[attr-defined]
    compiled = program._request.get_compiled_model()
    for name, value in {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False, "NUM_STREAMS": 1}.items():
        assert compiled.get_property(name) == value
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_compiled_programs_are_kept_and_taken_again(folder: Path, segment: Segment, tmp_path: Path) -> None:
    """What a GPU or an NPU does by default; here on the CPU, which can do it too."""
    from mirror.targets.openvino import OpenVinoDevice

    device = OpenVinoDevice("CPU", Precision.F32, tmp_path / "kernels")
    first = Runner(device, folder, segment).line(random_tokens(6), 0, rows=1)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kernels").rglob("*.blob")}
    assert len(kept) == len(WIDTHS)
    again = Runner(device, folder, segment)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kernels").rglob("*.blob")} == kept
    assert_same(again.line(random_tokens(6), 0, rows=1), first)
    programs = again.loaded._programs.values()  # type: ignore[attr-defined]
    assert all(program._request.get_compiled_model().get_property("LOADED_FROM_CACHE") for program in programs)


def test_only_slow_compilers_keep_their_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MIRROR_CACHE", str(tmp_path))
    assert kernel_cache("CPU") is None
    assert kernel_cache("GPU.1") == kernel_cache("NPU") == tmp_path / "openvino"
    monkeypatch.delenv("MIRROR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_cache_folder() == tmp_path / "xdg" / "mirror" / "openvino"


def test_settings_of_other_units() -> None:
    npu = compile_settings("NPU", Precision.F16, 3, Path("kernels"))
    assert npu == {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f16", "CACHE_DIR": "kernels"}
    assert "INFERENCE_NUM_THREADS" not in compile_settings("GPU", Precision.F16, 3, None)


def test_plugin_options_say_the_same_as_json() -> None:
    import json

    from mirror.targets.openvino_plugin import plugin_options

    options = json.loads(plugin_options("CPU", Precision.F32, 2)["load_config"])
    assert options["CPU"]["INFERENCE_NUM_THREADS"] == "2"
    assert options["CPU"]["ENABLE_CPU_PINNING"] == "NO"
    assert set(json.loads(plugin_options("GPU.1", Precision.F16, 2)["load_config"])) == {"GPU"}


@pytest.mark.parametrize("widths", [(1, 4, 6), (4,)])
def test_sessions_per_shape_compute_the_same(
    folder: Path, segment: Segment, reference: Runner, widths: tuple[int, ...]
) -> None:
    """The plugin's segment, over ONNX Runtime's CPU sessions: the plugin itself lists Intel hardware only."""
    from mirror.targets.shaped_segment import ShapedSegment

    device = CpuDevice(Form.ROWS)
    loaded: list[PassShape] = []

    def load(shape: PassShape) -> LoadedSegment:
        loaded.append(shape)
        return device.load_segment(LoadRequest(folder, segment, [shape], CAPACITY, 1))

    shaped = Runner(device, folder, segment)
    shaped.loaded = ShapedSegment("tiny", segment.graphs[Form.ROWS], prefill_last(widths), load)
    assert shaped.loaded.widths == widths
    past = 0
    for rows in (None, 1, 3):
        tokens = random_tokens(4, seed=past)
        assert_same(shaped.line(tokens, past, rows=rows), reference.line(tokens, past, rows=rows))
        past += 4
    assert loaded[: len(widths)] == list(first_shapes(segment.graphs[Form.ROWS], prefill_last(widths)))
    with pytest.raises(DeviceError, match="asked for 2"):
        shaped.line([1, 2], 0)


def test_shapes_compiled_first_and_later(segment: Segment) -> None:
    graph = segment.graphs[Form.ROWS]
    first = first_shapes(graph, [PassShape(128, 1), PassShape(1), PassShape(8), PassShape(8)])
    assert first == (PassShape(1, 1), PassShape(8, 8), PassShape(128, 1))
    assert covering_shape(first, PassShape(8, 3)) == PassShape(8, 8)
    assert covering_shape(first, PassShape(128, 1)) == PassShape(128, 1)
    assert covering_shape(first, PassShape(128, 2)) == PassShape(128, 128)
    assert covering_shape([*first, PassShape(128, 128)], PassShape(128, 1)) == PassShape(128, 1)
    without_rows = Graph(graph.file, graph.inputs[:2], graph.outputs)
    assert first_shapes(without_rows, [PassShape(8), PassShape(1)]) == (PassShape(1), PassShape(8))
    assert covering_shape([PassShape(8)], PassShape(8)) == PassShape(8)


def test_importing_openvino_reports_no_usage(tmp_path: Path) -> None:
    """openvino sends an event when it is imported, and leaves an identifier in the home folder."""
    code = (
        "import sys, mirror.targets.openvino\n"
        "assert 'openvino' in sys.modules\n"
        "print('openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_home_environment(tmp_path)
    )
    assert done.stdout.strip() == "False"
    assert list(tmp_path.iterdir()) == []


def _home_environment(home: Path) -> dict[str, str]:
    import os

    return {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}


def test_kv_heads_are_grouped() -> None:
    assert KV_HEADS < 4  # else the graph would not tell a cache laid out by query heads
