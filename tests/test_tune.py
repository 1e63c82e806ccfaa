"""Tuning: what is foreseen, what a round costs, and that only what was faster than plain is chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mirror.bundle import Settings, check_files, read_manifest
from mirror.cli import main
from mirror.errors import DeviceError, RequestError
from mirror.runtime.candidates import CandidateSource, choose_branches
from mirror.runtime.records import Candidates, Mode
from mirror.targets.cpu import CpuDevice
from mirror.tune import measure
from mirror.tune import tune as tuning
from mirror.tune.choices import (
    Choice,
    Knowledge,
    Places,
    Prediction,
    best_of_each,
    more_and_fewer_branches,
    predict_mirror,
    predict_serial,
)
from mirror.tune.costs import PassCosts, RoundShares, mirror_ms, pass_costs, propose_ms, serial_ms
from mirror.tune.measure import Speed, Workload, probe, sample_prompts, widest
from mirror.tune.observe import Notes, observed
from mirror.tune.outcomes import (
    Foresight,
    Sample,
    accepted_shares,
    coverage,
    rank_tokens,
    shares_of_counts,
)
from mirror.tune.tune import TuneOptions, tune_bundle
from tests.lookup import Lookup, LookupBundle, agreeing_table, oracle_greedy, oracle_logits, random_table, write_bundle

TARGET = Lookup(random_table(1, 97, 23))
DRAFT = Lookup(agreeing_table(TARGET.table, 0.8, 2))
EXITS = random_table(3, 97, 23)
_TARGET, _DRAFT = ("target_prefix", "exit_head", "target_suffix"), ("draft_trunk", "draft")
QUICK = TuneOptions(draft_devices=("cpu",), prompts=2, tokens=24, turns=2, tries=2, threads=1)
HERE = Places("cpu", "cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tune") / "bundle", LookupBundle(TARGET, DRAFT, EXITS))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A bundle that a test may tune."""
    return write_bundle(tmp_path / "own", LookupBundle(TARGET, DRAFT, EXITS))


def silent(text: str) -> None:
    """Say nothing."""


# what a text foretells


def sample_of(tokens: list[int], draft: list[list[int]], exits: list[list[int]]) -> Sample:
    return Sample(*(np.array(part, np.int64) for part in (tokens, draft, exits)))


def test_ranks_follow_the_order_of_a_rollout() -> None:
    sample = sample_of([5, 7, 9], [[5, 1, 2], [1, 2, 3], [4, 6, -1]], [[9, 5, 1], [3, 1, 7], [9, 4, 6]])
    both = rank_tokens(sample, CandidateSource.BOTH)
    assert both.right.tolist() == [True, False, False]
    # Draft first at each rank; a mismatch's candidates don't hold the draft's likeliest.
    assert both.wrong.tolist() == [2, 0]  # of 3 2 7, of 9 6
    assert both.bonus.tolist() == [0, 3, 1]
    assert rank_tokens(sample, CandidateSource.DRAFT).wrong.min() > 100
    assert rank_tokens(sample, CandidateSource.EXIT).bonus.tolist() == [1, 2, 0]


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(CandidateSource)), st.integers(1, 6))
def test_a_token_is_prepared_where_its_rank_is_below_the_fan_out(
    seed: int, source: CandidateSource, count: int
) -> None:
    """The engine's own choice of branches is the judge."""
    random = np.random.default_rng(seed)
    draft, exits = (np.array([random.permutation(9)[:4] for _ in range(2)]) for _ in range(2))
    token = int(random.integers(9))
    ranks = rank_tokens(Sample(np.array([token]), draft[:1], exits[:1]), source)
    window = np.array([0, draft[0, 0]])
    lists = ([draft] if source.needs_draft else []) + ([exits] if source.needs_exit else [])
    branches = choose_branches(window, [Candidates(ids, None) for ids in lists], np.array([count, 0]))
    if token == draft[0, 0]:
        assert ranks.right.tolist() == [True]
    else:
        assert (token in branches.next_tokens) == (ranks.wrong[0] < count)
    at_end = choose_branches(window[:1], [Candidates(ids, None) for ids in lists], np.array([count]))
    assert (token in at_end.next_tokens) == (ranks.bonus[0] < count)


