"""The planner: what it counts, how its times move, what it refuses, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from mirror.bundle import Manifest
from mirror.cli import STORED, main
from mirror.errors import BundleError, RequestError
from mirror.export.build import ExportOptions, export_bundle
from mirror.plan.acceptance import Curve, best_schedule, fit_agreement, parse_curve, read_curve
from mirror.plan.box import Basis, Box, DeviceProfile, Figure, named_boxes, parse_box, read_box
from mirror.plan.graph_count import count_draft, count_graph, count_target
from mirror.plan.passes import Part, PassSize, PassTime, multiply_adds
from mirror.plan.plan import PlanOptions, edges, plan_bundle
from mirror.plan.rounds import Choice, Setting, plan_round
from mirror.plan.search import BRANCHES, Limits, best_rounds, draft_sizes
from mirror.plan.shapes import STORAGE, Shape, named_shapes, read_shape, shape_of
from mirror.plan.timeline import run_beside, shared_speeds, split
from mirror.plan.work import ModelWork, Work
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.memory import slot_bytes
from mirror.runtime.wire import fields, messages, numbers
from tests.families import VOCAB, make_checkpoint
from tests.lookup import Lookup, LookupBundle, random_table, write_bundle

# A layer of the tiny checkpoints: q, k, v, o, and a gated MLP.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
HEAD = 32 * VOCAB


# --- counting -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp16", "int4"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A qwen3 of four layers, cut after one, with a draft made of two of them."""
    folder = tmp_path_factory.mktemp("plan")
    checkpoint = make_checkpoint("qwen3", folder / "checkpoint")
    options = ExportOptions(
        precision=request.param,
        max_length=64,
        exit_layer="1",
        draft="layers:0,3",
        int8_draft=True,
        allow_failed_check=True,
    )
    return folder / "bundle", export_bundle(str(checkpoint), folder / "bundle", options).manifest


def stored_bytes(precision: str, count: int) -> float:
    """Two bytes a number, or half a byte and a float32 scale for every 32 of them."""
    return 2 * count if precision == "fp16" else count / 2 + 4 * count / 32


