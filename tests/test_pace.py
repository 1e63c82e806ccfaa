"""Rollouts take as many branches as the box has time for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import mirror
from mirror.bundle import Settings, read_manifest, write_manifest
from mirror.runtime.draft import Meeting
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.options import EngineOptions
from mirror.runtime.pace import BranchPace
from mirror.runtime.records import Mode, Outcome
from mirror.targets.cpu import CpuDevice
from tests.lookup import Lookup, LookupBundle, agreeing_table, random_table, write_bundle
from tests.streams import FakeStream, streamed

MODEL = Lookup(random_table(1, 97, 23))
WINDOW = np.array([7, 8, 9, 10])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    draft = Lookup(agreeing_table(MODEL.table, 0.6, 2))
    folder = write_bundle(tmp_path / "bundle", LookupBundle(MODEL, draft, gamma=3, kappa=5))
    write_manifest(folder, dataclasses.replace(read_manifest(folder), settings=Settings(adapt_branches=True)))
    return folder


def test_late_rollouts_take_fewer_branches_and_early_ones_more_again() -> None:
    pace = BranchPace(64)
    assert [pace.first(64), pace.later(3, 64)] == [64, 64]
    pace.note(0.02, 1.0)  # hardly late
    assert pace.first(64) == 64
    for _ in range(5):
        pace.note(0.1, 1.0)
    few = pace.first(64)
    assert few == 38
    assert [pace.later(number, few) for number in range(4)] == [38, 23, 14, 8]
    for _ in range(50):
        pace.note(0.1, 1.0)
    assert pace.first(64) == 8
    assert pace.later(7, 8) == 1
    pace.note(-0.05, 1.0)  # hardly early
    assert pace.first(64) == 8
    for _ in range(100):
        pace.note(-0.2, 1.0)
    assert pace.first(64) == 64


def test_few_branches_are_all_taken() -> None:
    pace = BranchPace(5)
    for _ in range(50):
        pace.note(1.0, 1.0)
    assert pace.first(5) == 5


def test_a_draft_learns_from_when_its_rollouts_ended(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    plan = make_plan(manifest, EngineOptions(mode=Mode.MIRROR, threads=1, max_length=64), shared_cpu=True)

    def branches(device: object, *, late: bool | None) -> list[int]:
        draft = load_draft(bundle, manifest, device, plan)  # type: ignore[arg-type]
        counts = []
        for _ in range(4):
            meeting = Meeting()
            rollout = draft.roll_out(np.array([3, 5, 7]), WINDOW, 3, meeting, None)
            counts.append(len(rollout.branches))
            meeting.decide(Outcome(0, 1))
            if late is None:
                meeting.abandon()
            else:
                meeting.decided_s = 0.0 if late else 1e12
        return counts

    assert branches(CpuDevice(), late=True) == [20, 18, 17, 15]
    assert branches(CpuDevice(), late=False) == [20] * 4
    assert branches(CpuDevice(), late=None) == [20] * 4  # nobody waited for them
    # Fewer branches would be padding in passes of fixed widths.
    assert branches(streamed(FakeStream()), late=True) == [20] * 4


def test_what_is_counted_out_is_done_so(bundle: Path) -> None:
    manifest = read_manifest(bundle)

    def adapts(settings: Settings = manifest.settings, **options: object) -> bool:
        given = EngineOptions(**options)  # type: ignore[arg-type]
        return make_plan(dataclasses.replace(manifest, settings=settings), given, shared_cpu=True).adapt_branches

    assert adapts()
    assert adapts(gamma=2)
    assert not adapts(kappa=3)
    assert not adapts(fanout=(3, 2, 1, 1))
    assert not adapts(branches_per_pass=(8, 4))
    assert not adapts(Settings())
    assert not adapts(Settings(adapt_branches=True, branches_per_pass=(8, 4)))


def test_the_text_is_plains(bundle: Path) -> None:
    texts = []
    for mode in ("plain", "mirror"):
        with mirror.load(bundle, mode=mode, threads=1) as engine:
            texts.append(engine.generate_tokens([1, 2, 3], max_new_tokens=40).tokens)
    assert texts[0] == texts[1]