def test_rounds_are_walked_as_a_text_goes() -> None:
    right = np.array([True, True, False, True, True, True, False])
    # gamma 2: (1 1) bonus; then (1 1) from place 3; then (0).
    assert accepted_shares([right], 2).tolist() == [1 / 3, 0, 2 / 3]
    assert shares_of_counts([0, 3, 3, 1], 2).tolist() == [0.25, 0.25, 0.5]
    assert accepted_shares([], 3).sum() == 0


def test_branches_go_where_they_prepare_the_most() -> None:
    foresight = Foresight(np.array([0, 0.5, 0.7, 0.8]), np.array([0, 0.9, 0.95, 1.0]))
    shares = np.array([0.6, 0.1, 0.3])
    assert foresight.shape(shares, 1) == (1, 0, 0)  # 0.6 * 0.5 against 0.3 * 0.9
    assert foresight.shape(shares, 4) == (3, 0, 1)
    assert foresight.prepared(shares, (3, 0, 1)) == pytest.approx(0.6 * 0.8 + 0.3 * 0.9)
    assert coverage(np.array([0, 2, 9]), 3).tolist() == [0, 1 / 3, 1 / 3, 2 / 3]


# what a round costs

COSTS = PassCosts(
    {
        "target_prefix": ((1, 4.0), (8, 4.0)),
        "exit_head": ((8, 1.0),),
        "target_suffix": ((1, 6.0), (8, 6.0)),
        "draft_trunk": ((8, 2.0),),
        "draft": ((1, 1.0), (11, 2.0)),
    },
    host_ms=0.5,
)


def test_pass_times_lie_on_a_line() -> None:
    assert COSTS.ms("draft", 6) == 1.5
    assert COSTS.ms("draft", 31) == 4.0
    assert COSTS.ms("draft_trunk", 3) == 2.0
    half = COSTS.cut_at(0.5)
    assert (half.ms("target_prefix", 8), half.ms("target_suffix", 8)) == (5.0, 5.0)
    measured = pass_costs({("draft", 1): [0.001, 0.003, 0.002], ("draft", 4): [0.004]}, 0.1)
    assert measured.points["draft"] == ((1, 2.0), (4, 4.0))


def test_widths_seen_once_or_twice_tell_nothing_where_others_were_seen_often() -> None:
    seen = {
        ("draft", 8): [0.001] * 5,
        ("draft", 64): [0.09, 0.08],
        ("draft", 96): [0.002] * 9,
        ("exit_head", 8): [0.004],
    }
    assert pass_costs(seen, 0.1).points == {"draft": ((8, 1.0), (96, 2.0)), "exit_head": ((8, 4.0),)}


def test_a_hidden_rollout_costs_nothing_and_a_long_one_what_sticks_out() -> None:
    always = RoundShares(1.0, 3.0)
    # Starts at 2 ms, three passes of 2 ms end at 8; the target ends at 10.
    assert mirror_ms(COSTS, 3, 11, (1,), CandidateSource.DRAFT, always, (1,)) == 10.5
    # With the exit's candidates it starts at 5 and ends at 11, as the target does.
    assert mirror_ms(COSTS, 3, 11, (1,), CandidateSource.BOTH, always, (1,)) == 11.5
    # Seven passes: four begin before 10 ms, three go on for one branch at 1 ms each.
    assert mirror_ms(COSTS, 7, 11, (1,), CandidateSource.DRAFT, always, (1,)) == 13.5
    # Two tokens a pass of two rows: 22 rows take 3.1 ms, then 33 rows 4.2.
    assert mirror_ms(COSTS, 4, 11, (2,), CandidateSource.DRAFT, always, (1,)) == pytest.approx(10.5)


