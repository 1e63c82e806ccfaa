"""`mirror compile`: artefacts beside the segments, picked up where they fit, said and ignored where not.

And mirror mode end to end with the draft on the Hexagon NPU's emulator, with its faults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import logging
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tokenizers
from click.testing import CliRunner
from tokenizers import models, pre_tokenizers

pytest.importorskip("torch")

import mirror.targets.qnn as qnn_module
from mirror.bench.prompts import Prompt
from mirror.bundle import (
    MANIFEST_NAME,
    Manifest,
    check_files,
    read_manifest,
    write_manifest,
)
from mirror.cli import main
from mirror.compile.ahead import CompileReport, compile_bundle
from mirror.errors import BundleError, DeviceError, ExportError, RequestError
from mirror.export.build import ExportOptions, export_bundle
from mirror.export.npu_quantize import WeightBits, quantize_draft
from mirror.export.recut import recut_bundle
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.targets import open_compiler, open_device
from mirror.targets.artefacts import Quantized
from mirror.targets.base import Device, LoadRequest, PassShape, Tensor
from mirror.targets.cpu import CpuDevice
from mirror.targets.survey import virtual_npus
from mirror.targets.watched import Pass, WatchedDevice
from tests.families import VOCAB, make_checkpoint

needs_emulator = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None or platform.machine() not in ("x86_64", "AMD64"),
    reason='needs onnxruntime-qnn on x86-64: pip install "mirror-sd[qnn]"',
)
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")

OPTIONS = EngineOptions(mode=Mode.MIRROR, threads=1, max_length=32, fanout=(2, 1, 1))
PROMPT, NEW_TOKENS = [5, 17, 3, 60], 16


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    checkpoint = make_checkpoint("llama", folder / "tiny")
    options = ExportOptions(draft="layers:0,1,3", gamma=2, kappa=2, max_length=64)
    export_bundle(str(checkpoint), folder / "bundle", options)
    return folder / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@contextlib.contextmanager
def engine_on(bundle: Path, draft: Device, options: EngineOptions = OPTIONS) -> Iterator[Engine]:
    with Engine(bundle, read_manifest(bundle), options, CpuDevice(), draft) as engine:
        yield engine


def say_nothing(line: str) -> None:
    """Take a line."""


def compile_for(bundle: Path, device: str) -> CompileReport:
    return compile_bundle(bundle, open_compiler(device), OPTIONS, say_nothing)


def edit(bundle: Path, **changes: Any) -> None:
    """Change every artefact's record."""
    manifest = read_manifest(bundle)
    segments = {
        name: dataclasses.replace(
            segment, compiled=tuple(dataclasses.replace(item, **changes) for item in segment.compiled)
        )
        for name, segment in manifest.segments.items()
    }
    write_manifest(bundle, dataclasses.replace(manifest, segments=segments))


def plain_tokens(bundle: Path) -> list[int]:
    with engine_on(bundle, CpuDevice(), dataclasses.replace(OPTIONS, mode=Mode.PLAIN)) as engine:
        return list(engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS).tokens)


# End to end.


@needs_emulator
def test_a_draft_on_the_npu_gives_the_plain_text_and_is_of_use(bundle: Path) -> None:
    with engine_on(bundle, open_device("qnn:htp")) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS)
        sampled = engine.generate_tokens(PROMPT, max_new_tokens=8, temperature=1.0, seed=3)
        assert list(sampled.tokens) == list(
            engine.generate_tokens(PROMPT, max_new_tokens=8, temperature=1.0, seed=3, mode="plain").tokens
        )
    assert list(result.tokens) == plain_tokens(bundle)
    assert "qnn:emulator" in result.devices.values()
    assert result.events == ()
    with engine_on(bundle, CpuDevice()) as engine:
        on_cpu = engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS)
    assert [item.accepted for item in result.rounds] == [item.accepted for item in on_cpu.rounds]
    assert sum(item.accepted for item in result.rounds) > 0


def _emulator(number: int, fault: Callable[[], None]) -> Device:
    """Return the emulator, with something happening before a pass, by its number, and every later one."""
    counted = itertools.count(1)

    def watch(item: Pass) -> Mapping[str, Tensor]:
        if next(counted) >= number:
            fault()
        return item.run()

    return WatchedDevice(open_device("qnn:htp"), watch)


