"""Sampled tokens follow the target's law, whatever the draft says, reused or redrafted alike.

Markov chains (`context = 0`), so that each row of the table is the law of the token after one token.
Every chi-square is over several thousand tokens; all tests of this file together raise a false alarm
with odds below 1e-5.
"""

from pathlib import Path

import numpy as np
import pytest

from mirror.runtime.engine import Result
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from tests.lookup import (
    Lookup,
    LookupBundle,
    Table,
    chi_square,
    chi_square_limit,
    open_engine,
    random_table,
    softmax,
    write_bundle,
)

VOCAB = 8
FALSE_ALARM = 1e-7
TARGET = random_table(5, VOCAB, VOCAB, spread=1.0)
DISJOINT_TARGET = np.where(np.arange(VOCAB) < VOCAB // 2, TARGET, -np.inf).astype(np.float32)

# Name -> (the target's table, the draft's).
PAIRS: dict[str, tuple[Table, Table]] = {
    "the draft equals the target": (TARGET, TARGET),
    "the draft is the target reversed": (TARGET, -TARGET),
    "the supports are disjoint": (DISJOINT_TARGET, np.roll(DISJOINT_TARGET, VOCAB // 2, axis=1)),
}
SEEDS = range(6)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Mode], list[Result]]:
    made = {}
    for name, (target, draft) in PAIRS.items():
        folder = tmp_path_factory.mktemp("law") / "b"
        # Few enough candidates for redrafts, many enough for reuse by a draft that is mostly wrong.
        kappa = 6 if "reversed" in name else 2
        spec = LookupBundle(Lookup(target, 0), Lookup(draft, 0), draft, gamma=3, kappa=kappa, max_length=700)
        write_bundle(folder, spec)
        for mode in Mode:
            with open_engine(folder, EngineOptions(mode=mode)) as engine:
                made[name, mode] = [
                    engine.generate_tokens([1], max_new_tokens=650, temperature=1.0, seed=seed) for seed in SEEDS
                ]
    return made


@pytest.mark.parametrize("name", PAIRS)
def test_same_seed_same_tokens_in_every_mode(name: str, results: dict[tuple[str, Mode], list[Result]]) -> None:
    plain, serial, mirror = ([result.tokens for result in results[name, mode]] for mode in Mode)
    assert plain == serial == mirror
    assert len(set(plain)) == len(SEEDS)


@pytest.mark.parametrize("name", PAIRS)
def test_transitions_follow_the_targets_rows(name: str, results: dict[tuple[str, Mode], list[Result]]) -> None:
    counts = np.zeros((VOCAB, VOCAB), np.int64)
    for result in results[name, Mode.MIRROR]:
        tokens = np.array([1, *result.tokens])
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    _check(counts, PAIRS[name][0])


@pytest.mark.parametrize("reused", [True, False])
@pytest.mark.parametrize("name", list(PAIRS)[:2])
def test_rounds_after_a_reuse_and_after_a_redraft_have_the_same_law(
    name: str, reused: bool, results: dict[tuple[str, Mode], list[Result]]
) -> None:
    """Whether a branch fitted is settled before the next round's tokens are drawn, so both are unbiased."""
    counts = np.zeros((VOCAB, VOCAB), np.int64)
    for result in results[name, Mode.MIRROR]:
        done = 1
        for before, item in zip((None, *result.rounds[:-1]), result.rounds, strict=True):
            if before is not None and before.reused is reused:
                tokens = np.array(result.tokens[done - 1 : done + item.committed])
                np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
            done += item.committed
    assert counts.sum() > 300
    _check(counts, PAIRS[name][0])


def _check(counts: np.ndarray, table: Table) -> None:
    statistic, degrees = 0.0, 0
    for row in range(VOCAB):
        if counts[row].sum() > 100:  # enough for the approximation
            one, free = chi_square(counts[row], softmax(table[row]))
            statistic, degrees = statistic + one, degrees + free
    assert degrees >= VOCAB // 2
    assert statistic < chi_square_limit(degrees, FALSE_ALARM)


def test_these_counts_would_reject_a_slightly_wrong_law(results: dict[tuple[str, Mode], list[Result]]) -> None:
    """The power of the test above: the draft's law mixed in at one tenth is noticed."""
    name = "the draft is the target reversed"
    counts = np.zeros((VOCAB, VOCAB), np.int64)
    for result in results[name, Mode.MIRROR]:
        tokens = np.array([1, *result.tokens])
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    target, draft = PAIRS[name]
    mixed = [np.log(0.9 * softmax(target[row]) + 0.1 * softmax(draft[row])) for row in range(VOCAB)]
    with pytest.raises(AssertionError):
        _check(counts, np.array(mixed, np.float32))


def test_disjoint_supports_never_accept(results: dict[tuple[str, Mode], list[Result]]) -> None:
    for result in results["the supports are disjoint", Mode.MIRROR]:
        assert result.statistics.draft_tokens_accepted == 0
        assert set(result.tokens) <= set(range(VOCAB // 2))


def test_the_bundles_are_what_the_names_say(tmp_path: Path) -> None:
    target, draft = PAIRS["the supports are disjoint"]
    assert not (np.isfinite(target) & np.isfinite(draft)).any()
