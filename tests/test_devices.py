"""Device names, what is there, and what is said about what isn't."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

import mirror
from mirror.bundle import Form, Segment, read_manifest
from mirror.errors import DeviceError
from mirror.runtime.feeds import FeedPool
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.targets import (
    DeviceFamily,
    DeviceInfo,
    DeviceName,
    cuda,
    cuda_driver,
    list_devices,
    open_device,
    parse_device_name,
    survey,
)
from mirror.targets.base import LoadRequest, PassShape
from mirror.targets.names import Precision
from mirror.targets.onnxruntime_session import Buffer, Memory
from tests.lookup import Lookup, LookupBundle, agreeing_table, open_engine, oracle_greedy, random_table, write_bundle
from tests.rows_graph import write_segment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", DeviceName(DeviceFamily.CPU)),
        (" CPU ", DeviceName(DeviceFamily.CPU)),
        ("cuda:0", DeviceName(DeviceFamily.CUDA, "0")),
        ("cuda:12", DeviceName(DeviceFamily.CUDA, "12")),
        ("openvino:CPU", DeviceName(DeviceFamily.OPENVINO, "CPU")),
        ("openvino:npu", DeviceName(DeviceFamily.OPENVINO, "NPU")),
        ("openvino:GPU.1", DeviceName(DeviceFamily.OPENVINO, "GPU.1")),
        ("openvino:CPU:bf16", DeviceName(DeviceFamily.OPENVINO, "CPU", Precision.BF16)),
    ],
)
def test_names(text: str, expected: DeviceName) -> None:
    assert parse_device_name(text) == expected


def test_a_name_is_written_without_its_precision() -> None:
    assert str(parse_device_name("openvino:gpu.1:f32")) == "openvino:GPU.1"
    assert str(parse_device_name("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no device is called ''"),
        ("gpu", "no device is called 'gpu'; the names are cpu, cuda:0"),
        ("cuda", "doesn't say which cuda device"),
        ("cuda:", "doesn't say which cuda device"),
        ("cuda:one", "doesn't say which cuda device"),
        ("cuda:00", "doesn't say which cuda device"),
        ("cuda:-1", "doesn't say which cuda device"),
        ("openvino", "doesn't say which openvino device"),
        ("openvino:TPU", "openvino:NPU"),
        ("cpu:0", "doesn't say which cpu device"),
        ("openvino:CPU:int8", "the choices are f32, f16, bf16"),
        ("cuda:0:f16", "write a part above 0 and below 1"),
        ("openvino:CPU:f32:x", "the choices are f32, f16, bf16"),
    ],
)
def test_names_that_are_none(text: str, says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        open_device(text)


def test_the_cpu_is_always_there() -> None:
    device = open_device("cpu")
    assert (device.name, device.form) == ("cpu", Form.INPLACE)
    assert list_devices()[0].name == "cpu"


def test_the_list_says_of_every_device_what_it_can_do_or_what_is_missing() -> None:
    devices = list_devices()
    families = {parse_device_name(device.name).family for device in devices}
    assert families == set(DeviceFamily)
    for device in devices:
        assert device.available == (device.reason is None)
        assert device.available == bool(device.description and device.runtime and device.version and device.segments)


def test_what_the_list_offers_opens_and_what_it_misses_does_not() -> None:
    for device in list_devices():
        if device.available:
            assert open_device(device.name).name == device.name
        else:
            with pytest.raises(DeviceError) as caught:
                open_device(device.name)
            assert device.reason is not None
            assert device.reason in str(caught.value)


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the OpenVINO packages from the search for them."""
    find = importlib.util.find_spec
    hidden = ("openvino", "onnxruntime_ep_openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))


@pytest.mark.usefixtures("without_openvino")
def test_a_missing_package_is_named_with_its_command() -> None:
    with pytest.raises(DeviceError, match=r'openvino:NPU isn.t there: .*pip install "mirror-sd\[openvino\]"'):
        open_device("openvino:NPU")
    missing = [device for device in list_devices() if device.name.startswith("openvino")]
    assert [device.name for device in missing] == ["openvino:CPU", "openvino:GPU", "openvino:NPU"]
    assert all(device.reason and survey.INSTALL_OPENVINO in device.reason for device in missing)


def test_listing_does_not_import_a_package_that_is_not_installed() -> None:
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if 'openvino' in name else find(name)\n"
        "from mirror.targets import list_devices\n"
        "list_devices()\n"
        "print('openvino' in sys.modules)"
    )
    assert _run(code) == "False"


