"""This package's own CPU kernels: a random draft's passes against numpy, on every instruction set that this CPU has."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mirror.bundle import Form, Graph, LayerKV, Segment, TensorSpec, read_manifest
from mirror.errors import BundleError, DeviceError
from mirror.export.build import ExportOptions, export_bundle
from mirror.export.recut import PROGRAM_FILE
from mirror.runtime.engine import Engine
from mirror.runtime.feeds import NO_BRANCH, TRUNK_ROW, FeedPool, PassFeeds
from mirror.runtime.loading import Placement, load_draft, make_plan, memory_needs
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.targets import list_devices
from mirror.targets.base import LoadedSegment, LoadRequest, PassShape
from mirror.targets.cpu import CpuDevice
from mirror.targets.draft_program import Embedding, Matrix, Program, ProgramLayer, read_program
from mirror.targets.kernel_library import KERNELS, VARIABLE, PackedDraft, chosen_kernels, kernels_here, kernels_missing
from mirror.targets.kernel_segment import KernelSegment
from mirror.targets.onnxruntime_session import OnnxRuntimeSegment
from tests.draft_reference import Reference, given
from tests.families import make_checkpoint

Array = np.ndarray

HERE = [kernels for kernels in KERNELS if kernels_here(kernels) is not None]
CAPACITY, TOP = 160, 7

_MISSING = kernels_missing() or ""
_MAY_BE_MISSING = _MISSING.startswith("this CPU") or shutil.which("c++") is None or not sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(not HERE and _MAY_BE_MISSING, reason=_MISSING)


@dataclass(frozen=True)
class Sizes:
    """A draft's sizes; the defaults fit no block of any kernel."""

    hidden: int = 80
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 112
    layers: int = 2
    vocabulary: int = 53
    tokens: int = 61
    streams: int = 2
    positions: int = 200
    biased: bool = True
    normed: bool = False
    trimmed: bool = True
    stored: str = "float32"


