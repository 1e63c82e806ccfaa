"""Drafts that read the end of a context: what they see, when they begin anew, and that no text depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from mirror.bundle import KEY_BLOCK, Settings, read_manifest, write_manifest
from mirror.errors import RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.options import EngineOptions
from mirror.runtime.recent_draft import RecentDraft
from mirror.runtime.records import Ints, Mode, Outcome
from mirror.runtime.sampling import CoupledNoise
from mirror.summary import summarize
from mirror.targets.base import Device
from mirror.targets.cpu import CpuDevice
from tests.lookup import Lookup, LookupBundle, open_engine, oracle_greedy, random_table, write_bundle
from tests.streams import FakeStream
from tests.test_guesses import launching

MODEL = Lookup(random_table(4, 97, 13))
TEXT = np.random.default_rng(0).integers(0, 13, 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, gamma=3, kappa=2))


def _draft(folder: Path, limit: int) -> Draft:
    options = EngineOptions(candidates=CandidateSource.DRAFT, draft_context=limit)
    manifest = read_manifest(folder)
    return load_draft(folder, manifest, CpuDevice(), make_plan(manifest, options, shared_cpu=True))


def _seen(draft: Draft, context: Ints) -> list[int]:
    """Return how many of a context's last tokens give what the draft proposes."""
    proposed = draft.propose(context, 3, None).read().tokens
    return [n for n in range(1, context.size + 1) if tuple(oracle_greedy(MODEL, context[-n:].tolist(), 3)) == proposed]


def test_what_is_read_grows_to_the_limit_and_begins_anew_with_half(folder: Path) -> None:
    draft = _draft(folder, 8)
    seen = 0
    for count in range(1, 30):
        seen = seen + 1 if seen < 8 else 4
        assert seen in _seen(draft, TEXT[:count])


def test_a_rollout_continues_what_was_read(folder: Path) -> None:
    draft = _draft(folder, 8)
    for before, count, seen in ((0, 6, 6), (6, 8, 8), (8, 11, 4), (11, 14, 7)):
        context = TEXT[:count]
        draft.keep(before)  # what follows is not what the last window had
        window = np.array([context[-1], *draft.propose(context, 3, None).read().tokens])
        rollout = draft.roll_out(context, window, 3, Meeting(), None)
        assert len(rollout.branches) == 8
        for accepted, token in zip(rollout.branches.accepted, rollout.branches.next_tokens, strict=True):
            end = [*context[-seen:].tolist(), *window[1 : 1 + accepted].tolist(), int(token)]
            assert rollout.find(Outcome(int(accepted), int(token))) == tuple(oracle_greedy(MODEL, end, 3))


@pytest.mark.parametrize(("kept", "count", "seen"), [(0, 5, 5), (15, 17, 4), (19, 21, 5), (0, 30, 4)])
def test_another_context_is_read_anew_where_too_little_is_left(folder: Path, kept: int, count: int, seen: int) -> None:
    draft = _draft(folder, 8)
    draft.read(TEXT[:20])  # the last four of it
    draft.keep(kept)
    other = np.concatenate([TEXT[:kept], (TEXT[kept:] + 1) % 13])[:count]
    assert seen in _seen(draft, other)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_text_depends_on_what_the_draft_reads(folder: Path, mode: Mode, temperature: float) -> None:
    texts = set()
    for limit in (2, 3, 9, None):
        with open_engine(folder, EngineOptions(mode=mode, draft_context=limit)) as engine:
            result = engine.generate_tokens(TEXT[:20].tolist(), max_new_tokens=30, temperature=temperature, seed=3)
            assert not result.events
            texts.add(result.tokens)
    assert len(texts) == 1


@pytest.mark.parametrize("device", [CpuDevice(), launching(FakeStream(), [])], ids=["waits", "launches"])
@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_draws_are_guessed_with_the_noise_of_their_own_positions(tmp_path: Path, mode: Mode, device: Device) -> None:
    """A target that sees its last token alone: a draft like it is right in every draw, wherever it begins to read."""
    chain = Lookup(MODEL.table, context=0)
    folder = write_bundle(tmp_path / "b", LookupBundle(chain, chain, gamma=3, kappa=12, samples=True))
    options = EngineOptions(mode=mode, candidates=CandidateSource.DRAFT, draft_context=8)
    with open_engine(folder, options, draft=device) as engine:
        statistics = engine.generate_tokens(TEXT[:20].tolist(), max_new_tokens=41, temperature=1.0, seed=5).statistics
        assert statistics.acceptance_rate == 1.0


def test_a_cache_has_room_for_what_is_read(folder: Path) -> None:
    manifest = read_manifest(folder)
    whole, recent, more = (
        make_plan(manifest, EngineOptions(draft_context=limit), shared_cpu=True) for limit in (None, 8, 1000)
    )
    blocks = [-(-(read + whole.rollout_slots) // KEY_BLOCK) for read in (manifest.decoding.max_length, 8)]
    assert [whole.draft_capacity, recent.draft_capacity] == [KEY_BLOCK * count for count in blocks]
    assert more.draft_capacity == whole.draft_capacity
    assert recent.target_capacity == whole.target_capacity


def test_a_bundle_may_say_how_much_its_draft_reads(folder: Path) -> None:
    manifest = read_manifest(folder)
    before = summarize(folder).draft_memory
    write_manifest(folder, type(manifest)(**{**vars(manifest), "settings": Settings(draft_context=10)}))
    manifest = read_manifest(folder)
    assert make_plan(manifest, EngineOptions(), shared_cpu=True).draft_context == 10
    assert make_plan(manifest, EngineOptions(draft_context=20), shared_cpu=True).draft_context == 20
    after = summarize(folder).draft_memory
    assert before is not None
    assert after is not None
    assert (before.max_length, after.max_length) == (64, 10)
    slots = {item.name: item.kv_bytes // max(item.slot_bytes, 1) for item in summarize(folder).segments}
    assert (slots["target_prefix"], slots["draft"]) == (64, 10)


def test_a_draft_that_is_fed_reads_all(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, feature_layer=1))
    manifest = read_manifest(folder)
    assert make_plan(manifest, EngineOptions(), shared_cpu=True).draft_context == 64
    told = type(manifest)(**{**vars(manifest), "settings": Settings(draft_context=8)})
    for found, options in ((manifest, EngineOptions(draft_context=8)), (told, EngineOptions())):
        with pytest.raises(RequestError, match=r"draft_context is 8, and this bundle has no draft that reads a cont"):
            make_plan(found, options, shared_cpu=True)


def test_one_token_is_too_few() -> None:
    with pytest.raises(RequestError, match="draft_context is 1; it must be 2 or more"):
        EngineOptions(draft_context=1)


class _Drawn:
    """Notes what noise is to be drawn ahead, in absolute positions."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def draw_ahead(self, noise: CoupledNoise, position: int, count: int) -> None:
        self.positions += (position + noise.skipped + np.arange(count)).tolist()

    def keep(self, length: int) -> None: ...

    def read(self, tokens: Ints) -> None: ...


def test_noise_is_drawn_ahead_where_it_was_asked_for() -> None:
    inner = _Drawn()
    draft = RecentDraft(cast(Draft, inner), 8)
    for count in (5, 20):
        draft.read(TEXT[:count])
        draft.draw_ahead(CoupledNoise(1, 1.0), count + 1, 2)
    assert inner.positions == [6, 7, 21, 22]
