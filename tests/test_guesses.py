"""Passes that are launched one after the other: what one gives goes to the next without the host."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mirror.bundle import read_manifest
from mirror.errors import DeviceError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.feeds import FeedPool
from mirror.runtime.generation import Generation, _Begun
from mirror.runtime.guesses import Known, Launched
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.options import EngineOptions
from mirror.runtime.proposal import LaunchedProposal, Proposal
from mirror.runtime.records import Lane, Mode, Outcome
from mirror.targets.base import Device, FollowOn, GivenIds, LoadRequest, PassShape, Tensor, to_host
from mirror.targets.cpu import CpuDevice
from mirror.targets.onnxruntime_session import Buffer
from mirror.targets.watched import Pass, WatchedDevice
from tests.lookup import Lookup, LookupBundle, open_engine, random_table, write_bundle
from tests.streams import FakeStream, streamed

MODEL = Lookup(random_table(4, 97, 13))
CONTEXT = np.array([1, 2, 3, 4, 5])


def _on_device(values: Sequence[int], stream: FakeStream) -> Buffer:
    return Buffer(ort.OrtValue.ortvalue_from_numpy(np.array([values])), None, stream, "int64")


def _left_on(stream: FakeStream, outputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {
        name: Buffer(ort.OrtValue.ortvalue_from_numpy(value), None, stream, str(value.dtype))
        for name, value in outputs.items()
        if isinstance(value, np.ndarray)
    }


def launching(stream: FakeStream, began: list[int]) -> Device:
    """Return a device whose outputs must be fetched, and are written over by the next pass of the same size."""

    def watch(item: Pass) -> Mapping[str, Tensor]:
        began.append(len(stream.log))
        return _left_on(stream, item.run())

    return WatchedDevice(streamed(stream), watch)


def _draft(folder: Path, device: Device) -> Draft:
    manifest = read_manifest(folder)
    plan = make_plan(manifest, EngineOptions(candidates=CandidateSource.DRAFT), shared_cpu=True)
    return load_draft(folder, manifest, device, plan)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "b", LookupBundle(MODEL, MODEL, gamma=3, kappa=2))


def test_given_tokens_lie_at_the_head_of_each_branch() -> None:
    given = _on_device([9, 8, 7, 6, 5, 4], FakeStream())
    ids = np.array([[0, 0, 91, 0, 0, 92, 0, 0, 93]])
    follow = Launched(given, 3, 2).follow(ids, 3)
    assert follow is not None
    assert follow.numpy().tolist() == [[9, 8, 91, 7, 6, 92, 5, 4, 93]]
    one = Launched(given, 3, 2).some(1, 1).follow(np.array([[0, 0, 91]]), 3)
    assert one is not None
    assert one.numpy().tolist() == [[7, 6, 91]]
    assert Launched(given, 3, 2).some(2, 1).fetch().tokens().tolist() == [[5, 4]]
    assert Launched(given, 3, 2).some(0, 2).some(1, 1).fetch().tokens().tolist() == [[7, 6]]
    assert Known(np.array([[3], [4], [5]])).some(1, 2).tokens().tolist() == [[4], [5]]


def test_what_is_fetched_is_what_was_there_then() -> None:
    buffer = _on_device([1, 2], FakeStream())
    earlier = buffer.fetch()
    buffer.value.numpy()[...] = 7
    later = buffer.fetch()
    assert earlier().tolist() == [[1, 2]]
    assert later().tolist() == [[7, 7]]


def test_launched_passes_make_the_same_rollout_and_nothing_waits_between_them(folder: Path) -> None:
    stream, began = FakeStream(), []
    launched, plain = _draft(folder, launching(stream, began)), _draft(folder, CpuDevice())
    for _ in range(3):  # also once bindings are there
        proposals = [draft.propose(CONTEXT, 3, None).read().tokens for draft in (launched, plain)]
        assert proposals[0] == proposals[1]
        window = np.array([CONTEXT[-1], *proposals[0]])
        stream.log.clear()
        began.clear()
        rollouts = [draft.roll_out(CONTEXT, window, 3, Meeting(), None) for draft in (launched, plain)]
        assert np.array_equal(rollouts[0].continuations, rollouts[1].continuations)
        assert np.array_equal(rollouts[0].lengths, rollouts[1].lengths)
    branch_passes = stream.log[began[1] :]
    assert branch_passes.count("spread") == 2  # into the second pass and the third
    assert branch_passes.index("spread") < len(branch_passes) - 1 - branch_passes[::-1].index("upload")


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_a_target_that_only_launches_follows_the_proposal_before_the_host_has_read_it(folder: Path, mode: Mode) -> None:
    with open_engine(folder, EngineOptions(mode=Mode.PLAIN)) as engine:
        expected = engine.generate_tokens(CONTEXT.tolist(), max_new_tokens=24).tokens
    streams = FakeStream(), FakeStream()
    target, draft = (launching(stream, []) for stream in streams)
    with open_engine(folder, EngineOptions(mode=mode), target=target, draft=draft) as engine:
        result = engine.generate_tokens(CONTEXT.tolist(), max_new_tokens=24)
    assert result.tokens == expected
    assert result.events == ()
    with open_engine(folder, EngineOptions(mode=mode)) as engine:
        waited = engine.generate_tokens(CONTEXT.tolist(), max_new_tokens=24)
    assert [(one.accepted, one.branches) for one in result.rounds] == [
        (one.accepted, one.branches) for one in waited.rounds
    ]
    works = [
        [sorted(span.name for span in one.spans if span.lane is Lane.DRAFT) for one in answer.rounds]
        for answer in (result, waited)
    ]
    assert works[0] == works[1]
    log = streams[0].log
    assert "after" in log
    # The window's passes give one token each, so three copies; nothing of the target's waits between them.
    first = log.index("after")
    assert log[first - 2 : first + 6] == ["upload", "renew", "after", "upload", "after", "upload", "after", "upload"]


def test_a_draft_whose_device_fails_behind_its_launches_is_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(proposal: LaunchedProposal) -> Proposal:
        raise DeviceError("the GPU fell off")

    with open_engine(folder, EngineOptions(mode=Mode.PLAIN)) as engine:
        expected = engine.generate_tokens(CONTEXT.tolist(), max_new_tokens=24).tokens
    monkeypatch.setattr(LaunchedProposal, "read", fails)
    target, draft = (launching(FakeStream(), []) for _ in range(2))
    with open_engine(folder, EngineOptions(mode=Mode.SERIAL), target=target, draft=draft) as engine:
        result = engine.generate_tokens(CONTEXT.tolist(), max_new_tokens=24)
    assert result.tokens == expected
    assert [event.kind for event in result.events] == ["draft_lost"]
    assert "the GPU fell off" in result.events[0].message
    assert {one.proposed for one in result.rounds} == {0}, "nobody knows what was proposed"


def test_tokens_that_the_target_may_not_know_are_waited_for(tmp_path: Path) -> None:
    wider = Lookup(random_table(4, 97, 17))
    folder = write_bundle(tmp_path / "b", LookupBundle(MODEL, wider, gamma=3, kappa=2))
    proposal = _draft(folder, launching(FakeStream(), [])).propose(CONTEXT, 3, None)
    assert isinstance(proposal, Proposal)


def test_what_was_fetched_is_kept_for_as_long_as_anyone_may_ask() -> None:
    buffer = _on_device([1, 2], FakeStream())
    first = buffer.fetch()
    place = first.place  # type: ignore[attr-defined]
    first()
    buffer.value.numpy()[...] = 7
    second = buffer.fetch()
    assert place.tolist() == first().tolist() == [[1, 2]]
    del first
    third = buffer.fetch()
    assert third.place is place  # type: ignore[attr-defined]
    assert second().tolist() == third().tolist() == [[7, 7]]


def test_a_branch_that_was_taken_goes_on_alone(folder: Path) -> None:
    stream = FakeStream()
    launched, plain = _draft(folder, launching(stream, [])), _draft(folder, CpuDevice())
    window = np.array([CONTEXT[-1], *plain.propose(CONTEXT, 3, None).read().tokens])
    whole = plain.roll_out(CONTEXT, window, 3, Meeting(), None)
    accepted, token = int(whole.branches.accepted[-1]), int(whole.branches.next_tokens[-1])
    meeting = _DecidedLater(Outcome(accepted, token), 2)
    rollout = launched.roll_out(CONTEXT, window, 3, meeting, None)
    assert rollout.find(Outcome(accepted, token)) == whole.find(Outcome(accepted, token))
    assert rollout.lengths.tolist() == [1] * (len(rollout.branches) - 1) + [3]


class _DecidedLater(Meeting):
    """The outcome is known when it is asked for the n-th time."""

    def __init__(self, outcome: Outcome, asked: int) -> None:
        super().__init__()
        self._later, self._left = outcome, asked

    @property
    def outcome(self) -> Outcome | None:
        self._left -= 1
        return self._later if self._left <= 0 else None


def noting(seen: list[str], failing: int = -1) -> Device:
    """Return a device that only launches and notes its passes' segments; one of the target's passes can fail."""
    stream = FakeStream()

    def watch(item: Pass) -> Mapping[str, Tensor]:
        seen.append(item.segment)
        if item.segment == "target_prefix" and seen.count(item.segment) == failing:
            raise DeviceError("out of luck")
        return _left_on(stream, item.run())

    return WatchedDevice(streamed(stream), watch)


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_the_next_round_begins_before_tokens_are_handed_out(folder: Path, mode: Mode) -> None:
    seen: list[str] = []
    target, draft = noting(seen), launching(FakeStream(), [])
    with open_engine(folder, EngineOptions(mode=mode), target=target, draft=draft) as engine:
        stream = engine.stream_tokens(CONTEXT.tolist(), max_new_tokens=24)
        handed = [(next(stream), seen.count("target_prefix")) for _ in range(4)]
        # The prompt's pass and the first round's; the second round begins when a draft has shown that it only launches.
        assert [passes for _, passes in handed] == [1, 3, 4, 5]
        stream.close()
        expected = engine.generate_tokens(CONTEXT.tolist(), max_new_tokens=24, mode=Mode.PLAIN).tokens
        seen.clear()
        whole = engine.generate_tokens(CONTEXT.tolist(), max_new_tokens=24)
        assert whole.tokens == expected
        # None begins behind the last one.
        assert seen.count("target_prefix") == 1 + len(whole.rounds)


def test_a_round_whose_proposal_must_be_waited_for_begins_when_tokens_were_handed_out(folder: Path) -> None:
    seen: list[str] = []
    with open_engine(folder, EngineOptions(mode=Mode.SERIAL), target=noting(seen)) as engine:
        stream = engine.stream_tokens(CONTEXT.tolist(), max_new_tokens=24)
        assert [(next(stream), seen.count("target_prefix"))[1] for _ in range(4)] == [1, 2, 3, 4]


def test_a_draft_proposes_early_only_where_the_targets_pass_can_follow(folder: Path) -> None:
    seen: list[str] = []
    with open_engine(folder, EngineOptions(mode=Mode.SERIAL), draft=noting(seen)) as engine:
        stream = engine.stream_tokens(CONTEXT.tolist(), max_new_tokens=24)
        handed = []
        for _ in range(2):
            next(stream)
            handed.append(seen.count("draft"))
        # The prompt, and three passes for the one window.
        assert handed[1] == handed[0] + 3


def test_what_arrived_once_may_become_other_ids(folder: Path) -> None:
    stream = FakeStream()
    device, segment = streamed(stream), read_manifest(folder).segments["target_prefix"]
    loaded = device.load_segment(LoadRequest(folder, segment, [PassShape(3)], 8, 1))
    cache, feeds = device.make_cache(segment.kv, 8), FeedPool(8, 100).at(3)
    arriving = _on_device([9, 8], stream).fetch()
    for place, expected in ((1, [4, 9, 8]), (0, [9, 8, 6]), (1, [4, 9, 8])):
        feeds.fill_causal(np.array([4, 5, 6]), 0)
        ids = FollowOn(feeds.ids, (GivenIds(arriving, 0, place, 1, 2, 2),))
        outputs = loaded.run({**feeds.tensors, "input_ids": ids}, cache, 0)
        assert to_host(outputs["hidden_states"])[0, :, 0].tolist() == expected


def test_a_rollout_for_nobody_is_abandoned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Generation] = []
    begin_early = Generation._begin_early

    def noted(generation: Generation) -> None:
        begin_early(generation)
        made.append(generation)

    monkeypatch.setattr(Generation, "_begin_early", noted)
    target, draft = launching(FakeStream(), []), launching(FakeStream(), [])
    with open_engine(folder, EngineOptions(mode=Mode.MIRROR), target=target, draft=draft) as engine:
        stream = engine.stream_tokens(CONTEXT.tolist(), max_new_tokens=60)
        for _ in stream:
            begun = made[-1]._begun if made else None
            if isinstance(begun, _Begun) and begun.overlap is not None:
                break
        assert begun.overlap is not None
        assert not begun.overlap.meeting.abandoned
        stream.close()
        assert begun.overlap.meeting.abandoned


def test_a_round_that_cannot_begin_early_fails_when_its_turn_comes(folder: Path) -> None:
    tokens: list[list[int]] = []
    for failing in (4, -1):
        target, draft = noting([], failing), launching(FakeStream(), [])
        tokens.append([])
        with open_engine(folder, EngineOptions(mode=Mode.SERIAL), target=target, draft=draft) as engine:
            stream = engine.stream_tokens(CONTEXT.tolist(), max_new_tokens=24)
            with pytest.raises(DeviceError, match="out of luck") if failing > 0 else contextlib.nullcontext():
                tokens[-1].extend(token for token in stream)
    rounds = len(tokens[0])
    assert 3 <= rounds < len(tokens[1])
    assert tokens[0] == tokens[1][:rounds]