def _break() -> None:
    raise DeviceError("draft failed on QNN: QNN graph execute error. Error code: 6031")


@needs_emulator
@pytest.mark.parametrize("number", [1, 3, 6])  # reading the prompt; in the first round; in a later one
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_npu_that_fails_costs_speed_and_no_text(bundle: Path, number: int, temperature: float) -> None:
    with engine_on(bundle, _emulator(number, _break)) as engine:
        first, again, plain = (
            engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS, temperature=temperature, seed=2, mode=mode)
            for mode in ("mirror", "mirror", "plain")
        )
    assert first.tokens == again.tokens == plain.tokens
    (event,) = first.events
    assert event.kind == "draft_lost"
    assert "QNN graph execute error" in event.message
    assert first.rounds[-1].mode is Mode.PLAIN
    assert {item.mode for item in again.rounds} == {Mode.PLAIN}, "a lost draft is not asked again"


def _wait(event: threading.Event) -> None:
    event.wait(20)


@needs_emulator
def test_an_npu_that_hangs_in_mid_round_is_left_out(bundle: Path) -> None:
    wake = threading.Event()
    hung = dataclasses.replace(OPTIONS, draft_timeout_s=0.2)
    with engine_on(bundle, _emulator(4, lambda: _wait(wake)), hung) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS)
        wake.set()
    assert list(result.tokens) == plain_tokens(bundle)
    assert ["no answer within 0.2 s" in event.message for event in result.events] == [True]


# Artefacts.


@needs_emulator
def test_compiling_twice_does_nothing_the_second_time(bundle: Path) -> None:
    before = read_manifest(bundle)
    first = compile_for(bundle, "qnn:v73")
    assert len(first.made) == 2  # the trunk; all branches' pass, which serves one branch too
    assert not first.kept
    written = (bundle / MANIFEST_NAME).read_bytes()
    second = compile_for(bundle, "qnn:v73")
    assert (len(second.made), len(second.kept), second.bytes) == (0, 2, first.bytes)
    assert (bundle / MANIFEST_NAME).read_bytes() == written
    after = read_manifest(bundle)
    items = [item for segment in after.segments.values() for item in segment.compiled]
    assert {item.device for item in items} == {"qnn:v73"}
    assert all("onnxruntime-qnn" in item.runtime and item.options["htp_arch"] == "73" for item in items)
    new = set(after.files) - set(before.files)
    assert {Path(name).suffix for name in new} == {".onnx", ".bin"}
    assert {item.file for item in items} <= new
    check_every_hash(bundle, after)


def check_every_hash(bundle: Path, manifest: Manifest) -> None:
    from mirror.bundle import check_files

    check_files(bundle, manifest, hashes=True)


@needs_emulator
def test_artefacts_are_picked_up_and_give_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_on(bundle, open_device("qnn:htp")) as engine:
        expected = engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS)
    compile_for(bundle, "qnn:v73")
    opened: list[str] = []
    inner = qnn_module.QnnDevice._open

    def watch(self: qnn_module.QnnDevice, path: Path, options: Any, sizes: Mapping[str, int]) -> Any:
        opened.append(path.parent.name)
        return inner(self, path, options, sizes)

    monkeypatch.setattr(qnn_module.QnnDevice, "_open", watch)
    with engine_on(bundle, open_device("qnn:htp")) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS)
    assert opened == ["qnn-v73"] * 2
    assert [item.accepted for item in result.rounds] == [item.accepted for item in expected.rounds]
    assert result.tokens == expected.tokens


