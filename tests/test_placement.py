"""The target's two halves on two devices: same text as on one, in every mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import mirror
from mirror.bundle import Form, read_manifest
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Lane, Mode
from mirror.targets.base import Device, Tensor
from mirror.targets.cpu import CpuDevice
from tests.hooked import HookedDevice, no_hook
from tests.lookup import Lookup, LookupBundle, agreeing_table, oracle_greedy, random_table, write_bundle

TARGET = Lookup(random_table(1, 97, 23))
PROMPT = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draft = Lookup(agreeing_table(TARGET.table, 0.8, 2))
    return write_bundle(
        tmp_path_factory.mktemp("placement") / "bundle", LookupBundle(TARGET, draft, random_table(3, 97, 23))
    )


class Other(HookedDevice):
    """The CPU under another name, in the other cache form."""

    @property
    def name(self) -> str:
        return "other"


def placed(bundle: Path, mode: Mode, target: Device, suffix: Device, *, pinned: bool = False) -> Engine:
    # With the exit's candidates too, so that all segments run.
    options = EngineOptions(mode=mode, pinned=pinned, candidates=CandidateSource.BOTH)
    return Engine(bundle, read_manifest(bundle), options, target, CpuDevice(), suffix_device=suffix)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("forms", [(Form.INPLACE, Form.ROWS), (Form.ROWS, Form.INPLACE)])
@pytest.mark.parametrize("static", [(False, True), (True, False), (True, True)])
def test_halves_of_both_forms_make_the_tables_own_path(
    bundle: Path, mode: Mode, forms: tuple[Form, Form], static: tuple[bool, bool]
) -> None:
    """Where one half takes fixed widths only, both run at those."""
    target = HookedDevice(static=static[0], form=forms[0])
    suffix = Other(static=static[1], form=forms[1])
    with placed(bundle, mode, target, suffix) as engine:
        assert list(engine.generate_tokens(PROMPT, max_new_tokens=40).tokens) == oracle_greedy(TARGET, PROMPT, 40)


def test_each_segment_runs_where_it_was_placed(bundle: Path) -> None:
    ran: dict[str, set[str]] = {"cpu": set(), "other": set()}

    def note(device: str) -> HookedDevice:
        def hook(name: str, feeds: Mapping[str, Tensor]) -> None:
            ran[device].add(name)
            if name == "target_suffix":
                assert isinstance(feeds["hidden_states"], np.ndarray)  # it came through the host

        return (HookedDevice if device == "cpu" else Other)(hook)

    with placed(bundle, Mode.MIRROR, note("cpu"), note("other")) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=10)
    assert ran == {"cpu": {"target_prefix", "exit_head"}, "other": {"target_suffix"}}
    assert result.devices[Lane.TARGET] == "cpu and other"


def test_the_suffix_goes_with_the_target_unless_told(bundle: Path) -> None:
    with Engine(bundle, read_manifest(bundle), EngineOptions(mode=Mode.PLAIN), Other(no_hook), CpuDevice()) as engine:
        assert engine.generate_tokens(PROMPT, max_new_tokens=4).devices[Lane.TARGET] == "other"


@pytest.mark.parametrize("devices", [("cpu", "openvino:CPU"), ("openvino:CPU", "cpu")])
def test_two_runtimes_make_one_target(bundle: Path, devices: tuple[str, str]) -> None:
    pytest.importorskip("openvino")
    expected = oracle_greedy(TARGET, PROMPT, 30)
    for mode in ("plain", "serial", "mirror"):
        with mirror.load(bundle, mode=mode, target_device=devices[0], suffix_device=devices[1]) as engine:
            assert list(engine.generate_tokens(PROMPT, max_new_tokens=30).tokens) == expected


@pytest.fixture(scope="module", params=["fp32", "int8"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny real model, in one precision."""
    pytest.importorskip("torch")
    from mirror.export.build import ExportOptions, export_bundle
    from tests.families import make_checkpoint

    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint("llama", folder / "checkpoint", eos_token_id=None)
    options = ExportOptions(max_length=96, prefill_chunk=8, gamma=3, draft="layers:0,3", precision=request.param)
    export_bundle(str(checkpoint), folder / request.param, options)
    return folder / request.param


def varied(engine: Engine) -> tuple[int, ...]:
    """Return a text that isn't one token for ever."""
    result = engine.generate_tokens(PROMPT, max_new_tokens=48, temperature=1.0, repetition_penalty=2.0, seed=3)
    assert len(set(result.tokens)) > 10
    return result.tokens


def test_a_real_model_says_on_two_devices_what_it_says_on_one(real: Path) -> None:
    pytest.importorskip("openvino")
    if real.name != "fp32":
        pytest.skip("other precisions round differently on another device")
    with mirror.load(real, mode="plain", threads=1) as engine:
        expected = varied(engine)
    for mode in ("plain", "mirror"):
        for target, suffix in (("cpu", "openvino:CPU"), ("openvino:CPU", "cpu")):
            with mirror.load(real, mode=mode, target_device=target, suffix_device=suffix, threads=1) as engine:
                assert varied(engine) == expected


@pytest.mark.parametrize("forms", [(Form.INPLACE, Form.ROWS), (Form.ROWS, Form.INPLACE)])
def test_one_placement_makes_one_text_in_every_mode(real: Path, forms: tuple[Form, Form]) -> None:
    target, suffix = CpuDevice(forms[0]), Other(no_hook, form=forms[1])
    texts = []
    for mode in Mode:
        with placed(real, mode, target, suffix, pinned=True) as engine:
            texts.append(varied(engine))
    assert texts[0] == texts[1] == texts[2]