def test_an_outcome_that_was_not_prepared_is_drafted_anew() -> None:
    never = RoundShares(0.0, 3.0)
    assert mirror_ms(COSTS, 3, 11, (1,), CandidateSource.DRAFT, never, (1,)) == 10.5 + propose_ms(COSTS, 3, (1,), 1)
    assert propose_ms(COSTS, 3, (1,), 1) == 3.0
    # One pass of three rows instead of three passes, for the proposal alone.
    quick = mirror_ms(COSTS, 3, 11, (1,), CandidateSource.DRAFT, never, (3,))
    assert quick == 10.5 + propose_ms(COSTS, 3, (3,), 1) == pytest.approx(10.5 + 1.2)
    assert serial_ms(COSTS, 3, (1,), 3.0) == pytest.approx(10.5 + 1.2 + 1.0 + 1.0)  # reads three rows first


def known(stand: float) -> Knowledge:
    """A box of those costs, with a draft that is right so often."""
    shares = [np.array([(1 - stand) * stand**i for i in range(gamma)] + [stand**gamma]) for gamma in range(1, 8)]
    foresight = Foresight(np.array([0, 0.5, 0.75, 0.875]), np.array([0, 0.9, 0.95, 0.96]))
    return Knowledge(HERE, 1, COSTS, COSTS, {CandidateSource.DRAFT: foresight}, {(1,): shares})


def test_better_drafts_get_longer_windows() -> None:
    def best(stand: float) -> Choice:
        return best_of_each(list(predict_mirror(known(stand), 3)), 1)[0].choice

    assert best(0.1).gamma < best(0.9).gamma
    assert len(best(0.9).fanout) == best(0.9).gamma + 1
    assert max(best(0.9).fanout) <= 3
    serial = best_of_each(list(predict_serial(known(0.9))), 1)[0]
    mirror = best_of_each(list(predict_mirror(known(0.9), 3)), 1)[0]
    assert mirror.tokens_per_s > serial.tokens_per_s


def test_rollouts_that_are_hidden_take_more_passes_than_proposals_that_are_waited_for() -> None:
    box = known(0.8)
    worse = [shares * 0.9 + np.eye(shares.size)[0] * 0.1 for shares in box.stands[(1,)]]
    box = dataclasses.replace(box, stands={**box.stands, (4,): worse})
    # Three tokens fit beside the target in passes of one token each.
    best = best_of_each([item for item in predict_mirror(box, 3) if item.choice.gamma == 3], 1)[0]
    assert (best.choice.tokens_per_pass, best.choice.proposal_tokens_per_pass) == ((1,), (4,))
    same = [item for item in predict_mirror(box, 3) if not item.choice.proposal_tokens_per_pass]
    assert {item.choice.tokens_per_pass for item in same} == {(1,), (4,)}
    assert best.choice.settings().proposal_tokens_per_pass == (4,)


# what is seen of a real engine