@needs_emulator
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"runtime": "onnxruntime-qnn 2.6.0, onnxruntime 1.30.0"}, "it was made by onnxruntime-qnn 2.6.0"),
        (
            {"options": {"htp_arch": "73"}},
            r"it was compiled with other options \(enable_htp_fp16_precision, soc_model\)",
        ),
        ({"graph_sha256": "0" * 64}, r"draft_trunk\.rows\.onnx has changed since"),
        ({"capacity": 999}, "it is for 999 slots, this engine has"),
        ({"file": "compiled/qnn-v73/gone.onnx"}, "it is missing"),
    ],
)
def test_artefacts_that_do_not_fit_are_said_and_compiled_anew(
    bundle: Path, caplog: pytest.LogCaptureFixture, changes: Mapping[str, Any], says: str
) -> None:
    compile_for(bundle, "qnn:v73")
    edit(bundle, **changes)
    with caplog.at_level(logging.WARNING, logger="mirror"), engine_on(bundle, open_device("qnn:htp")) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=4)
    assert len(result.tokens) == 4
    assert re.search(f"is not used: {says}.*compiling draft_trunk anew", caplog.text)
    remade = compile_for(bundle, "qnn:v73")
    assert len(remade.made) == 2
    assert len(compile_for(bundle, "qnn:v73").kept) == 2


@needs_emulator
def test_a_context_that_the_npu_refuses_is_said_and_compiled_anew(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for item in compile_for(bundle, "qnn:v73").made:
        binary = bundle / item.file.replace(".onnx", "_qnn.bin")
        binary.write_bytes(bytes(binary.stat().st_size))
    with caplog.at_level(logging.WARNING, logger="mirror"), engine_on(bundle, open_device("qnn:htp")) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=4)
    assert len(result.tokens) == 4
    assert "is not used: qnn:emulator can't load" in caplog.text


