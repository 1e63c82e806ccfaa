"""Drafts that add the target's noise on their device: the same guesses as on the host, nothing waits between passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mirror.bundle import NOISE_POSITIONS, NOISY_TOKENS, read_manifest
from mirror.errors import DeviceError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.loading import Placement, load_draft, make_plan, memory_needs
from mirror.runtime.model_draft import ModelDraft
from mirror.runtime.noise import gumbel, uniforms
from mirror.runtime.noise_table import NoiseTable
from mirror.runtime.options import EngineOptions
from mirror.runtime.proposal import Proposal
from mirror.runtime.records import Mode
from mirror.runtime.sampling import HEAD_TOKENS, CoupledNoise
from mirror.summary import summarize
from mirror.targets.base import Array, Device
from mirror.targets.cpu import CpuDevice
from mirror.targets.onnxruntime_session import Memory, make_buffer
from tests.lookup import Lookup, LookupBundle, agreeing_table, open_engine, random_table, write_bundle
from tests.streams import FakeStream
from tests.test_guesses import launching

VOCAB = 13
MODEL = Lookup(random_table(4, 97, VOCAB))
CONTEXT = np.array([1, 2, 3, 4, 5])
NOISE = CoupledNoise(7, 0.9)


class _Table:
    """A table in host memory that notes which rows are written, and when it is waited for."""

    def __init__(self, columns: int) -> None:
        self.tensor = make_buffer(Memory(), "float32", (NOISE_POSITIONS, columns))
        self.log: list[int | str] = []

    def write(self, row: int, values: Array) -> None:
        self.log.append(row)
        self.tensor.numpy()[row] = values

    def wait(self) -> None:
        self.log.append("wait")


def _row(noise: CoupledNoise, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    return gumbel(uniforms(noise.seed, position, tokens)).astype(np.float32)


def test_each_position_is_drawn_once_and_lies_in_its_row() -> None:
    tokens = np.array([3, 1, 40_000])
    table = _Table(3)
    noise = NoiseTable(table, tokens)
    feeds = noise.feeds(NOISE, np.array([70, 66, 70]))
    assert table.log == ["wait", 2, 6]
    assert feeds["noise_rows"].tolist() == [6, 2, 6]  # type: ignore[union-attr]
    assert np.asarray(feeds["inverse_temperature"])[0] == pytest.approx(1 / 0.9)
    assert np.array_equal(table.tensor.numpy()[6], _row(NOISE, 70, tokens))
    noise.draw(NOISE, np.array([66, 67, 70]))
    assert table.log[3:] == [3]


def test_as_many_tokens_get_noise_as_in_the_targets_draws() -> None:
    assert NOISY_TOKENS == HEAD_TOKENS


def test_another_answers_noise_takes_the_rows_of_the_last_one() -> None:
    tokens = np.arange(3)
    table = _Table(3)
    noise = NoiseTable(table, tokens)
    noise.draw(NOISE, np.array([5]))
    other = CoupledNoise(8, 0.5)
    feeds = noise.feeds(other, np.array([5]))
    assert table.log == ["wait", 5, "wait", 5]
    assert np.array_equal(table.tensor.numpy()[5], _row(other, 5, tokens))
    assert np.asarray(feeds["inverse_temperature"])[0] == 2.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # Every token is a candidate, so that the host, which orders candidates alone, orders all.
    return write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, gamma=3, kappa=VOCAB - 1, samples=True))


def _draft(folder: Path, device: Device) -> Draft:
    manifest = read_manifest(folder)
    options = EngineOptions(candidates=CandidateSource.DRAFT, fanout=(3, 2, 1, 2))
    return load_draft(folder, manifest, device, make_plan(manifest, options, shared_cpu=True))


def test_a_device_guesses_draws_as_the_host_does_and_nothing_waits_between_passes(folder: Path) -> None:
    stream, began = FakeStream(), []
    launched, plain = _draft(folder, launching(stream, began)), _draft(folder, CpuDevice())
    for turn in range(3):
        noise = CoupledNoise(turn // 2, 0.9)
        proposals = [draft.propose(CONTEXT, 3, noise).read().tokens for draft in (launched, plain)]
        assert proposals[0] == proposals[1]
        window = np.array([CONTEXT[-1], *proposals[0]])
        stream.log.clear()
        began.clear()
        rollouts = [draft.roll_out(CONTEXT, window, 3, Meeting(), noise) for draft in (launched, plain)]
        assert rollouts[0].branches.next_tokens.tolist() == rollouts[1].branches.next_tokens.tolist()
        assert np.array_equal(rollouts[0].continuations, rollouts[1].continuations)
    assert stream.log[began[1] :].count("spread") == 2  # into the second pass over branches and the third


def test_rows_that_passes_under_way_look_at_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest window that is drawn for on the device: what is drawn ahead must not come around the ring to it."""
    gamma = (NOISE_POSITIONS - 2) // 2
    spec = LookupBundle(MODEL, MODEL, gamma=gamma, kappa=2, max_length=200, samples=True)
    folder = write_bundle(tmp_path / "b", spec)
    manifest, drawn = read_manifest(folder), list[int]()
    options = EngineOptions(candidates=CandidateSource.DRAFT, fanout=(1,) + (0,) * gamma)
    draft = load_draft(folder, manifest, launching(FakeStream(), []), make_plan(manifest, options, shared_cpu=True))
    draw = NoiseTable.draw
    monkeypatch.setattr(
        NoiseTable, "draw", lambda table, noise, all_: (drawn.extend(all_), draw(table, noise, all_))[1]
    )
    first = CONTEXT.size  # the position that both look at first
    window = np.array([CONTEXT[-1], *draft.propose(CONTEXT, gamma, NOISE).read().tokens])
    assert (min(drawn), max(drawn)) == (first, first + gamma - 1)
    for work in (
        lambda: draft.roll_out(CONTEXT, window, gamma, Meeting(), NOISE),
        lambda: draft.draw_ahead(NOISE, first, 2 * NOISE_POSITIONS),
    ):
        drawn.clear()
        work()
        assert first == min(drawn)
        assert first + gamma < max(drawn) < first + NOISE_POSITIONS


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_nothing_is_drawn_while_the_target_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode) -> None:
    spec = LookupBundle(MODEL, Lookup(agreeing_table(MODEL.table, 0.5, 2)), kappa=4, max_length=160, samples=True)
    folder, drawn, proposing = write_bundle(tmp_path / "b", spec), list[bool](), [False]
    propose = ModelDraft.propose

    def noted(*given: Any) -> Proposal:
        proposing[0] = True
        found = propose(*given)
        proposing[0] = False
        return found

    monkeypatch.setattr(ModelDraft, "propose", noted)
    draw = CoupledNoise.gumbel_at
    monkeypatch.setattr(CoupledNoise, "gumbel_at", lambda *given: (drawn.append(proposing[0]), draw(*given))[1])
    with open_engine(folder, EngineOptions(mode=mode), draft=launching(FakeStream(), [])) as engine:
        result = engine.generate_tokens([1, 2, 3], max_new_tokens=60, temperature=0.9, seed=5)
    assert sum(item.accepted for item in result.rounds) > 0
    assert drawn
    assert not any(drawn)