def test_importing_the_package_loads_no_runtime() -> None:
    code = "import sys, mirror.targets; print({'onnxruntime', 'openvino', 'numpy'} & set(sys.modules))"
    assert _run(code) == "{'numpy'}"


def test_onnxruntime_reports_no_usage(tmp_path: Path) -> None:
    """ONNX Runtime's own switch only works before its import; its report leaves files in the home folder."""
    home = {**os.environ, "HOME": str(tmp_path)}
    home.pop("ORT_DISABLE_TELEMETRY", None)
    _run("from mirror.targets import open_device; open_device('cpu')", home)
    assert list(tmp_path.iterdir()) == []


def _run(code: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    return done.stdout.strip()


# NVIDIA GPUs: everything but a session that runs.


class _NoStream:
    """A stream of a GPU that isn't there; nothing is ever copied on it."""

    def __init__(self, index: int, *, urgent: bool, share: float = 1.0) -> None:
        self.handle = 1000 * index + urgent
        self.share = share


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the driver list two GPUs, and onnxruntime claim its CUDA provider."""
    monkeypatch.setattr(cuda, "CudaStream", _NoStream)
    monkeypatch.setattr(cuda, "driver_gpus", lambda: ("NVIDIA A", "NVIDIA B"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: [cuda.PROVIDER, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda **_: None)


@pytest.mark.skipif(cuda.cuda_missing() is None, reason="this machine has a GPU")
def test_cuda_is_missing_with_what_to_do() -> None:
    with pytest.raises(DeviceError, match=r"cuda:0 isn't there: .*; (run: pip install|install the driver)"):
        open_device("cuda:0")


def test_a_build_without_cuda_names_the_other_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert cuda.INSTALL_CUDA in (cuda.cuda_missing() or "")


def test_a_build_with_cuda_and_no_gpu_names_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [cuda.PROVIDER])
    monkeypatch.setattr(cuda, "driver_gpus", lambda: ())
    assert "the NVIDIA driver lists no GPU" in (cuda.cuda_missing() or "")


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_listed_and_opened_by_index() -> None:
    listed = [device for device in list_devices() if device.name.startswith("cuda")]
    without = "; by ONNX Runtime's kernels alone: "
    found = [(device.name, device.description.partition(without)[0]) for device in listed]
    assert found == [("cuda:0", "NVIDIA A"), ("cuda:1", "NVIDIA B")]
    device = open_device("cuda:1")
    assert (device.name, device.form) == ("cuda:1", Form.INPLACE)
    with pytest.raises(DeviceError, match=r"cuda:2 isn't there: the driver lists cuda:0 \(NVIDIA A\), cuda:1"):
        open_device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
def test_a_part_of_a_gpu_is_asked_for_by_name() -> None:
    def share(name: str) -> float:
        device = open_device(name, background=True)
        assert isinstance(device, cuda.CudaDevice)
        assert device.name == name[:6]
        return device.stream.share  # type: ignore[attr-defined,no-any-return]

    assert [share(name) for name in ("cuda:0", "cuda:1:0.25", "cuda:0:.5")] == [1.0, 0.25, 0.5]
    for wrong in ("cuda:0:1", "cuda:0:0.0", "cuda:0:1.5", "cuda:0:half", "cuda:0:-.5"):
        with pytest.raises(DeviceError, match=r"write a part above 0 and below 1, as in cuda:0:0\.25"):
            open_device(wrong)


@pytest.mark.parametrize("missing", ["cuGreenCtxStreamCreate", None])
def test_a_driver_without_parts_of_gpus_gives_none(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        """A driver before 550: either it lacks the calls, or they fail."""

        def __getattr__(self, name: str) -> Callable[..., int]:
            if name == missing:
                raise AttributeError(name)
            return lambda *arguments: 801  # not supported

    monkeypatch.setattr(cuda_driver, "load_driver", Driver)
    assert cuda_driver.part_stream(0, 40, -5) is None
    assert cuda_driver.multiprocessors(0) is None


def test_a_gpu_keeps_its_tensors_and_float32() -> None:
    provider = cuda.cuda_provider(1, _NoStream(1, urgent=False))  # type: ignore[arg-type]
    assert provider.memory == Memory("cuda", 1)
    assert provider.options["device_id"] == "1"
    assert provider.options["use_tf32"] == "0"
    assert provider.sized_inputs == {"total_sequence_length"}
    assert provider.options["user_compute_stream"] == "1000"


@pytest.mark.skipif(cuda.cuda_missing() is None, reason="this machine has a GPU")
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_falls_back_to_the_cpu_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime builds it on the CPU with a warning; here the provider is missing for real."""
    rows = write_segment(tmp_path)
    segment = Segment(rows.name, rows.kv, {Form.INPLACE: rows.graphs[Form.ROWS]})
    with pytest.raises(DeviceError, match=r"CUDAExecutionProvider but got CPUExecutionProvider"):
        open_device("cuda:0").load_segment(LoadRequest(tmp_path, segment, [PassShape(1)], 8, 1))


class _Session:
    """Stands for a session that loaded; `left` are the operators that don't run on the GPU."""

    def __init__(self, left: tuple[str, ...]) -> None:
        self._left = left

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        nodes = [SimpleNamespace(op_type=name) for name in self._left]
        gpu = SimpleNamespace(ep_name=cuda.PROVIDER, get_nodes=lambda: [SimpleNamespace(op_type="GroupQueryAttention")])
        return [gpu, SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]


@pytest.fixture
def without_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sessions load without a GPU."""

    def session_on(self: cuda.CudaDevice, provider: cuda.Provider, path: Path, options: object) -> _Session:
        return _Session(("GroupQueryAttention",) if path.stem == "float32" else ("Range", "Cast"))

    monkeypatch.setattr(cuda.CudaDevice, "_session_on", session_on)


def _request(capacity: int) -> LoadRequest:
    return LoadRequest(Path("bundle"), Segment("target_prefix", (), {}), [PassShape(8)], capacity, 1)


@pytest.mark.usefixtures("two_gpus", "without_sessions")
def test_attention_that_would_run_on_the_cpu_is_refused() -> None:
    """It would copy the whole cache to the host and back in every layer, unsaid."""
    device = open_device("cuda:0")
    assert isinstance(device, cuda.CudaDevice)
    with pytest.raises(DeviceError, match=r"cuda:0 computes attention in fp16 and bf16.*--precision fp16, bf16"):
        device._open_session(Path("float32.onnx"), _request(512))
    assert device._open_session(Path("half.onnx"), _request(512))[1].replays


@pytest.mark.usefixtures("two_gpus", "without_sessions")
def test_long_caches_are_attended_by_flash_attention() -> None:
    """Of two kernels on Hopper the one serves short contexts, the other long ones; a session has one."""
    device = open_device("cuda:0")
    assert isinstance(device, cuda.CudaDevice)
    short, long = (device._open_session(Path("half.onnx"), _request(capacity))[1] for capacity in (2048, 8192))
    assert "sdpa_kernel" not in short.options
    assert long.options == {**short.options, "sdpa_kernel": "3"}


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    cuda.driver_gpus.cache_clear()
    monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
    assert cuda.driver_gpus() == ()
    cuda.driver_gpus.cache_clear()


def test_device_facts_are_plain_values() -> None:
    info = DeviceInfo("openvino:NPU", available=False, reason="why")
    assert (info.description, info.segments) == ("", "")


# Whole generations on lookup-table bundles, whose tokens tell any wrong slot, branch or stale row.

GPU = pytest.mark.gpu
PAIRS = [
    ("cpu", "openvino:CPU"),
    ("openvino:CPU", "cpu"),
    ("openvino:CPU", "openvino:CPU"),
    pytest.param("cuda:0", "cpu", marks=GPU),
    pytest.param("cuda:0", "openvino:CPU", marks=GPU),
    pytest.param("cuda:0", "cuda:0", marks=GPU),
    pytest.param("cuda:0", "cuda:0:0.25", marks=GPU),
    pytest.param("cuda:0", "cuda:1", marks=GPU),
    pytest.param("cuda:1", "cuda:0", marks=GPU),
]


def _needs(*names: str) -> None:
    """Skip where a GPU of these isn't there, or openvino isn't installed."""
    if any(name.startswith("openvino") for name in names):
        pytest.importorskip("openvino", reason=survey.INSTALL_OPENVINO)
    gpus = [int(name.split(":")[1]) for name in names if name.startswith("cuda")]
    if gpus and max(gpus) >= len(cuda.driver_gpus()):
        pytest.skip(f"no cuda:{max(gpus)} here")


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_a_pair_of_devices_gives_the_plain_text(target: str, draft: str, mode: Mode, tmp_path: Path) -> None:
    _needs(target, draft)
    table = random_table(1, 97, 23)
    spec = LookupBundle(Lookup(table), Lookup(agreeing_table(table, 0.7, 2)), random_table(3, 97, 23))
    bundle = write_bundle(tmp_path / "bundle", spec)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    expected = oracle_greedy(spec.target, prompt, 40)
    with open_engine(
        bundle,
        EngineOptions(mode=mode, threads=2),
        target=open_device(target),
        draft=open_device(draft, background=True),
    ) as engine:
        assert list(engine.generate_tokens(prompt, max_new_tokens=40).tokens) == expected
        # The first prompt's start again: a cache that was rolled back.
        assert list(engine.generate_tokens(prompt[:4], max_new_tokens=9).tokens) == oracle_greedy(
            spec.target, prompt[:4], 9
        )


@GPU
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("suffix", ["cuda:1", "cpu"])
def test_a_suffix_on_another_device_gives_the_plain_text(suffix: str, mode: Mode, tmp_path: Path) -> None:
    _needs("cuda:0", suffix)
    table = random_table(1, 97, 23)
    spec = LookupBundle(Lookup(table), Lookup(agreeing_table(table, 0.7, 2)), random_table(3, 97, 23))
    bundle = write_bundle(tmp_path / "bundle", spec)
    with mirror.load(
        bundle, mode=mode.value, target_device="cuda:0", suffix_device=suffix, draft_device="cuda:0"
    ) as engine:
        assert list(engine.generate_tokens([1, 2, 3], max_new_tokens=40).tokens) == oracle_greedy(
            spec.target, [1, 2, 3], 40
        )


@GPU
def test_a_drafts_part_of_a_gpu_is_about_what_was_asked_for() -> None:
    _needs("cuda:0")
    whole = cuda_driver.multiprocessors(0)
    device = open_device("cuda:0:0.4", background=True)
    assert isinstance(device, cuda.CudaDevice)
    assert isinstance(device.stream, cuda.CudaStream)
    assert whole is not None
    assert 0.2 * whole < (device.stream.multiprocessors or whole) < 0.8 * whole


@GPU
def test_a_gpu_keeps_what_it_computes(tmp_path: Path) -> None:
    """The exit layer's state goes from prefix to suffix without visiting the host."""
    bundle = write_bundle(tmp_path / "bundle", LookupBundle(Lookup(random_table(1, 97, 23))))
    device = open_device("cuda:0")
    prefix = read_manifest(bundle).segments["target_prefix"]
    loaded = device.load_segment(LoadRequest(bundle, prefix, [PassShape(3)], 8, 1))
    feeds = FeedPool(8, 100).at(3)
    feeds.fill_causal(np.array([4, 5, 6]), 0)
    outputs = loaded.run(feeds.tensors, device.make_cache(prefix.kv, 8), 0)
    assert isinstance(outputs["hidden_states"], Buffer)
    assert outputs["hidden_states"].value.device_name().lower() == "cuda"
    assert outputs["hidden_states"].numpy()[0, :, 0].tolist() == [4, 5, 6]
