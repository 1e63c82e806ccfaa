"""The draft really runs while the target does: two segments meet at a barrier inside their `run`."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from mirror.runtime.candidates import CandidateSource
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.targets.base import Tensor
from tests.hooked import HookedDevice, no_hook
from tests.lookup import Lookup, LookupBundle, agreeing_table, open_engine, oracle_greedy, random_table, write_bundle

TARGET = Lookup(random_table(1, 97, 23))
PROMPT = [1, 2, 3]
WAIT_S = 20.0


class _Meeting:
    """Lets two named segments pass only together; each takes part once per round of the barrier."""

    def __init__(self, target_segment: str, draft_segment: str) -> None:
        self._sides = {"target": target_segment, "draft": draft_segment}
        self._barrier = threading.Barrier(2)
        self._times: dict[str, int] = {"target": 0, "draft": 0}
        self.limit = 3

    def hook(self, side: str) -> "object":
        def wait(name: str, feeds: Mapping[str, Tensor]) -> None:
            first_of_rollout = side != "draft" or name != "draft" or _is_branch_pass(feeds)
            if name == self._sides[side] and first_of_rollout and self._times[side] < self.limit:
                self._times[side] += 1
                self._barrier.wait(WAIT_S)  # breaks, and fails the pass, if the other side never comes

        return wait

    @property
    def met(self) -> int:
        return min(self._times.values())


def _is_branch_pass(feeds: Mapping[str, Tensor]) -> bool:
    row_branch = feeds["row_branch"]
    return bool(row_branch[0] >= 0)  # type: ignore[index]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    draft = Lookup(agreeing_table(TARGET.table, 0.6, 2))
    return write_bundle(tmp_path / "b", LookupBundle(TARGET, draft, random_table(3, 97, 23), gamma=1, kappa=3))


@pytest.mark.parametrize("source", list(CandidateSource))
@pytest.mark.parametrize(
    ("target_segment", "draft_segment"), [("target_suffix", "draft"), ("target_prefix", "draft_trunk")]
)
def test_they_run_at_the_same_time(
    bundle: Path, source: CandidateSource, target_segment: str, draft_segment: str
) -> None:
    """The rollout overlaps the suffix, and the draft's reading of the window overlaps the prefix."""
    meeting = _Meeting(target_segment, draft_segment)
    prefilled = threading.Event()

    def target_hook(name: str, feeds: Mapping[str, Tensor]) -> None:
        if prefilled.is_set():
            meeting.hook("target")(name, feeds)  # type: ignore[operator]
        elif name == "target_suffix":
            prefilled.set()

    options = EngineOptions(candidates=source, draft_timeout_s=2 * WAIT_S)
    with open_engine(
        bundle,
        options,
        target=HookedDevice(target_hook),
        draft=HookedDevice(meeting.hook("draft")),  # type: ignore[arg-type]
    ) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=20)
    assert meeting.met == meeting.limit
    assert not result.events
    assert list(result.tokens) == oracle_greedy(TARGET, PROMPT, 20)


def test_the_same_barrier_breaks_in_serial_mode(bundle: Path) -> None:
    """What proves the overlap can fail: drafting in turn never meets the suffix."""
    barrier = threading.Barrier(2)

    def draft_hook(name: str, feeds: Mapping[str, Tensor]) -> None:
        barrier.wait(0.2)

    options = EngineOptions(mode=Mode.SERIAL)
    with open_engine(bundle, options, target=HookedDevice(no_hook), draft=HookedDevice(draft_hook)) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=5)
    assert [event.kind for event in result.events] == ["draft_lost"]
    assert "BrokenBarrierError" in result.events[0].message