def test_drawn_texts_are_the_plain_ones_on_a_device_that_adds_the_noise(tmp_path: Path) -> None:
    draft = Lookup(agreeing_table(MODEL.table, 0.8, 2))
    spec = LookupBundle(MODEL, draft, random_table(3, 97, VOCAB), kappa=4, max_length=160, samples=True)
    folder = write_bundle(tmp_path / "b", spec)
    stream: list[int] = []
    with open_engine(folder, EngineOptions(mode=Mode.MIRROR), draft=launching(FakeStream(), stream)) as engine:
        results = {
            mode: engine.generate_tokens([1, 2, 3], max_new_tokens=140, temperature=0.9, seed=5, mode=mode)
            for mode in Mode
        }
    assert len({result.tokens for result in results.values()}) == 1
    assert not any(result.events for result in results.values())
    accepted = results[Mode.SERIAL].statistics.draft_tokens_accepted
    assert accepted > 40, "a draft that shares the noise guesses draws"


def test_only_a_device_that_launches_passes_gets_the_graph(folder: Path) -> None:
    manifest, seen = read_manifest(folder), []

    def names(device: Device) -> set[str]:
        plan = make_plan(manifest, EngineOptions(mode=Mode.MIRROR), shared_cpu=True)
        needs = memory_needs(folder, manifest, Placement(CpuDevice(), CpuDevice(), device), plan)
        return {item.name for items in needs.values() for item in items}

    assert "draft_sampled" in names(launching(FakeStream(), seen))
    assert "draft_sampled" not in names(CpuDevice())
    with pytest.raises(DeviceError, match="cpu waits for each pass"):
        CpuDevice().make_table(2, 2)


def test_a_wide_window_is_left_to_the_host(tmp_path: Path) -> None:
    spec = LookupBundle(MODEL, MODEL, gamma=40, kappa=2, max_length=200, samples=True)
    folder = write_bundle(tmp_path / "b", spec)
    manifest = read_manifest(folder)
    plan = make_plan(manifest, EngineOptions(mode=Mode.MIRROR, fanout=(1,) + (0,) * 40), shared_cpu=True)
    device = launching(FakeStream(), [])
    needs = memory_needs(folder, manifest, Placement(CpuDevice(), CpuDevice(), device), plan)
    assert "draft_sampled" not in {item.name for items in needs.values() for item in items}


def test_a_summary_counts_what_every_device_loads(folder: Path) -> None:
    found = summarize(folder)
    weights = {item.name: item.weight_bytes for item in found.segments}
    assert weights["draft_sampled"] > 0
    assert found.draft_memory is not None
    assert found.draft_memory.weight_bytes == weights["draft"] + weights["draft_trunk"]