def random_program(sizes: Sizes, seed: int = 0) -> Program:
    random = np.random.default_rng(seed)

    def floats(*shape: int, around: float = 0) -> Array:
        return (around + 0.2 * random.standard_normal(shape)).astype(np.float32)

    def matrix(rows: int, columns: int, *, biased: bool = False) -> Matrix:
        values = random.integers(-127, 128, (rows, columns), dtype=np.int8)
        scales = (random.random(columns) + 0.5).astype(np.float32) / np.float32(60 * np.sqrt(rows))
        return Matrix(values, scales, floats(columns) if biased else None)

    def silent(given: Matrix) -> Matrix:
        return Matrix(given.values, given.scales * 0, None)

    heads, kv_heads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layers = tuple(
        ProgramLayer(
            attention_norm=floats(sizes.hidden, around=1),
            query_norm=floats(sizes.head_dim, around=1) if sizes.normed else None,
            key_norm=floats(sizes.head_dim, around=1) if sizes.normed else None,
            mlp_norm=floats(sizes.hidden, around=1),
            qkv=matrix(sizes.hidden, heads + 2 * kv_heads, biased=sizes.biased),
            output=matrix(heads, sizes.hidden, biased=sizes.biased),
            gate_up=matrix(sizes.hidden, 2 * sizes.inner),
            down=matrix(sizes.inner, sizes.hidden),
        )
        for _ in range(sizes.layers)
    )
    # Where there are many, the last ones say nothing: a number that is rounded the other way would reach every row.
    layers = (
        *layers[:2],
        *(dataclasses.replace(layer, output=silent(layer.output), down=silent(layer.down)) for layer in layers[2:]),
    )
    angles = np.arange(sizes.positions)[:, None] * 100.0 ** (-np.arange(sizes.head_dim // 2) / sizes.head_dim)
    named = ("hidden", "heads", "kv_heads", "head_dim", "inner", "tokens", "streams", "positions")
    return Program(
        sizes={name: getattr(sizes, name) for name in named},
        epsilon=1e-5,
        scale=0.3,
        embedding=stored_embedding(sizes, random),
        stream_rows=floats(sizes.streams, sizes.hidden) if sizes.streams else None,
        cosines=np.cos(angles).astype(np.float32),
        sines=np.sin(angles).astype(np.float32),
        layers=layers,
        norm=floats(sizes.hidden, around=1),
        head=matrix(sizes.hidden, sizes.vocabulary),
        vocabulary=random.permutation(sizes.tokens)[: sizes.vocabulary].astype(np.int64) if sizes.trimmed else None,
    )


def stored_embedding(sizes: Sizes, random: np.random.Generator) -> Embedding:
    table = random.standard_normal((sizes.tokens, sizes.hidden)).astype(np.float32)
    if sizes.stored == "bfloat16":
        return Embedding("bfloat16", table.astype(ml_dtypes.bfloat16).view(np.uint16), None, "float32")
    if not sizes.stored.startswith("blocks"):
        return Embedding(sizes.stored, table.astype(sizes.stored), None, "float32")
    bits = int(sizes.stored[-1])
    values = random.integers(0, 256, (sizes.tokens, sizes.hidden * bits // 8), dtype=np.uint8)
    scales = (random.random((sizes.tokens, sizes.hidden // 32)) + 0.1).astype(np.float16) / (2**bits)
    return Embedding(sizes.stored, values, scales.astype(np.float16), "float16")


def segment_of(program: Program, top: int) -> Segment:
    sizes = program.sizes
    outputs = [TensorSpec("token_ids", "int64", (1, "rows"))]
    if top:
        outputs += [TensorSpec(name, "int64", (1, "rows", top)) for name in ("candidate_ids", "candidate_logprobs")]
    kv = tuple(LayerKV(i, sizes["kv_heads"], sizes["head_dim"], "float32") for i in range(len(program.layers)))
    return Segment("draft", kv, {Form.INPLACE: Graph("", (), tuple(outputs))}, program="p")


class Pair:
    """A program on the kernels and in numpy, over a cache each."""

    def __init__(self, program: Program, kernels: str, threads: int) -> None:
        draft = PackedDraft(program, threads, kernels)
        self.exact = kernels != "amx"  # whose attention is in bfloat16
        self.program = program
        # More layers make more of what one scale for a whole row takes from its small numbers.
        self.reference = Reference(program, CAPACITY, fine=len(program.layers) > 8 and kernels != "amx")
        self.segments = {top: KernelSegment(segment_of(program, top), draft) for top in (0, TOP)}
        self.cache = CpuDevice().make_cache(segment_of(program, 0).kv, CAPACITY)
        self.pool = FeedPool(CAPACITY, program.sizes["positions"])
        self.past = 0

    def line(self, count: int) -> PassFeeds:
        """Return the feeds of the next tokens of a line."""
        feeds = self.pool.at(count)
        feeds.fill_causal((np.arange(count) * 7 + self.past) % self.program.sizes["tokens"], self.past)
        return feeds

    def branches(self, base: int, count: int, real: int, streams: int) -> tuple[PassFeeds, Array]:
        """Return the feeds of branches' rows behind a trunk of `base` slots, and the rows that are wanted."""
        each, tokens = real + streams, self.program.sizes["tokens"]
        ids = (np.arange(count * each) * 5 % tokens).reshape(count, each)
        ids[:, real:] = tokens + np.arange(streams)
        starts = base - np.arange(count) % 4
        owners = np.repeat(np.arange(count), each)
        self.pool.slot_branch[self.past : self.past + count * each] = owners
        places = (starts[:, None] + self.past - base + np.arange(each)).reshape(-1)
        feeds = self.pool.at(count * each)
        feeds.fill_rows(ids.reshape(-1), places, np.repeat(starts, each), owners, self.past)
        wanted = (np.arange(count) * each)[:, None] + np.arange(real - 1, each)
        return feeds, wanted.reshape(-1)

    def check(self, feeds: PassFeeds, wanted: Array) -> None:
        """Run a pass in both, asking for candidates and for tokens alone, and go on behind it."""
        logits = self.reference.logits(feeds, self.past, wanted)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        known = {**feeds.tensors, "logit_rows": wanted}
        run = self.segments[TOP].run(known, self.cache, self.past)
        names = "candidate_ids", "candidate_logprobs", "token_ids"
        candidates, scores, likeliest = (np.array(run[name])[0] for name in names)
        places = candidates
        if self.program.vocabulary is not None:
            places = np.argsort(self.program.vocabulary)[np.searchsorted(np.sort(self.program.vocabulary), candidates)]
        expected = -np.sort(-logprobs, axis=-1)[:, : candidates.shape[1]]
        apart = np.maximum(np.abs(scores - expected), np.abs(scores - np.take_along_axis(logprobs, places, -1))).max(-1)
        # A number between two steps of the rounding may go either way, and takes its row along.
        assert apart.max() < (0.1 if self.exact else 0.5)
        assert (apart < (1e-3 if self.exact else 0.05)).mean() > 0.8
        np.testing.assert_array_equal(likeliest, candidates[:, 0])
        alone = self.segments[0].run(known, self.cache, self.past)["token_ids"]
        np.testing.assert_array_equal(np.array(alone)[0], likeliest)
        self.past += feeds.width


VARIANTS = {
    "llama": Sizes(),
    "qwen3": Sizes(biased=False, normed=True, head_dim=32, streams=0, trimmed=False, vocabulary=64, tokens=64),
    "many heads": Sizes(heads=9, kv_heads=3, head_dim=64, hidden=192, vocabulary=600, tokens=700),
    "one head": Sizes(heads=1, kv_heads=1, head_dim=48, layers=1, biased=False),
    "halves": Sizes(stored="float16", layers=1),
    "brain floats": Sizes(stored="bfloat16", layers=1),
    "4 bits": Sizes(stored="blocks_4", hidden=96, layers=1),
    "8 bits": Sizes(stored="blocks_8", hidden=64, layers=1),
    "many layers": Sizes(layers=9, hidden=144, inner=208),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernels", HERE)
def test_passes_are_what_numpy_computes(kernels: str, variant: str) -> None:
    pair = Pair(random_program(VARIANTS[variant]), kernels, threads=2)
    for count in (1, 37, 5):
        pair.check(pair.line(count), np.arange(count))
    base = pair.past
    streams = VARIANTS[variant].streams
    for count, real, following in ((9, 1, 0), (9, 1, streams), (3, 2, streams)):
        feeds, wanted = pair.branches(base, count, real, following)
        pair.check(feeds, wanted)
        # A stream is seen by its own pass alone.
        each = real + following
        pair.pool.slot_branch[pair.past - feeds.width : pair.past].reshape(count, each)[:, real:] = NO_BRANCH
    pair.past = base
    pair.pool.slot_branch[:] = NO_BRANCH
    pair.check(pair.line(8), np.array([7, 0]))


@pytest.mark.parametrize("alike", [[kernels for kernels in HERE if kernels != "amx"], [*HERE[:1]]])
def test_threads_and_instruction_sets_agree_to_the_last_bit(alike: list[str]) -> None:
    program, found = random_program(Sizes()), []
    for kernels, threads in itertools.product(alike, (1, 2, 3)):
        pair = Pair(program, kernels, threads)
        for count in range(1, 17):
            feeds = pair.line(count)
            tensors = {**feeds.tensors, "logit_rows": np.arange(count)}
            outputs = pair.segments[TOP].run(tensors, pair.cache, pair.past)
            pair.past += count
        found.append(np.array(outputs["candidate_logprobs"]))
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_padding_rows_and_wide_ids_change_nothing() -> None:
    """Rows that see nothing of their own, ids past the streams, positions past the tables."""
    pair = Pair(random_program(Sizes()), HERE[0], threads=1)
    pair.check(pair.line(6), np.arange(6))
    feeds = pair.pool.at(4)
    feeds.fill_rows(np.array([3]), np.array([500]), np.array([6]), np.array([TRUNK_ROW]), 6)
    given(feeds, "input_ids")[0, 1:] = 10**6
    outputs = pair.segments[0].run({**feeds.tensors, "logit_rows": np.array([0])}, pair.cache, 6)
    logits = pair.reference.logits(_within(pair, feeds), 6, np.array([0]))
    assert pair.program.vocabulary is not None
    assert np.array(outputs["token_ids"])[0, 0] == pair.program.vocabulary[logits[0].argmax()]


def _within(pair: Pair, feeds: PassFeeds) -> PassFeeds:
    given(feeds, "input_ids")[0, 1:] = pair.program.sizes["tokens"]
    return feeds


@pytest.mark.parametrize(("past", "capacity"), [(CAPACITY - 3, CAPACITY), (0, CAPACITY - 8)])
def test_a_pass_that_does_not_fit_is_refused(past: int, capacity: int) -> None:
    pair = Pair(random_program(Sizes(layers=1)), HERE[0], threads=1)
    feeds = pair.line(4)
    tensors = {**feeds.tensors, "logit_rows": np.arange(4), "slot_branch": pair.pool.slot_branch[:capacity]}
    with pytest.raises(DeviceError, match="can't run 4 rows after"):
        pair.segments[0].run(tensors, pair.cache, past)


def test_sizes_that_no_kernel_takes_are_refused() -> None:
    program = random_program(Sizes(layers=1))
    with pytest.raises(DeviceError, match="can't run a draft of"):
        PackedDraft(dataclasses.replace(program, sizes={**program.sizes, "head_dim": 24}), 1, HERE[0])


# --- the choice -------------------------------------------------------------------------------------


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert chosen_kernels() == HERE[0]
    for kernels in HERE:
        monkeypatch.setenv(VARIABLE, kernels)
        assert chosen_kernels() == kernels
    monkeypatch.setenv(VARIABLE, "off")
    assert chosen_kernels() is None
    monkeypatch.setenv(VARIABLE, "sse2")
    with pytest.raises(DeviceError, match="MIRROR_KERNELS is sse2; give one of amx, avx512, avx2, off"):
        chosen_kernels()
    missing = [kernels for kernels in KERNELS if kernels not in HERE]
    if missing:
        monkeypatch.setenv(VARIABLE, missing[0])
        with pytest.raises(DeviceError, match=f"is {missing[0]} and this CPU's best are {HERE[0]}; leave it unset"):
            chosen_kernels()


def test_devices_say_who_runs_drafts() -> None:
    (cpu,) = (device for device in list_devices() if device.name == "cpu")
    assert f"drafts by mirror's kernels ({HERE[0]})" in cpu.description


# --- in an engine -----------------------------------------------------------------------------------


class Recording(CpuDevice):
    """The CPU, which notes what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, LoadedSegment] = {}

    def load_segment(self, request: LoadRequest) -> LoadedSegment:
        loaded = self.loaded[request.segment.name] = super().load_segment(request)
        return loaded


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    sizes = {"hidden_size": 64, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 4}
    checkpoint = make_checkpoint("llama", folder / "c", **sizes)
    options = ExportOptions(draft="layers:0,3", int8_draft=True, gamma=3, kappa=4, max_length=64)
    export_bundle(str(checkpoint), folder / "b", options)
    return folder / "b"


def test_an_engine_takes_them_and_keeps_the_text(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for choice, mode in itertools.product(("off", *HERE), (Mode.PLAIN, Mode.SERIAL, Mode.MIRROR)):
        monkeypatch.setenv(VARIABLE, choice)
        drafts, options = Recording(), EngineOptions(mode=mode, threads=2)
        with Engine(bundle, read_manifest(bundle), options, CpuDevice(), drafts) as engine:
            texts.append(engine.generate_tokens([3, 5, 7, 9], max_new_tokens=24).tokens)
        if mode is not Mode.PLAIN:
            expected = OnnxRuntimeSegment if choice == "off" else KernelSegment
            assert {type(segment) for segment in drafts.loaded.values()} == {expected}
    assert all(text == texts[0] for text in texts)


def test_segments_share_their_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    manifest = read_manifest(bundle)
    device, held = Recording(), {}
    for name in ("draft", "draft_trunk"):
        segment = dataclasses.replace(manifest.segments[f"{name}_int8"], name=name)
        device.load_segment(LoadRequest(bundle, segment, [PassShape(1)], 64, 1))
    first, second = device.loaded.values()
    assert isinstance(first, KernelSegment)
    assert isinstance(second, KernelSegment)
    assert first.draft is second.draft
    plan = make_plan(manifest, EngineOptions(mode=Mode.MIRROR), shared_cpu=True)
    for choice in ("off", HERE[0]):
        monkeypatch.setenv(VARIABLE, choice)
        needs = memory_needs(bundle, manifest, Placement(device, device, device), plan)["cpu"]
        held[choice] = {need.name: need.weight_bytes for need in needs}
    assert held["off"]["draft_trunk"] > held[HERE[0]]["draft_trunk"] == 0
    assert held["off"]["draft"] == held[HERE[0]]["draft"] > 0


def test_a_program_that_can_not_be_read_is_refused(bundle: Path, tmp_path: Path) -> None:
    program = json.loads((bundle / PROGRAM_FILE).read_text(encoding="utf-8"))
    for broken, said in (
        ({name: value for name, value in program.items() if name != "norm"}, "not a draft's program .KeyError.'norm'"),
        ({**program, "norm": {**program["norm"], "file": "weights/none.bin"}}, "not a draft's program .FileNotFound"),
        ({**program, "inner": 64}, "a tensor is int8 .64, 96., the sizes mean int8 .64, 128."),
        ({**program, "norm": {**program["norm"], "dtype": "float16"}}, "a tensor is float16 .64., .* float32 .64."),
    ):
        (tmp_path / PROGRAM_FILE).write_text(json.dumps(broken), encoding="utf-8")
        for name in ("weights", "weights/mirror.bin"):
            if not (tmp_path / name).exists():
                (tmp_path / name).symlink_to(bundle / name)
        with pytest.raises(BundleError, match=said):
            read_program(tmp_path, PROGRAM_FILE)


def test_a_program_of_a_later_format_leaves_the_draft_to_its_graphs(bundle: Path, tmp_path: Path) -> None:
    later = tmp_path / "b"
    shutil.copytree(bundle, later)
    program = json.loads((later / PROGRAM_FILE).read_text(encoding="utf-8"))
    (later / PROGRAM_FILE).write_text(json.dumps({"format": program["format"] + 1}), encoding="utf-8")
    segment = read_manifest(later).segments["draft_int8"]
    loaded = CpuDevice().load_segment(LoadRequest(later, segment, [PassShape(1)], 64, 1))
    assert isinstance(loaded, OnnxRuntimeSegment)


def test_a_rollout_that_has_the_cores_to_itself_stays_awake(bundle: Path) -> None:
    """Beside a target on another device. Where both share the CPU, the target wants the cores once a draft ends."""
    spared: dict[bool, list[bool]] = {}

    class Noting(CpuDevice):
        def load_segment(self, request: LoadRequest) -> LoadedSegment:
            spared.setdefault(shared, []).append(request.spare)
            return super().load_segment(request)

    manifest = read_manifest(bundle)
    for shared in (True, False):
        plan = make_plan(manifest, EngineOptions(mode=Mode.MIRROR, threads=2), shared_cpu=shared)
        plan = dataclasses.replace(plan, target_threads=2, draft_threads=2 if shared else 1)
        load_draft(bundle, manifest, Noting(), plan)
    assert spared == {True: [False, False], False: [True, True]}


def test_an_installation_with_a_compiler_has_built_them() -> None:
    assert _MISSING == ""