def test_what_was_offered_is_what_the_models_say(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    prompts = sample_prompts(bundle, manifest, 2)
    found = probe(bundle, widest(manifest, HERE), Workload(prompts, 30, 1), narrower=[1])
    for prompt, sample in zip(prompts, found.samples, strict=True):
        text = oracle_greedy(TARGET, prompt, 30)  # type: ignore[arg-type]
        assert sample.tokens.size >= 24
        assert sample.tokens.tolist() == text[1 : sample.tokens.size + 1]
        for place in range(sample.tokens.size):
            context = [*prompt, *text[: place + 1]]
            logits = oracle_logits(DRAFT, context)  # type: ignore[arg-type]
            assert sample.draft[place].tolist() == np.argsort(-logits, kind="stable")[:3].tolist()
            assert (sample.exits[place] >= 0).all()
    assert found.serial is not None
    for costs in (found.mirror, found.serial):
        widths = {width for width, _ in costs.points["target_suffix"]}
        assert {2, 4} <= widths <= {1, 2, 3, 4}  # narrow windows end an answer; no prompt's pass counts
        assert all(ms > 0 for points in costs.points.values() for _, ms in points)


def test_notes_keep_the_last_of_a_position_and_leave_out_prompts(bundle: Path) -> None:
    notes = Notes()
    notes.note_candidates("draft_trunk", np.array([3, 4]), np.array([[1, 2], [3, 4]]))
    notes.note_candidates("draft_trunk", np.array([4]), np.array([[5, 6]]))
    assert notes.table("draft_trunk", [3, 4, 5], 2).tolist() == [[1, 2], [5, 6], [-1, -1]]
    device = observed(CpuDevice(), notes)
    assert (device.name, device.form) == ("cpu", CpuDevice().form)


# deciding


def racing(monkeypatch: pytest.MonkeyPatch, speed: Callable[[Choice, int], float]) -> None:
    """Let choices be as fast as `speed` says, by turn, instead of running them."""
    turns: dict[Choice, int] = {}

    def fake(folder: Path, choice: Choice, work: Workload) -> Speed:
        turns[choice] = turns.get(choice, -1) + 1
        return Speed(speed(choice, turns[choice]), ((1, 2, 3),))

    monkeypatch.setattr(tuning, "speed", fake)


def test_what_beats_plain_in_every_turn_is_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    racing(monkeypatch, lambda choice, turn: {Mode.PLAIN: 10, Mode.SERIAL: 12, Mode.MIRROR: 15}[choice.mode])
    before = read_manifest(own)
    report = tune_bundle(own, QUICK, silent)
    after = read_manifest(own)
    assert after.settings == report.settings
    assert (after.settings.mode, after.settings.target_device, after.settings.draft_device) == ("mirror", "cpu", "cpu")
    assert after.settings.fanout is not None
    assert after.settings.gamma == len(after.settings.fanout) - 1
    assert dataclasses.replace(after, settings=Settings()) == before
    assert "1.50 times plain" in report.reason
    # As many tries, each of a source; what has more or fewer branches shares the fastest one's.
    assert len({row.choice.source for row in report.rows if row.choice.mode is Mode.MIRROR}) == 2


def test_the_fastest_is_run_with_more_and_fewer_branches_as_long_as_that_helps(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Choice] = []
    cheap = PassCosts({**dict.fromkeys(_TARGET, ((1, 1.0),)), **dict.fromkeys(_DRAFT, ((1, 0.01),))}, 0.0)
    monkeypatch.setattr(measure, "pass_costs", lambda *_: cheap)  # a busy machine might foresee windows of one token

    def speed(choice: Choice, turn: int) -> float:
        ran.append(choice)
        return 20.0 - choice.branches if choice.mode is Mode.MIRROR else 10.0

    racing(monkeypatch, speed)
    report = tune_bundle(own, dataclasses.replace(QUICK, tries=1), silent)
    mirror = {choice for choice in ran if choice.mode is Mode.MIRROR}
    assert report.chosen.choice.branches == 4
    assert {choice.branches for choice in mirror} > {4}
    turns = {choice: ran.count(choice) for choice in ran}
    assert set(turns.values()) == {QUICK.turns}
    assert {dataclasses.replace(choice, fanout=()) for choice in mirror} == {
        dataclasses.replace(report.chosen.choice, fanout=())
    }


def test_branches_are_halved_and_doubled_where_all_else_is_alike() -> None:
    def told(branches: int, gamma: int = 3) -> Prediction:
        choice = Choice(Mode.MIRROR, HERE, 2, gamma, CandidateSource.BOTH, (branches, *[0] * gamma))
        return Prediction(choice, 1.0, RoundShares(0.5, 2.0))

    all_told = [told(count) for count in (4, 10, 12, 16, 24, 32)] + [told(8, gamma=2), told(64, gamma=2)]

    def near(branches: int) -> list[int]:
        return [item.choice.branches for item in more_and_fewer_branches(told(branches).choice, all_told)]

    assert near(16) == [10, 32]
    assert near(4) == [10]
    assert near(32) == [16]


@pytest.mark.parametrize("worst", [9.9, 10.1])
def test_plain_stays_where_a_turn_was_slower_or_the_gain_is_a_hair(
    own: Path, worst: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = 20.0 if worst < 10 else 10.15
    racing(monkeypatch, lambda choice, turn: 10.0 if choice.mode is Mode.PLAIN else (best, worst)[turn])
    report = tune_bundle(own, QUICK, silent)
    assert read_manifest(own).settings == Settings(mode="plain", target_device="cpu")
    assert report.reason.startswith("plain on cpu: drafting does not pay on this box; the best other choice")


def test_a_dry_run_changes_nothing(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    racing(monkeypatch, lambda choice, turn: 10.0)
    content = (own / "mirror.json").read_bytes()
    tune_bundle(own, QUICK, silent, write=False)
    assert (own / "mirror.json").read_bytes() == content
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def test_a_device_that_fails_is_left_out_and_said(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    racing(monkeypatch, lambda choice, turn: 10.0)
    said: list[str] = []
    options = dataclasses.replace(QUICK, draft_devices=("cuda:9", "cpu"))
    tune_bundle(own, options, said.append, write=False)
    assert any(line.startswith("left out: cuda:9 isn't there") for line in said)
    monkeypatch.undo()
    with pytest.raises(DeviceError, match="no device could run the target"):
        tune_bundle(own, dataclasses.replace(QUICK, target_devices=("cuda:9",)), silent)


def test_bundles_without_a_model_draft_are_tuned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    racing(monkeypatch, lambda choice, turn: 12.0 if choice.mode is Mode.SERIAL else 10.0)
    ngram = write_bundle(tmp_path / "ngram", LookupBundle(TARGET, None, EXITS, draft_kind="ngram"))
    assert tune_bundle(ngram, QUICK, silent).settings.mode == "serial"
    none = write_bundle(tmp_path / "none", LookupBundle(TARGET, None, EXITS))
    assert tune_bundle(none, QUICK, silent).reason == "plain on cpu: drafting does not pay on this box"


def test_drafts_with_streams_are_tried_with_several_tokens_per_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    racing(monkeypatch, lambda choice, turn: 10.0 + max(choice.tokens_per_pass) * (choice.mode is Mode.MIRROR))
    spec = LookupBundle(TARGET, DRAFT, EXITS, streams=2, gamma=5)
    said: list[str] = []
    report = tune_bundle(write_bundle(tmp_path / "streams", spec), dataclasses.replace(QUICK, tries=9), said.append)
    assert [line for line in said if "tokens per pass" in line] == [
        "measuring 1, 1, 1, 3 tokens per pass",
        "measuring 2 tokens per pass",
        "measuring 3 tokens per pass",
    ]
    assert report.settings.mode == "mirror"


def test_another_exit_layer_is_cut_when_it_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from mirror.export.build import ExportOptions, export_bundle
    from tests.families import make_checkpoint

    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", eos_token_id=None)
    options = ExportOptions(max_length=64, gamma=3, kappa=3, draft="layers:0,1,2,3", exit_layer="2")
    export_bundle(str(checkpoint), tmp_path / "bundle", options)
    racing(monkeypatch, lambda choice, turn: 10 + 5 * choice.exit_layer if choice.mode is Mode.MIRROR else 10)
    wide = dataclasses.replace(QUICK, exit_layers=(1, 3), tries=9)
    report = tune_bundle(tmp_path / "bundle", wide, silent)
    assert {row.choice.exit_layer for row in report.rows if row.choice.mode is Mode.MIRROR} == {1, 2, 3}
    manifest = read_manifest(tmp_path / "bundle")
    check_files(tmp_path / "bundle", manifest, hashes=True)
    assert manifest.decoding.exit_layer == 3
    assert manifest.settings == report.settings
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]
    with pytest.raises(RequestError, match=r"exit layer 4 is asked for; this target can be cut at 1\.\.3"):
        tune_bundle(tmp_path / "bundle", dataclasses.replace(QUICK, exit_layers=(4,)), silent)


# the command


def test_the_command_runs_what_it_shows_and_the_text_stays(own: Path) -> None:
    arguments = ["tune", str(own), "--draft-device", "cpu", "--prompts", "2", "--tokens", "24", "--turns", "1"]
    done = CliRunner().invoke(main, [*arguments, "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["mode"] == read_manifest(own).settings.mode
    assert {row["mode"] for row in found["rows"]} == {"plain", "serial", "mirror"}
    assert all(row["same_text"] for row in found["rows"])
    table = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert table.exit_code == 0, table.output
    assert "times plain" in table.stdout
    assert "not written: --dry-run" in table.stderr
