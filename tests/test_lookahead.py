"""Passes of a rollout, and streams on lookup models whose whole context matters."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirror.bundle import read_manifest
from mirror.errors import RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.lookahead import BranchPass, branch_passes, branches_at, rollout_capacity
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from tests.hooked import HookedDevice
from tests.lookup import Lookup, LookupBundle, open_engine, oracle_greedy, oracle_logits, random_table, write_bundle

MODEL = Lookup(random_table(4, 97, 13))
STREAMS = 3
CONTEXT = np.array([1, 2, 3, 4, 5])


def test_passes_read_what_the_last_one_gave() -> None:
    assert branch_passes((3, 2, 2), 7) == (BranchPass(1, 3), BranchPass(3, 2), BranchPass(2, 2))
    assert [item.rows for item in branch_passes((3, 2, 2), 7)] == [3, 4, 3]
    assert branch_passes((1,), 3) == (BranchPass(1, 1),) * 3
    assert branch_passes((1, 4), 7) == (BranchPass(1, 1), BranchPass(1, 4), BranchPass(4, 2))
    assert branch_passes((4,), 2) == (BranchPass(1, 2),)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 9))
def test_passes_give_the_depth_and_fit_the_capacity(tokens: list[int], depth: int, branches: int) -> None:
    passes = branch_passes(tokens, depth)
    assert sum(item.gives for item in passes) == depth
    slots = sum(branches * item.rows for item in passes)
    assert rollout_capacity(20, depth, branches, tokens) >= 20 + depth + 1 + slots - 1


def test_later_passes_may_take_fewer_branches() -> None:
    assert [branches_at(number, 9, (8, 4)) for number in range(4)] == [8, 4, 4, 4]
    assert [branches_at(number, 3, (8, 4)) for number in range(2)] == [3, 3]
    assert branches_at(5, 9, ()) == 9


def test_a_cache_has_room_for_the_branches_that_go_on_and_for_a_proposals_streams() -> None:
    whole = rollout_capacity(20, 4, 10, (1,))
    assert whole - rollout_capacity(20, 4, 10, (1,), (10, 5, 2)) == 5 + 8 + 8
    assert rollout_capacity(20, 4, 10, (1,), most_given=4) == whole + 3


def streamed(tokens: Sequence[int], passes: Sequence[BranchPass], vocab: int) -> list[int]:
    """Return what the model alone would give, pass by pass, its streams written as the ids past the vocabulary."""
    line = list(tokens)
    for item in passes:
        ahead = [int(np.argmax(oracle_logits(MODEL, [*line, *range(vocab, vocab + s)]))) for s in range(item.gives)]
        line += ahead
    return line[len(tokens) :]


def load(folder: Path, tokens_per_pass: tuple[int, ...], *, static: bool) -> Draft:
    manifest = read_manifest(folder)
    options = EngineOptions(candidates=CandidateSource.DRAFT, tokens_per_pass=tokens_per_pass)
    plan = make_plan(manifest, options, shared_cpu=True)
    return load_draft(folder, manifest, HookedDevice(lambda name, feeds: None, static=static), plan)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = LookupBundle(MODEL, MODEL, gamma=5, kappa=2, streams=STREAMS)
    return write_bundle(tmp_path_factory.mktemp("streams") / "b", spec)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tokens_per_pass", [(1,), (2,), (4, 1), (1, 4), (3, 2)])
def test_streams_see_what_they_should(bundle: Path, tokens_per_pass: tuple[int, ...], static: bool) -> None:
    draft = load(bundle, tokens_per_pass, static=static)
    passes = branch_passes(tokens_per_pass, 5)
    context = CONTEXT
    for _ in range(3):
        expected = streamed(context.tolist(), passes, MODEL.vocab_size)
        assert draft.propose(context, 5, None).read().tokens == tuple(expected)
        window = np.array([context[-1], *expected])
        rollout = draft.roll_out(context, window, 5, Meeting(), None)
        assert len(rollout.branches) == 12
        for row, (accepted, token) in enumerate(
            zip(rollout.branches.accepted.tolist(), rollout.branches.next_tokens.tolist(), strict=True)
        ):
            line = [*context.tolist(), *expected[:accepted], token]
            assert rollout.continuations[row].tolist() == streamed(line, passes, MODEL.vocab_size)
        # The trunk's own rows are right again after a refused window.
        context = np.array([*context.tolist(), expected[0], (expected[1] + 1) % 13])


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_targets_own(bundle: Path, mode: Mode, temperature: float) -> None:
    texts = []
    for chosen, options in ((Mode.PLAIN, None), (mode, (2, 3)), (mode, (4,))):
        with open_engine(bundle, EngineOptions(mode=chosen, tokens_per_pass=options)) as engine:
            result = engine.generate_tokens([1, 2, 3], max_new_tokens=40, temperature=temperature, seed=5)
            assert not result.events
            texts.append(result.tokens)
    assert texts[0] == texts[1] == texts[2]
    if temperature == 0.0:
        assert list(texts[0]) == oracle_greedy(MODEL, [1, 2, 3], 40)


def test_more_tokens_than_streams_are_refused(bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"tokens_per_pass is \(5,\); the draft has 3 streams"):
        open_engine(bundle, EngineOptions(tokens_per_pass=(5,)))