def test_a_bundle_is_counted_as_by_hand(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    precision = manifest.model.precision
    target = count_target(folder, manifest)
    assert (target.precision, target.layers) == (precision, 4)
    assert (target.layer.matrices, target.head.matrices) == (LAYER, HEAD)
    assert target.layer.matrix_bytes == stored_bytes(precision, LAYER)
    assert target.head.matrix_bytes == stored_bytes(precision, HEAD)
    assert target.exit_head.matrices == HEAD  # the embedding is looked up, not multiplied with
    assert target.layer.slot_bytes == 2 * 2 * 8 * (2 if precision == "fp16" else 4)
    assert target.layer.attention == 2 * 4 * 8  # scores and the mean of values, of four query heads
    assert target.parameters == 4 * LAYER + HEAD
    assert target.capacity_slots == 64 + 8


def test_a_draft_is_counted_apart_from_its_target(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    draft = count_draft(folder, manifest, "cuda:0")
    assert draft is not None
    assert (draft.layers, draft.layer.matrices, draft.head.matrices) == (2, LAYER, HEAD)
    assert draft.layer.slot_bytes * 2 == slot_bytes(manifest.segments["draft"].kv)
    assert draft.precision == manifest.model.precision
    assert count_draft(folder, dataclasses.replace(manifest, draft=None), "cuda:0") is None


def test_a_draft_on_the_cpu_is_counted_as_it_runs_there(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    draft = count_draft(folder, manifest, "cpu")
    assert draft is not None
    assert (draft.precision, draft.layers, draft.layer.matrices, draft.head.matrices) == ("int8", 2, LAYER, HEAD)
    assert draft.layer.matrix_bytes == LAYER  # a scale for each output is next to nothing
    without = {name: segment for name, segment in manifest.segments.items() if not name.endswith("int8")}
    same = count_draft(folder, dataclasses.replace(manifest, segments=without), "cpu")
    assert same is not None
    assert same.precision == manifest.model.precision


def test_kernels_are_the_nodes_that_compute(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    count = count_graph(folder / "target_prefix.onnx")
    import onnx

    kinds = [node.op_type for node in onnx.load(folder / "target_prefix.onnx", load_external_data=False).graph.node]
    assert count.kernels == len([kind for kind in kinds if kind not in ("Reshape", "Unsqueeze", "Squeeze", "Identity")])
    assert count.query_heads == 4 * manifest.decoding.exit_layer


def test_a_shape_counts_what_its_export_does(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    counted = count_target(folder, manifest)
    work = read_shape(str(folder.parent / "checkpoint")).work(STORAGE[manifest.model.precision])
    for part in ("layer", "head"):
        one, other = getattr(counted, part), getattr(work, part)
        assert one.matrices == other.matrices
        assert one.matrix_bytes == other.matrix_bytes
        assert (one.slot_bytes, one.attention) == (other.slot_bytes, other.attention)
    # The graph's kernels are a few more than the shape's table says: transposes of this cache form.
    assert counted.layer.kernels == pytest.approx(work.layer.kernels, abs=6)


def test_segments_add_up_to_the_model() -> None:
    model = read_shape("qwen3-14b").work(STORAGE["fp16"])
    apart = model.prefix(17).body + model.suffix(17).body + model.suffix(17).head
    whole = model.whole()
    assert apart.matrix_bytes == whole.body.matrix_bytes + whole.head.matrix_bytes
    assert apart.matrix_bytes == pytest.approx(27.98e9, rel=1e-3)
    assert model.with_layers(10).parameters == 10 * model.layer.matrices + model.head.matrices


def test_a_bundle_without_matrices_or_graphs_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "lookup", LookupBundle(Lookup(random_table(1, 20, 9))))
    with pytest.raises(RequestError, match=r"no matrix to count; plan with --target-shape"):
        plan_bundle(bundle, PlanOptions(box="h100-16-cores", draft_shape="qwen3-0.6b"))
    with pytest.raises(BundleError, match=r"x\.onnx is missing"):
        count_graph(tmp_path / "x.onnx")


def test_numbers_are_read_packed_and_one_by_one() -> None:
    apart = bytes([0x08, 0x96, 0x01, 0x08, 0x03])
    packed = bytes([0x0A, 0x03, 0x96, 0x01, 0x03])
    fixed = bytes([0x15, 1, 2, 3, 4, 0x19, *range(8), 0x22, 0x01, 0x41])
    assert list(numbers(memoryview(apart), 1)) == list(numbers(memoryview(packed), 1)) == [150, 3]
    assert [(number, bytes(value)) for number, value in fields(memoryview(fixed)) if not isinstance(value, int)] == [
        (4, b"A")
    ]
    assert next(messages(memoryview(fixed), 4)) == b"A"


# --- shapes ---------------------------------------------------------------------------------------

CONFIG = json.loads(Path("mirror/plan/shapes/qwen3-14b.json").read_text(encoding="utf-8"))


def test_every_shape_of_the_package_reads() -> None:
    assert {"qwen3-14b", "qwen3-0.6b"} <= set(named_shapes())
    assert all(read_shape(name).layers > 0 for name in named_shapes())
    assert read_shape("qwen3-0.6b").work(STORAGE["fp16"]).parameters == pytest.approx(0.596e9, rel=1e-3)


def test_the_command_offers_every_storage() -> None:
    assert set(STORED) == set(STORAGE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, r"family 'qwen3_moe'; shapes are counted for .*: export this model"),
        ({"hidden_size": None}, r"hidden_size None; expected a whole number above 0"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers 0; expected"),
    ],
)
def test_a_config_that_cannot_be_counted_is_refused(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        shape_of("config.json", {**CONFIG, **change})


def test_a_shape_that_is_not_there_or_not_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no shape 'qwen9'; name a config.json, or one of .*qwen3-14b"):
        read_shape("qwen9")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(RequestError, match=r"is not JSON"):
        read_shape(str(tmp_path))


# --- boxes ----------------------------------------------------------------------------------------


def test_every_box_of_the_package_reads_and_names_its_sources() -> None:
    names = set(named_boxes())
    assert {"core-ultra-7-258v", "h100-16-cores", "h200-16-cores", "snapdragon-x-elite"} <= names
    for name in names:
        text = Path(f"mirror/plan/boxes/{name}.json").read_text(encoding="utf-8")
        for figure in figures(read_box(name)):
            published = figure.basis in (Basis.PUBLISHED, Basis.VENDOR)
            assert len(figure.source) > 4, f"{name}: {figure}"
            assert not published or "http" in figure.source or "DDR5" in figure.source, f"{name}: {figure}"
            assert figure.basis is not Basis.MEASURED or "docs/" in figure.source, f"{name}: {figure}"
        for part in text.split("docs/results/")[1:]:
            assert Path("docs/results", part.split(".json")[0] + ".json").is_file(), part[:40]


def figures(box: Box) -> list[Figure]:
    found = [box.host_ms, *box.memories.values()]
    for device in box.devices.values():
        found += [*device.tops.values(), *(value for value in vars(device).values() if isinstance(value, Figure))]
    return found


def figure(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"value": value, "basis": "assumed", "source": "a test"}
    return found if low is None else {**found, "range": [low, high]}


def profile() -> dict[str, Any]:
    """A box of two devices over one memory, and one with a memory of its own."""
    device = {
        "title": "a device",
        "memory": "shared",
        "gb_s": figure(100, 80, 120),
        "tops": {"fp16": figure(10, 5, 20)},
        "pass_ms": figure(0.1, 0.05, 0.2),
        "kernel_us": figure(10),
    }
    return {
        "title": "a test box",
        "memories": {"shared": figure(120), "own": figure(50)},
        "devices": {"gpu": dict(device), "npu": dict(device), "cpu": {**device, "memory": "own", "gb_s": figure(50)}},
        "host_ms": figure(0.5, 0.25, 1.0),
        "target": "gpu",
        "draft": "npu",
    }


def test_a_profile_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(profile()), encoding="utf-8")
    box = read_box(str(tmp_path / "mine.json"))
    assert (box.title, box.target, box.devices["npu"].gb_s.value) == ("a test box", "gpu", 100)
    assert box.device("cpu").memory == "own"
    with pytest.raises(RequestError, match=r"a test box has no device 'tpu'; it has gpu, npu, cpu"):
        box.device("tpu")


def test_the_ends_of_the_ranges() -> None:
    box = parse_box("box", json.dumps(profile()))
    slow, fast = box.at_edge(slow=True), box.at_edge(slow=False)
    assert (slow.devices["gpu"].gb_s.value, fast.devices["gpu"].gb_s.value) == (80, 120)
    assert (slow.devices["gpu"].pass_ms.value, fast.devices["gpu"].pass_ms.value) == (0.2, 0.05)
    assert (slow.devices["gpu"].tops["fp16"].value, fast.devices["gpu"].tops["fp16"].value) == (5, 20)
    assert (slow.host_ms.value, fast.host_ms.value) == (1.0, 0.25)
    assert slow.devices["gpu"].kernel_us.value == fast.devices["gpu"].kernel_us.value == 10


Damage = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda box: box.pop("host_ms"), r"box: 'host_ms' is missing; the keys are"),
        (lambda box: box.update(speed=1), r"box: 'speed' is unknown; the keys are"),
        (lambda box: box.update(target="tpu"), r"target is 'tpu'; expected one of gpu, npu, cpu"),
        (lambda box: box.update(title=3), r"at title: found 3; expected a text"),
        (lambda box: box.update(devices={}), r"at devices: expected an object with at least one entry"),
        (lambda box: box["devices"]["gpu"].update(memory="hbm"), r"gpu\.memory is 'hbm'; expected one of shared, own"),
        (lambda box: box["devices"]["gpu"].update(gb_s=figure(500)), r"gb_s is 500, more than the 120 of its memory"),
        (
            lambda box: box["devices"]["gpu"].update(gb_s_by_precision={"int4": figure(121)}),
            r"gb_s_by_precision\.int4 is 121, more than the 120 of its memory",
        ),
        (lambda box: box["devices"]["gpu"].update(gb_s=7), r"at devices\.gpu\.gb_s: expected an object with basis"),
        (lambda box: box["devices"]["gpu"].pop("tops"), r"at devices\.gpu: 'tops' is missing"),
        (
            lambda box: box["devices"]["gpu"].update(kernel_us=figure(-1)),
            r"kernel_us\.value: found -1; expected a number of 0 or",
        ),
        (
            lambda box: box["memories"].update(own=figure(0)),
            r"at memories\.own\.value: found 0; expected a number above",
        ),
        (lambda box: box.update(host_ms=figure(True)), r"at host_ms\.value: found True; expected a number"),
        (
            lambda box: box["host_ms"].update(basis="heard"),
            r"at host_ms\.basis: found 'heard'; expected one of vendor, published, measured, fitted, assumed",
        ),
        (lambda box: box["host_ms"].pop("source"), r"at host_ms: 'source' is missing"),
        (lambda box: box["host_ms"].update(range=[1, 2]), r"at host_ms\.range: found \[1, 2\]; expected \[low, high\]"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_place(damage: Damage, message: str) -> None:
    data = profile()
    damage(data)
    with pytest.raises(RequestError, match=message):
        parse_box("box", json.dumps(data))


def test_a_profile_that_is_not_json_or_not_there_is_refused() -> None:
    with pytest.raises(RequestError, match=r"box is not JSON .*; mend it"):
        parse_box("box", "{")
    with pytest.raises(RequestError, match=r"box: expected an object with"):
        parse_box("box", "[]")
    with pytest.raises(RequestError, match=r"no box 'pc'; name a JSON file, or one of core-ultra"):
        read_box("pc")


# --- passes ---------------------------------------------------------------------------------------

MODEL = Shape("tiny", 256, 512, 8, 4, 2, 64, 1000).work(STORAGE["fp16"])


def device(**changes: Any) -> tuple[Box, DeviceProfile]:
    box = parse_box("box", json.dumps(profile()))
    values = {name: Figure(value, Basis.ASSUMED, "a test", value, value) for name, value in changes.items()}
    return box, dataclasses.replace(box.devices["gpu"], **values)


def timed(rows: int = 1, context: int = 0, *, model: ModelWork = MODEL, **changes: Any) -> PassTime:
    box, profiled = device(**changes)
    return Part(model, profiled, box, draft=False).time(model.whole(), PassSize(rows, rows, context))


def test_a_pass_by_hand() -> None:
    found = timed(rows=4, context=100)
    kernels = 8 * 15 + 3 + 1
    weights = 2 * (8 * (256 * 64 * 12 + 3 * 256 * 512) + 256 * 1000)
    cache = 100 * 8 * 2 * 2 * 64 * 2
    assert found.dispatch_ms == pytest.approx(0.1 + kernels * 0.01)
    assert found.weights_ms == pytest.approx(weights / 100e6)
    assert found.cache_ms == pytest.approx(cache / 100e6)
    macs = 4 * weights / 2 + 4 * 100 * 8 * 2 * 4 * 64
    assert multiply_adds(MODEL.whole(), PassSize(4, 4, 100)) == macs
    assert found.arithmetic_ms == pytest.approx(2 * macs / 10e9)
    assert found.ms == pytest.approx(found.dispatch_ms + found.weights_ms + found.cache_ms)
    assert found.use == {"shared": pytest.approx((weights + cache) / 1e6 / found.ms / 120), "device gpu": 1.0}
    assert found.bound == "dispatch"


def test_the_cache_and_further_rows_have_their_own_cost() -> None:
    plain = timed()
    assert timed(copy_gb_s=10.0).ms == pytest.approx(plain.ms + 2048 * 8 * 2 * 2 * 64 * 2 / 10e6)
    assert timed(copy_gb_s=0.1).bound == "moving the cache"
    assert timed(many_rows=3.0).ms == plain.ms
    assert timed(rows=2, many_rows=3.0).weights_ms == pytest.approx(3 * plain.weights_ms)
    assert timed(rows=5000).bound == "arithmetic"
    assert timed(context=4000, cache_gb_s=0.1).bound == "attention over the cache"


def test_matrices_that_are_stored_in_some_way_may_be_read_at_another_rate() -> None:
    data = profile()
    data["devices"]["gpu"]["gb_s_by_precision"] = {"fp16": {**figure(50), "range": [25, 100]}, "int4": figure(10)}
    box = parse_box("box", json.dumps(data))

    def weights_ms(of: Box) -> float:
        return Part(MODEL, of.devices["gpu"], of, draft=False).time(MODEL.whole(), PassSize(1, 1, 0)).weights_ms

    assert weights_ms(box) == pytest.approx(2 * timed().weights_ms)
    assert weights_ms(box.at_edge(slow=True)) == pytest.approx(4 * timed().weights_ms)
    assert weights_ms(box.at_edge(slow=False)) == pytest.approx(timed().weights_ms)


def test_a_precision_without_a_rate_is_refused() -> None:
    with pytest.raises(RequestError, match=r"gpu \(a device\) has no rate for int4, only for fp16; plan with one of"):
        timed(model=Shape("tiny", 256, 512, 8, 4, 2, 64, 1000).work(STORAGE["int4"]))


SIZES = st.integers(1, 512)


@given(rows=SIZES, more=SIZES, context=st.integers(0, 8000), gb_s=st.floats(1, 120), kernel_us=st.floats(0, 100))
@settings(max_examples=60, deadline=None)
def test_more_work_or_a_slower_device_never_takes_less(
    rows: int, more: int, context: int, gb_s: float, kernel_us: float
) -> None:
    base = timed(rows, context, gb_s=gb_s, kernel_us=kernel_us).ms
    assert timed(rows + more, context, gb_s=gb_s, kernel_us=kernel_us).ms >= base
    assert timed(rows, context + more, gb_s=gb_s, kernel_us=kernel_us).ms >= base
    assert timed(rows, context, gb_s=gb_s / 2, kernel_us=kernel_us).ms >= base
    assert timed(rows, context, gb_s=gb_s, kernel_us=kernel_us + 1).ms > base
    assert timed(rows, context, gb_s=gb_s, kernel_us=kernel_us, model=MODEL.with_layers(9)).ms > base


# --- two devices at once --------------------------------------------------------------------------


def lane(ms: float, **use: float) -> PassTime:
    return PassTime("pass", ms, 0.0, 0.0, 0.0, 0.0, use)


SHARE = st.floats(0, 1)


@given(SHARE, SHARE)
def test_a_memory_is_split_whole_and_fairly(first: float, second: float) -> None:
    got = split(first, second)
    assert got[0] <= first
    assert got[1] <= second
    assert sum(got) == pytest.approx(min(first + second, 1.0))
    assert min(got) >= min(first, second, 0.5) - 1e-12


def test_passes_that_share_nothing_run_as_if_alone() -> None:
    both = run_beside([lane(2, hbm=1), lane(3, hbm=1)], [lane(1, ddr=1), lane(2, ddr=1), lane(4, ddr=1)], 1)
    assert both.target_ends == (2, 5)
    assert both.draft_ends == (1, 4, 8)  # the second waits for the gate; the third had begun before the end


def test_passes_that_share_a_memory_slow_each_other_down() -> None:
    both = run_beside([lane(4, dram=0.8)], [lane(2, dram=0.4)], 0)
    # 0.6 and 0.4 of the memory until the draft is done after 2 ms; the target has done 1.5 of 4 by then.
    assert both.draft_ends == (2,)
    assert both.target_ms == pytest.approx(2 + 2.5)
    assert shared_speeds(lane(1, dram=1.0), lane(1, dram=1.0)) == (0.5, 0.5)
    assert shared_speeds(lane(1, dram=1.0), lane(1, hbm=1.0)) == (1.0, 1.0)
    assert shared_speeds(lane(1, dram=1.0), None) == (1.0, 1.0)


def test_a_pass_that_had_not_begun_when_the_outcome_is_known_does_not_begin() -> None:
    both = run_beside([lane(2)], [lane(1), lane(3), lane(1)], 0)
    assert both.draft_ends == (1, 4)
    assert run_beside([lane(2), lane(1)], [lane(1), lane(1)], 2).draft_ends == (1,)


LANES = st.lists(st.tuples(st.floats(0.01, 5), SHARE), min_size=1, max_size=5)


@given(LANES, LANES, st.integers(0, 2))
@settings(deadline=None)
def test_sharing_never_makes_the_target_faster(
    target: list[tuple[float, float]], draft: list[tuple[float, float]], gate: int
) -> None:
    passes = [lane(ms, dram=use) for ms, use in target]
    drafts = [lane(ms, dram=use) for ms, use in draft]
    both = run_beside(passes, drafts, min(gate, len(passes)))
    alone_ms = sum(ms for ms, _ in target)
    assert alone_ms - 1e-9 <= both.target_ms <= 2 * alone_ms + 1e-9  # nobody gets less than half of what it wants
    assert list(both.draft_ends) == sorted(both.draft_ends)
    assert len(both.target_ends) == len(target)


# --- acceptance -----------------------------------------------------------------------------------

CURVE = read_curve(None, 30)


def test_one_chance_for_each_stream_row_tells_every_measured_schedule() -> None:
    measured = json.loads(Path("docs/results/distill-smollm2-135m.json").read_text(encoding="utf-8"))
    rows = measured["greedy"]["passes"]
    assert len(rows) == 17
    for row in rows:
        said = CURVE.tokens_per_round(row["tokens_per_pass"], 7)
        assert said == pytest.approx(row["tokens_per_round"], rel=0.0125)
    assert list(CURVE.agreement) == sorted(CURVE.agreement, reverse=True)


def test_the_packaged_curve_is_the_measured_one() -> None:
    measured = Path("docs/results/distill-smollm2-135m.json").read_text(encoding="utf-8")
    found = parse_curve("result", measured, 30)
    assert found.agreement == pytest.approx(CURVE.agreement, abs=1e-3)
    for exit_share in (0.5, 2 / 3):
        for source in CandidateSource:
            assert found.share_prepared(source, 64, exit_share) == pytest.approx(
                CURVE.share_prepared(source, 64, exit_share), abs=1e-4
            )
    assert CURVE.share_prepared(CandidateSource.BOTH, 64, 0.5) == pytest.approx(0.793, abs=1e-3)


def test_the_best_schedule_is_the_one_that_was_measured_best() -> None:
    assert best_schedule(CURVE, 7, 3, 3) == (1, 2, 4)
    assert best_schedule(CURVE, 7, 2, 3) == (3, 4)
    assert best_schedule(CURVE, 7, 1, 3) is None
    assert best_schedule(CURVE, 5, 5, 0) == (1, 1, 1, 1, 1)


def test_chances_are_found_again() -> None:
    curve = Curve("", (0.7, 0.4), ())
    measured = [(schedule, curve.tokens_per_round(schedule, 4)) for schedule in ((1,), (2,), (1, 2), (2, 1))]
    assert fit_agreement(measured, 4) == pytest.approx((0.7, 0.4), abs=2e-3)


# From 0.1 on: below, a 13th token in a row is too rare to tell in a float.
@given(agreement=st.floats(0.1, 0.9), gamma=st.integers(1, 12), branches=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_better_drafts_longer_windows_and_more_branches_give_more(agreement: float, gamma: int, branches: int) -> None:
    curve = CURVE.with_agreement(agreement)
    tokens = curve.tokens_per_round((1,), gamma)
    assert 1 < tokens < gamma + 1
    assert curve.tokens_per_round((1,), gamma + 1) > tokens
    assert CURVE.with_agreement(agreement + 0.05).tokens_per_round((1,), gamma) > tokens
    for source in CandidateSource:
        share = CURVE.share_prepared(source, branches, 0.6)
        assert 0 < share <= CURVE.share_prepared(source, branches + 1, 0.6) < 1


def test_an_acceptance_is_a_share_or_a_file(tmp_path: Path) -> None:
    assert read_curve("0.8", 30).agreement[0] == pytest.approx(0.8)
    for wrong in ("1.5", "much", "0"):
        with pytest.raises(RequestError, match=rf"acceptance is '{wrong}'; give the share .* between 0 and 1"):
            read_curve(wrong, 30)
    (tmp_path / "curve.json").write_text('{"gamma": 7}', encoding="utf-8")
    with pytest.raises(RequestError, match=r"curve.json is no acceptance curve \(KeyError: 'passes'\); give a result"):
        read_curve(str(tmp_path / "curve.json"), 30)
    only_draft = dataclasses.replace(CURVE, prepared=CURVE.prepared[:1])
    with pytest.raises(RequestError, match=r"has nothing on candidates from both"):
        only_draft.share_prepared(CandidateSource.BOTH, 8, 0.5)


# --- rounds ---------------------------------------------------------------------------------------


def setting(**changes: Any) -> Setting:
    """A 14B in fp16 on the test box's GPU, with a draft of 4 layers on its NPU."""
    box = parse_box("box", json.dumps(profile()))
    draft = Shape("draft", 1024, 3072, 4, 16, 8, 128, 16384).work(STORAGE["fp16"])
    target = Part(read_shape("qwen3-14b").work(STORAGE["fp16"]), box.devices["gpu"], box, draft=False)
    part = Part(draft, box.devices[changes.pop("draft_device", "npu")], box, draft=True)
    return Setting(target, part, CURVE, 500)


CHOICE = Choice(20, 7, CandidateSource.BOTH, 64, (1, 2, 4))


def test_the_terms_of_a_round_add_up() -> None:
    terms = plan_round(setting(), CHOICE)
    assert terms.exit_head is not None
    assert terms.round_ms == terms.overlap.target_ms + terms.late_ms + terms.redraft_ms + terms.host_ms
    alone = terms.prefix.ms + terms.exit_head.ms + terms.suffix.ms
    assert terms.overlap.target_ms > alone  # they share a memory
    assert terms.fits
    assert terms.late_ms == 0
    assert terms.tokens == CURVE.tokens_per_round((1, 2, 4), 7)
    assert terms.over_plain == pytest.approx(terms.tokens * terms.plain_ms / terms.round_ms)
    assert terms.needed_tokens * terms.plain_ms == pytest.approx(terms.round_ms)
    assert terms.limit == "the target: bandwidth"


def test_a_memory_of_its_own_leaves_the_target_alone() -> None:
    terms = plan_round(setting(draft_device="cpu"), CHOICE)
    assert terms.exit_head is not None
    assert terms.overlap.target_ms == pytest.approx(terms.prefix.ms + terms.exit_head.ms + terms.suffix.ms)


def test_one_device_for_both_gains_nothing() -> None:
    found = plan_round(setting(draft_device="gpu"), CHOICE)
    assert found.exit_head is not None
    alone = found.prefix.ms + found.exit_head.ms + found.suffix.ms
    drafted = sum(item.ms for item in (found.trunk, *found.rollout))
    assert found.overlap.target_ms == pytest.approx(alone + drafted)  # each has half of it while both run


def test_a_draft_that_wants_part_of_the_device_holds_the_target_up_for_less() -> None:
    found = setting(draft_device="gpu")
    half = Figure(0.5, Basis.ASSUMED, "a test", 0.5, 0.5)
    draft, target = (
        dataclasses.replace(part, device=dataclasses.replace(part.device, draft_use=half))
        for part in (found.draft, found.target)
    )
    some, whole = (plan_round(item, CHOICE) for item in (dataclasses.replace(found, draft=draft, target=target), found))
    assert some.exit_head is not None
    alone = some.prefix.ms + some.exit_head.ms + some.suffix.ms
    assert alone < some.overlap.target_ms < whole.overlap.target_ms
    assert some.overlap.draft_ms < whole.overlap.draft_ms
    assert some.serial_ms == whole.serial_ms  # in turns it has all of it


def test_without_the_exit_head_the_rollout_begins_at_once() -> None:
    terms = plan_round(setting(), dataclasses.replace(CHOICE, source=CandidateSource.DRAFT))
    assert terms.exit_head is None
    assert terms.overlap.draft_ends[1] < terms.prefix.ms


def test_a_draft_that_is_too_slow_is_waited_for() -> None:
    found = setting()
    slow = dataclasses.replace(found.draft, model=found.draft.model.with_layers(4000))
    terms = plan_round(dataclasses.replace(found, draft=slow), CHOICE)
    assert not terms.fits
    assert terms.late_ms > 0
    assert terms.over_plain < 1
    assert terms.limit.startswith("the exposed rollout: ")
    # What had not begun goes on for one branch, where there is one, after the pass in flight.
    begun = len(terms.overlap.draft_ends)
    assert begun == 1
    rest = [PassSize(1, 1, 500), PassSize(2, 2, 500), PassSize(5, 4, 500)]
    rest_ms = sum(slow.time(slow.model.whole(), size).ms for size in rest)
    assert terms.late_ms == pytest.approx(terms.overlap.draft_ms - terms.overlap.target_ms + terms.prepared * rest_ms)


def test_a_draft_reads_the_end_of_a_long_context() -> None:
    short, end, long = (plan_round(dataclasses.replace(setting(), context=n), CHOICE) for n in (500, 2048, 9000))
    assert short.trunk.ms < end.trunk.ms == long.trunk.ms
    assert end.prefix.ms < long.prefix.ms


def test_serial_drafts_then_verifies() -> None:
    terms = plan_round(setting(), CHOICE)
    alone = setting().draft
    passes = [PassSize(3, 1, 500), PassSize(2, 2, 500), PassSize(5, 4, 500)]  # three tokens to read, to the nearest
    drafted = sum(alone.time(alone.model.whole(), size).ms for size in passes)
    verified = setting().target.time(setting().target.model.whole(), PassSize(8, 8, 500)).ms
    assert terms.serial_ms == pytest.approx(drafted + verified + 0.5)


# --- the search -----------------------------------------------------------------------------------

LIMITS = Limits(exit_layers=(20, 27), streams=3, kappa=23)


def test_the_best_come_first_and_beat_a_choice_of_the_grid() -> None:
    best = best_rounds(setting(), LIMITS, 6)
    speeds = [item.over_plain for item in best]
    assert speeds == sorted(speeds, reverse=True)
    assert best[0].over_plain >= plan_round(setting(), CHOICE).over_plain
    assert all(item.choice.branches in BRANCHES for item in best)
    kinds = {(item.choice.source, item.choice.exit_layer, len(item.choice.tokens_per_pass)) for item in best}
    assert len(kinds) == 6


def test_streams_and_kappa_bound_the_choices() -> None:
    best = best_rounds(setting(), Limits((20,), streams=0, kappa=2), 50)
    assert {tokens for item in best for tokens in item.choice.tokens_per_pass} == {1}
    assert all(item.choice.branches <= 2 * (item.choice.gamma + 1) for item in best)


def test_a_larger_draft_needs_more_tokens_to_pay() -> None:
    small, large = draft_sizes(setting(), LIMITS, (1, 24))
    assert small.over_plain > large.over_plain
    assert large.trunk.ms > small.trunk.ms


def test_every_end_of_the_ranges_is_tried() -> None:
    found = list(edges(setting()))
    assert {(edge.target.device.gb_s.value, edge.draft.device.gb_s.value) for edge in found} == {
        (80, 80), (80, 120), (120, 80), (120, 120)
    }  # fmt: skip


# --- the command ----------------------------------------------------------------------------------


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)], prog_name="mirror")


SHAPES = ("--target-shape", "qwen3-14b", "--draft-shape", "qwen3-0.6b", "--draft-layers", 4, "--streams", 3)


def test_a_bundle_is_planned_for_a_box(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    if manifest.model.precision != "fp16":
        pytest.skip("one precision is enough here")
    result = call(folder, "--box", "h200-16-cores", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["given"]["choice"]["exit_layer"] == manifest.decoding.exit_layer
    assert found["given"]["choice"]["gamma"] == manifest.decoding.gamma
    # Candidates are the draft's where the bundle doesn't say, so no exit head runs.
    assert [item["name"] for item in found["given"]["passes"]][:3] == ["target_prefix", "target_suffix", "draft_trunk"]
    assert found["best"][0]["mirror_over_plain"] == max(item["mirror_over_plain"] for item in found["best"])
    low, high = found["over_plain_range"]
    assert low <= found["given"]["mirror_over_plain"] <= high


def test_shapes_need_no_bundle_and_the_table_says_why() -> None:
    result = call("--box", "core-ultra-7-258v", *SHAPES, "--target-precision", "int4-openvino")
    assert result.exit_code == 0, result.output
    assert "mirror/plain" in result.stdout
    assert "target_suffix" in result.stdout
    assert "tokens to equal plain" in result.stdout
    assert "the draft's rollout fits into the target's time; mirror " in result.stderr
    assert "acceptance is that of SmolLM2-135M-Instruct" in result.stderr
    assert "openvino:NPU kernel_us 58.6 (58.6 to 114) is fitted" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing option '--box'"),
        (("--box", "h100-16-cores"), 1, "there is no target to plan for"),
        (("--box", "h100-16-cores", "--target-shape", "qwen3-14b"), 1, "there is no draft model to plan for"),
        (("--box", "pc", *SHAPES), 1, "there is no box 'pc'"),
        (("--box", "h100-16-cores", *SHAPES, "--draft-device", "npu"), 1, "has no device 'npu'"),
        (("--box", "h100-16-cores", *SHAPES, "--exit-layer", "40"), 1, "cut after 1 to 39"),
        (("--box", "h100-16-cores", *SHAPES, "--tokens-per-pass", "5"), 1, "3 streams give 4 at most"),
        (("--box", "h100-16-cores", *SHAPES, "--acceptance", "2"), 1, "acceptance is '2'"),
        (("--box", "core-ultra-7-258v", *SHAPES, "--draft-precision", "fp32"), 1, "has no rate for fp32"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_sentence(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_options_take_the_place_of_what_was_found() -> None:
    options = ("--exit-layer", "25", "--gamma", "3", "--branches", "16", "--tokens-per-pass", "1,2")
    result = call("--box", "h200-16-cores", *SHAPES, *options, "--candidates", "exit", "--json")
    assert json.loads(result.stdout)["given"]["choice"] == {
        "exit_layer": 25,
        "gamma": 3,
        "source": "exit",
        "branches": 16,
        "tokens_per_pass": [1, 2],
    }


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4, 5) + Work(1, 1, 1, 1, 1).times(2) == Work(3, 4, 5, 6, 7)
    assert math.isclose(MODEL.parameters, 8 * MODEL.layer.matrices + MODEL.head.matrices)