@needs_emulator
def test_another_architecture_takes_its_own_artefacts_only(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    compile_for(bundle, "qnn:v75")
    device = open_device("qnn:htp")  # v73
    assert isinstance(device, qnn_module.QnnDevice)
    trunk = read_manifest(bundle).segments["draft_trunk"]
    (item,) = trunk.compiled
    shape = PassShape(item.width, item.rows)
    request = LoadRequest(bundle, trunk, [shape], item.capacity, 1)
    assert device.fitting(request, shape) is None
    assert "what is compiled is for qnn:v75, this is qnn:v73; compiling draft_trunk anew" in caplog.text
    other = open_device("qnn:htp:v75")
    assert isinstance(other, qnn_module.QnnDevice)
    assert other.fitting(request, shape) == item
    unnamed = qnn_module.QnnDevice(qnn_module.registered_device(), qnn_module.backend_path(), None)
    assert unnamed.fitting(request, shape) == item, "a real NPU takes what it finds"
    assert other.fitting(request, PassShape(9, 9)) is None
    assert f"what is compiled for qnn:v75 takes {item.width} rows, this pass has 9" in caplog.text


@needs_emulator
def test_a_truncated_artefact_is_named_at_loading(bundle: Path) -> None:
    import mirror

    binary = bundle / compile_for(bundle, "qnn:v73").made[0].file.replace(".onnx", "_qnn.bin")
    binary.write_bytes(binary.read_bytes()[:100])
    with pytest.raises(BundleError, match=rf"{binary.name} has 100 bytes"):
        mirror.load(bundle)


@needs_openvino
def test_openvino_artefacts_are_picked_up_and_kept(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The window's, and that of all branches, which is narrow enough for one branch too.
    assert len(compile_for(bundle, "openvino:CPU").made) == 2
    assert len(compile_for(bundle, "openvino:CPU").kept) == 2
    # A program that isn't one shows that it is what loading takes.
    item = read_manifest(bundle).segments["draft_trunk"].compiled[0]
    (bundle / item.file).write_bytes(b"no program")
    with (
        caplog.at_level(logging.WARNING, logger="mirror"),
        engine_on(bundle, open_device("openvino:CPU", background=True)) as engine,
    ):
        result = engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS)
    assert [message.partition(":")[0] for message in caplog.messages] == [f"{Path(item.file).name} is not used"]
    assert list(result.tokens) == plain_tokens(bundle)
    assert sum(one.accepted for one in result.rounds) > 0


@needs_openvino
def test_openvino_artefacts_are_for_one_processor_and_thread_count(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO imports a program of another machine unseen, so its record is what tells them apart."""
    twelve = dataclasses.replace(OPTIONS, threads=12)  # of which a draft beside the target gets three
    compile_bundle(bundle, open_compiler("openvino:CPU"), twelve, say_nothing)
    with (
        caplog.at_level(logging.WARNING, logger="mirror"),
        engine_on(bundle, open_device("openvino:CPU", background=True), twelve),
    ):
        assert not caplog.messages, "compiling foresees the threads of running"
    made = compile_for(bundle, "openvino:CPU").made
    assert {item.options["INFERENCE_NUM_THREADS"] for item in made} <= {"1", "2"}  # the least on this CPU
    assert all(item.file.endswith(".blob") and " for " in item.runtime for item in made)
    with (
        caplog.at_level(logging.WARNING, logger="mirror"),
        engine_on(bundle, open_device("openvino:CPU", background=True), twelve),
    ):
        pass
    assert "is not used: it was compiled with other options (INFERENCE_NUM_THREADS)" in caplog.text
    caplog.clear()
    edit(bundle, runtime=made[0].runtime.partition(" for ")[0] + " for another processor")
    with (
        caplog.at_level(logging.WARNING, logger="mirror"),
        engine_on(bundle, open_device("openvino:CPU", background=True)) as engine,
    ):
        result = engine.generate_tokens(PROMPT, max_new_tokens=4)
    assert re.search("is not used: it was made by openvino .* for another processor, here is openvino", caplog.text)
    assert list(result.tokens) == plain_tokens(bundle)[:4]


def _lacks(unit: str) -> bool:
    from mirror.targets.openvino import available_units

    return not any(found.partition(".")[0] == unit for found in available_units())


@needs_openvino
def test_intels_npu_is_refused_where_its_compiler_is_not(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _lacks("NPU"):
        pytest.skip("this machine has one")
    monkeypatch.setattr("mirror.targets.openvino.virtual_npus", lambda: ("4000", "5010"))
    done = CliRunner().invoke(main, ["compile", str(bundle), "--for", "openvino:NPU"])
    assert done.exit_code == 1
    assert re.search(
        r"error: openvino:NPU can't be compiled for here: OpenVINO sees no NPU, and its compiler for NPUs "
        r"\(libopenvino_intel_npu_compiler\), which no package on PyPI carries, is not beside it "
        r"\(ONNX Runtime's plugin could name it platforms 4000, 5010\)\nhint: run this on the machine with the NPU",
        done.stderr,
    )
    # Beside a compiler that can't be loaded, or without a platform, OpenVINO's own words are given.
    monkeypatch.setattr("mirror.targets.openvino.has_npu_compiler", lambda: True)
    with pytest.raises(DeviceError, match=r"openvino:NPU can't compile draft_trunk\.rows\.onnx: "):
        compile_for(bundle, "openvino:NPU")
    assert not any(segment.compiled for segment in read_manifest(bundle).segments.values())


@needs_openvino
def test_an_intel_gpu_that_is_not_there_is_refused(bundle: Path) -> None:
    if not _lacks("GPU"):
        pytest.skip("this machine has one")
    done = CliRunner().invoke(main, ["compile", str(bundle), "--for", "openvino:GPU"])
    assert done.exit_code == 1
    assert "error: openvino:GPU isn't there: OpenVINO sees" in done.stderr
    assert "hint: install Intel's GPU driver" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="needs the OpenVINO plugin")
def test_the_plugin_names_npus_that_are_not_here_and_leaves_no_trace() -> None:
    before = len(onnxruntime.get_ep_devices())
    assert virtual_npus() == virtual_npus() != ()
    assert len(onnxruntime.get_ep_devices()) == before


@pytest.mark.parametrize("name", ["cpu", "cuda:0", "qnn:htp", "npu"])
def test_devices_that_take_nothing_compiled_say_so(name: str) -> None:
    with pytest.raises(DeviceError, match=f"nothing is compiled ahead of time for {name}; the choices are qnn:v73"):
        open_compiler(name)


@needs_emulator
def test_a_bundle_without_a_draft_is_refused(exported: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(exported, tmp_path / "alone"))
    write_manifest(alone, dataclasses.replace(read_manifest(alone), draft=None))
    with pytest.raises(RequestError, match="no draft with graphs"):
        compile_for(alone, "qnn:v73")


@needs_emulator
def test_a_new_cut_leaves_nothing_compiled_behind(bundle: Path) -> None:
    assert compile_for(bundle, "qnn:v73").made
    renewed = recut_bundle(bundle, kappa=2)
    assert not any(segment.compiled for segment in renewed.segments.values())
    assert not any(name.startswith("compiled/") for name in renewed.files)
    assert not (bundle / "compiled").exists()
    check_files(bundle, renewed, hashes=True)


@needs_emulator
def test_the_command_compiles_and_reports(bundle: Path) -> None:
    arguments = [
        "compile",
        str(bundle),
        "--for",
        "qnn:v73",
        "--max-length",
        "32",
        "--fanout",
        "2,1,1",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    (report,) = json.loads(done.stdout)["compiled"]
    assert (report["device"], len(report["made"]), report["kept"]) == ("qnn:v73", 2, [])
    again = CliRunner().invoke(main, arguments)
    assert "qnn:v73: 0 compiled, 2 kept as they were" in again.stderr
    assert compile_for(bundle, "qnn:v73").made == (), "the options of the command are those of the engine"


# Quantized weights.


@pytest.fixture
def with_tokenizer(bundle: Path) -> Path:
    """A bundle whose model can be given text: calibration reads prompts."""
    words = tokenizers.Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(bundle / "tokenizer.json"))
    return bundle


def _words(random: np.random.Generator) -> str:
    return " ".join(f"w{word}" for word in random.integers(0, VOCAB, 12))


@needs_emulator
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantized_weights_are_compiled_kept_and_used(
    with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    bundle = with_tokenizer
    random = np.random.default_rng(1)
    prompts = [
        Prompt("words", str(n), " ".join(f"w{word}" for word in random.integers(0, VOCAB, 12))) for n in range(6)
    ]
    monkeypatch.setattr("mirror.compile.calibration.load_prompts", lambda per_kind: prompts)
    monkeypatch.setattr("mirror.compile.calibration.MAX_LENGTH", 64)
    monkeypatch.setattr("mirror.compile.calibration.LONGEST_PROMPT", 40)
    monkeypatch.setattr("mirror.compile.calibration.ANSWER_TOKENS", 12)
    compile_for(bundle, "qnn:v73")
    compiler = open_compiler("qnn:v73")
    report = compile_bundle(bundle, compiler, OPTIONS, say_nothing, weights)
    assert [item.options["weights"] for item in report.made] == [weights] * 2, "those with other weights don't fit"
    assert len(compile_bundle(bundle, compiler, OPTIONS, say_nothing, weights).kept) == 2
    assert not list(bundle.parent.glob(".bundle.*")), "what was made on the way is gone"
    check_every_hash(bundle, read_manifest(bundle))
    device = open_device("qnn:htp")
    assert isinstance(device, qnn_module.QnnDevice)
    item = report.made[0]
    trunk = read_manifest(bundle).segments["draft_trunk"]
    shape = PassShape(item.width, item.rows)
    assert device.fitting(LoadRequest(bundle, trunk, [shape], item.capacity, 1), shape) == item
    with engine_on(bundle, device) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=NEW_TOKENS)
    assert list(result.tokens) == plain_tokens(bundle)
    assert sum(one.accepted for one in result.rounds) > 0


@pytest.mark.parametrize("bits", list(WeightBits))
def test_weights_that_are_not_in_float32_are_refused(tmp_path: Path, bits: WeightBits) -> None:
    """They would stay as they are, unsaid: a cast stands between them and their products."""
    options = ExportOptions(draft="layers:0,1", gamma=2, kappa=2, max_length=64, precision="fp16")
    export_bundle(str(make_checkpoint("llama", tmp_path / "tiny")), tmp_path / "bundle", options)
    with pytest.raises(ExportError, match=rf"not in float32, which is what {bits.value} is made from; export the"):
        quantize_draft(tmp_path / "bundle", tmp_path / "out", bits, {"draft": [], "draft_trunk": []})


@needs_openvino
def test_quantized_weights_are_for_hexagon_alone(with_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirror.compile.ahead._Recorder._quantize", lambda self: Quantized(Path(), {}, "int8"))
    with pytest.raises(DeviceError, match=r"can't be compiled for openvino:CPU; leave --weights out"):
        compile_bundle(with_tokenizer, open_compiler("openvino:CPU"), OPTIONS, say_nothing, "int8")
