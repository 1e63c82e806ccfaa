"""The draft's rollout by itself: what it does once the outcome is known, and which tokens it may use."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mirror.bundle import read_manifest
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode, Outcome
from mirror.targets.base import Tensor
from tests.hooked import HookedDevice
from tests.lookup import Lookup, LookupBundle, open_engine, oracle_greedy, random_table, write_bundle

MODEL = Lookup(random_table(4, 97, 13))
CONTEXT = np.array([1, 2, 3, 4, 5])


class _Watched:
    """A draft whose passes are noted; `decide_after` decides the outcome when that many branch passes began."""

    def __init__(self, folder: Path, **options: tuple[int, ...]) -> None:
        self.widths: list[int] = []
        self.meeting = Meeting()
        self.decide_after = -1
        self.outcome = Outcome(0, 0)
        manifest = read_manifest(folder)
        plan = make_plan(manifest, EngineOptions(candidates=CandidateSource.DRAFT, **options), shared_cpu=True)
        self.draft: Draft = load_draft(folder, manifest, HookedDevice(self._note), plan)

    def _note(self, name: str, feeds: Mapping[str, Tensor]) -> None:
        row_branch = np.asarray(feeds["row_branch"])
        if name == "draft" and row_branch[0] >= 0:
            self.widths.append(row_branch.size)
            if len(self.widths) == self.decide_after:
                self.meeting.decide(self.outcome)


@pytest.fixture
def watched(tmp_path: Path) -> _Watched:
    return _Watched(write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, gamma=3, kappa=2)))


def _window(draft: Draft) -> np.ndarray:
    return np.array([CONTEXT[-1], *draft.propose(CONTEXT, 3, None).read().tokens])


def test_all_branches_go_on_while_the_outcome_is_open(watched: _Watched) -> None:
    rollout = watched.draft.roll_out(CONTEXT, _window(watched.draft), 3, watched.meeting, None)
    assert watched.widths == [8, 8, 8]
    assert rollout.lengths.tolist() == [3] * 8


def test_only_the_taken_branch_goes_on_once_the_outcome_is_known(watched: _Watched) -> None:
    window = _window(watched.draft)
    whole = watched.draft.roll_out(CONTEXT, window, 3, Meeting(), None)
    watched.decide_after = 1
    pairs = zip(whole.branches.accepted.tolist(), whole.branches.next_tokens.tolist(), strict=True)
    for watched.outcome in [Outcome(accepted, token) for accepted, token in pairs]:
        watched.meeting = Meeting()
        watched.widths.clear()
        narrowed = watched.draft.roll_out(CONTEXT, window, 3, watched.meeting, None)
        assert watched.widths == [8, 1, 1]
        assert sorted(narrowed.lengths.tolist()) == [1] * 7 + [3]
        accepted = window[1 : 1 + watched.outcome.accepted].tolist()
        expected = oracle_greedy(MODEL, [*CONTEXT, *accepted, watched.outcome.next_token], 3)
        assert narrowed.find(watched.outcome) == whole.find(watched.outcome) == tuple(expected)


def test_only_the_likeliest_branches_go_on_in_passes_for_fewer(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, gamma=3, kappa=2))
    whole, narrowing = _Watched(folder), _Watched(folder, branches_per_pass=(6, 4, 1))
    window = _window(whole.draft)
    everything = whole.draft.roll_out(CONTEXT, window, 3, Meeting(), None)
    narrowing.draft.read(CONTEXT)
    found = narrowing.draft.roll_out(CONTEXT, window, 3, Meeting(), None)
    assert narrowing.widths == [6, 4, 1]
    # First the first candidate of each position, then the second ones.
    assert found.lengths.tolist() == [3, 1, 2, 1, 2, 2]
    for accepted, token in zip(found.branches.accepted, found.branches.next_tokens, strict=True):
        outcome = Outcome(int(accepted), int(token))
        tokens = found.find(outcome)
        assert tokens is not None
        assert everything.find(outcome)[: len(tokens)] == tokens


def test_a_branch_that_is_taken_goes_on_in_passes_for_fewer(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, gamma=3, kappa=2))
    watched = _Watched(folder, branches_per_pass=(8, 4, 1))
    window = _window(watched.draft)
    whole = watched.draft.roll_out(CONTEXT, window, 3, Meeting(), None)
    watched.widths.clear()
    watched.decide_after = 1
    watched.outcome = Outcome(int(whole.branches.accepted[-1]), int(whole.branches.next_tokens[-1]))
    taken = watched.draft.roll_out(CONTEXT, window, 3, watched.meeting, None)
    assert watched.widths == [8, 1, 1]
    assert taken.lengths.tolist() == [1] * 7 + [3]


def test_a_branch_without_a_token_is_not_prepared(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, gamma=3, kappa=2))
    watched = _Watched(folder, branches_per_pass=(1,))
    rollout = watched.draft.roll_out(CONTEXT, _window(watched.draft), 3, Meeting(), None)
    assert rollout.branches.accepted.tolist() == [0]
    assert rollout.lengths.tolist() == [3]


def test_nothing_goes_on_once_no_branch_fits(watched: _Watched) -> None:
    watched.decide_after = 2
    watched.outcome = Outcome(9, 9)
    rollout = watched.draft.roll_out(CONTEXT, _window(watched.draft), 3, watched.meeting, None)
    assert watched.widths == [8, 8]
    assert rollout.find(watched.outcome) is None


def test_nothing_begins_once_it_is_abandoned(watched: _Watched) -> None:
    window = _window(watched.draft)
    watched.meeting.abandon()
    watched.draft.roll_out(CONTEXT, window, 3, watched.meeting, None)
    assert watched.widths == []
    # And what the draft has read is still right.
    assert watched.draft.propose(CONTEXT, 3, None).read().tokens == tuple(window[1:].tolist())


@pytest.mark.parametrize("draft_vocab", [9, 17])
@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_a_draft_with_a_padded_vocabulary_proposes_only_what_the_target_has(
    tmp_path: Path, draft_vocab: int, mode: Mode
) -> None:
    draft = Lookup(random_table(6, 97, draft_vocab))
    folder = write_bundle(tmp_path / "b", LookupBundle(MODEL, draft, random_table(5, 97, 13)))
    with open_engine(folder, EngineOptions(mode=mode)) as engine:
        result = engine.generate_tokens([1, 2, 3], max_new_tokens=40)
    assert list(result.tokens) == oracle_greedy(MODEL, [1, 2, 3], 40)
    assert not result.events
