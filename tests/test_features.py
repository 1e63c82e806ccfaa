"""The feature channel: a draft that is fed by the target's exit states gets the right one at the right row."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mirror.bundle import read_manifest
from mirror.errors import BundleError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Meeting
from mirror.runtime.features import FeatureStore
from mirror.runtime.feeds import TRUNK_ROW
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.targets.base import Tensor
from tests.hooked import HookedDevice
from tests.lookup import (
    HIDDEN,
    Lookup,
    LookupBundle,
    agreeing_table,
    open_engine,
    oracle_fed,
    oracle_greedy,
    random_table,
    write_bundle,
)

TARGET = Lookup(random_table(1, 61, 11))
DRAFT = Lookup(random_table(2, 61, 11))


def states(tokens: list[int]) -> np.ndarray:
    """Return the exit states of a context, float32 [tokens, hidden], as the lookup target's prefix gives them."""
    s0 = np.cumsum([token * (1 + position % 7) for position, token in enumerate(tokens)])
    return np.stack([tokens, s0, 0 * s0, 0 * s0], axis=1).astype(np.float32)


def greedy(tokens: list[int], fed: int, count: int) -> list[int]:
    line = list(tokens)
    while len(line) < len(tokens) + count:
        line.append(int(np.argmax(oracle_fed(DRAFT, line, fed))))
    return line[len(tokens) :]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = LookupBundle(TARGET, DRAFT, gamma=3, kappa=2, feature_layer=1)
    return write_bundle(tmp_path_factory.mktemp("fed") / "b", spec)


def test_the_store_gives_the_state_before_where_it_is_known() -> None:
    store = FeatureStore(8, 2, "float32")
    store.put(2, np.array([[1, 2], [3, 4]], np.float32))
    features, rows = store.at(np.array([0, 3, 4, 5]), 4, 6)
    assert rows.tolist() == [0, 1, 1, 0, 0, 0]
    assert features[0].tolist() == [[0, 0], [1, 2], [3, 4], [0, 0], [0, 0], [0, 0]]


def test_every_row_is_fed_by_the_row_before(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    plan = make_plan(manifest, EngineOptions(candidates=CandidateSource.DRAFT), shared_cpu=True)
    draft = load_draft(bundle, manifest, HookedDevice(), plan)
    context = [1, 2, 3, 4, 5]
    for _ in range(3):
        known = len(context) - 1
        draft.see_states(0, states(context[:-1]))
        expected = greedy(context, known, 3)
        assert draft.propose(np.array(context), 3, None).read().tokens == tuple(expected)
        window = [context[-1], *expected]
        meeting = Meeting()
        meeting.state(states([*context[:-1], *window])[known:])
        rollout = draft.roll_out(np.array(context), np.array(window), 3, meeting, None)
        assert len(rollout.branches) == 8
        pairs = zip(rollout.branches.accepted.tolist(), rollout.branches.next_tokens.tolist(), strict=True)
        for row, (accepted, token) in enumerate(pairs):
            line = [*context, *expected[:accepted], token]
            # The candidate's row has the state of the window row that it follows; what comes after has none.
            assert rollout.continuations[row].tolist() == greedy(line, len(line) - 1, 3)
        context = [*context, *expected[:2], (expected[2] + 1) % 11]


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_the_engine_hands_the_states_over(bundle: Path, mode: Mode) -> None:
    """Every fed row of a committed token, in a whole answer, has the target's state at the position before."""
    wrong: list[str] = []
    fed_rows = 0
    line: list[int] = []

    def look(name: str, feeds: Mapping[str, Tensor]) -> None:
        nonlocal fed_rows
        if not name.startswith("draft"):
            return
        features, has = np.asarray(feeds["features"]), np.asarray(feeds["feature_rows"])
        places, truth = np.asarray(feeds["position_ids"])[0], states(line)
        # A window's later rows and a branch's stand behind tokens that the target may refuse.
        committed = has > 0 if name == "draft" else (has > 0) & (places == places[0])
        committed &= np.asarray(feeds["row_branch"]) == TRUNK_ROW
        for row in np.flatnonzero(committed):
            fed_rows += 1
            if features[0, row].tolist() != truth[places[row] - 1].tolist():
                wrong.append(f"{name}: position {places[row]}")

    prompt = [1, 2, 3]
    first = oracle_greedy(TARGET, prompt, 12)
    line[:] = [*prompt, *first]
    with open_engine(bundle, EngineOptions(mode=mode), draft=HookedDevice(look)) as engine:
        result = engine.generate_tokens(prompt, max_new_tokens=12)
    assert list(result.tokens) == first
    assert not result.events
    assert not wrong
    assert fed_rows >= 8


def test_a_good_fed_draft_is_accepted(tmp_path: Path) -> None:
    """With the feature a draft can know what its tokens alone don't say."""
    spec = LookupBundle(TARGET, Lookup(agreeing_table(DRAFT.table, 1.0, 0)), gamma=3, kappa=2, feature_layer=1)
    folder = write_bundle(tmp_path / "b", spec)
    for mode in Mode:
        with open_engine(folder, EngineOptions(mode=mode)) as engine:
            assert list(engine.generate_tokens([4, 2], max_new_tokens=30).tokens) == oracle_greedy(TARGET, [4, 2], 30)


def test_a_draft_fed_by_another_layer_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", LookupBundle(TARGET, DRAFT, feature_layer=2))
    with pytest.raises(BundleError, match="fed by the state after layer 2 and the target is cut after layer 1"):
        open_engine(folder, EngineOptions())
    assert states([1]).shape[1] == HIDDEN
