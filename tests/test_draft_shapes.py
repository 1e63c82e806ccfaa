"""Which passes a draft is loaded for, where each costs a compilation and where none does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from mirror.bundle import KEY_BLOCK, DraftFacts, Settings, read_manifest
from mirror.errors import RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.loading import Plan, draft_shapes, make_plan
from mirror.runtime.lookahead import branch_passes, rollout_capacity
from mirror.runtime.options import EngineOptions
from mirror.targets.base import LoadRequest, PassShape
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, OnnxRuntimeSegment, Provider
from tests.lookup import Lookup, LookupBundle, agreeing_table, open_engine, random_table, write_bundle

TARGET = Lookup(random_table(1, 97, 23))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draft = Lookup(agreeing_table(TARGET.table, 0.7, 2))
    tables = LookupBundle(TARGET, draft, random_table(3, 97, 23))
    return write_bundle(tmp_path_factory.mktemp("shapes") / "bundle", tables)


def planned(bundle: Path, fanout: tuple[int, ...], tokens_per_pass: tuple[int, ...] = (1,), streams: int = 0) -> Plan:
    manifest = read_manifest(bundle)
    assert manifest.draft is not None
    facts: DraftFacts = dataclasses.replace(manifest.draft, streams=streams)
    kappa = dataclasses.replace(manifest.decoding, kappa=max(fanout))
    options = EngineOptions(gamma=len(fanout) - 1, fanout=fanout, tokens_per_pass=tokens_per_pass)
    return make_plan(dataclasses.replace(manifest, draft=facts, decoding=kappa), options, shared_cpu=False)


def test_narrow_passes_use_the_wide_ones_programs(bundle: Path) -> None:
    plan = planned(bundle, (4, 2, 1, 1, 0, 0, 0, 0), (1, 2, 4), streams=3)
    wide = [PassShape(8, 8), PassShape(16, 16), PassShape(40, 32)]
    assert draft_shapes(plan, 64) == wide
    assert draft_shapes(plan, 1) == [PassShape(1, 1), PassShape(2, 2), PassShape(5, 4), *wide]


def test_narrow_passes_share_the_widest_ones_program(bundle: Path) -> None:
    plan = planned(bundle, (4, 4, 4, 1, 1, 1, 1, 0), (1, 2, 4), streams=3)
    wide = [PassShape(16, 16), PassShape(32, 32), PassShape(80, 64)]
    assert draft_shapes(plan, 8) == [PassShape(5, 4), *wide]
    assert draft_shapes(plan, 4) == [PassShape(2, 2), PassShape(5, 4), *wide]
    one = planned(bundle, (8, 4, 2, 2, 1, 1, 1, 1), (4, 1), streams=3)
    assert PassShape(1, 1) not in draft_shapes(one, 8)


def test_a_pass_keeps_its_own_program_where_no_other_serves_it(bundle: Path) -> None:
    many = planned(bundle, (23, 23, 23), (1,))
    assert draft_shapes(many, 64) == [PassShape(1, 1), PassShape(69, 69)], "padding to 69 rows is no bargain"
    alone = planned(bundle, (1, 0, 0), (1,))
    assert draft_shapes(alone, 64) == draft_shapes(alone, 1) == [PassShape(1, 1)]
    few_logits = planned(bundle, (2, *[0] * 11), (4, 2, 1, 4), streams=3)
    assert PassShape(4, 4) in draft_shapes(few_logits, 64), "the wider (4, 2) has two logits, this wants four"


def test_passes_for_fewer_branches_and_those_of_a_proposal_are_loaded_too(bundle: Path) -> None:
    plan = planned(bundle, (4, 2, 1, 1, 0, 0, 0, 0), (1,), streams=3)
    plan = dataclasses.replace(plan, branches_per_pass=(8, 8, 3), proposal_tokens_per_pass=(4,))
    assert draft_shapes(plan, 1) == [PassShape(*pair) for pair in [(1, 1), (3, 3), (4, 4), (6, 3), (8, 8)]]


def test_a_drafts_cache_has_room_for_the_streams_of_a_proposal(bundle: Path) -> None:
    plan = planned(bundle, (4, 2, 1, 1, 0, 0, 0, 0), (1,), streams=3)
    wider = dataclasses.replace(plan, proposal_tokens_per_pass=(1, 4))
    assert wider.rollout_slots == plan.rollout_slots + 3
    for sized in (plan, wider):
        # In whole blocks of keys, and no more than they ask for.
        assert sized.draft_capacity % KEY_BLOCK == 0
        assert 0 <= sized.draft_capacity - (sized.max_length + sized.rollout_slots) < KEY_BLOCK


def test_a_bundles_limits_belong_to_its_passes(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    settings = Settings(tokens_per_pass=(1,), branches_per_pass=(3, 1), proposal_tokens_per_pass=(1,))
    manifest = dataclasses.replace(manifest, settings=settings)
    plan = make_plan(manifest, EngineOptions(), shared_cpu=False)
    assert plan.branches_per_pass == (3, 1)
    plan = make_plan(manifest, EngineOptions(tokens_per_pass=(1, 1)), shared_cpu=False)
    assert (plan.branches_per_pass, plan.proposal_tokens_per_pass) == ((), (1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches_per_pass": (2, 3)}, "branches_per_pass is (2, 3); its counts must be 1 or more and never rise"),
        ({"branches_per_pass": (2, 0)}, "never rise"),
        ({"proposal_tokens_per_pass": (2,)}, "proposal_tokens_per_pass is (2,); the draft has 0 streams"),
    ],
)
def test_passes_that_can_not_be_are_refused(bundle: Path, options: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        make_plan(read_manifest(bundle), EngineOptions(**options), shared_cpu=False)


@pytest.mark.parametrize("tokens_per_pass", [(1,), (1, 2, 4), (4,), (2, 1)])
@pytest.mark.parametrize("branches", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("padded_width", [8, 64])
def test_a_padded_pass_finds_room_in_the_cache(
    bundle: Path, tokens_per_pass: tuple[int, ...], branches: int, padded_width: int
) -> None:
    """One branch goes on in programs of all of them; its padded rows take no more slots than theirs would."""
    plan = planned(bundle, (branches, 0, 0, 0, 0, 0, 0, 0), tokens_per_pass, streams=3)
    shapes = draft_shapes(plan, padded_width)
    passes = branch_passes(plan.tokens_per_pass, plan.gamma)
    taken = [min(shape.width for shape in shapes if shape.width >= item.rows) for item in passes]
    assert all(width <= branches * item.rows for width, item in zip(taken, passes, strict=True))
    room = rollout_capacity(plan.max_length, plan.gamma, plan.branches, plan.tokens_per_pass) - plan.max_length
    assert plan.gamma + 1 + sum(taken) <= room


class _Choosy(OnnxRuntimeDevice):
    """The CPU, taking the widths that it was loaded for and no others, and as few as possible."""

    padded_width = 64

    def __init__(self) -> None:
        super().__init__("cpu", Provider("CPUExecutionProvider", fixed_widths=True))
        self.asked: dict[str, set[PassShape]] = {}

    def load_segment(self, request: LoadRequest) -> OnnxRuntimeSegment:
        self.asked[request.segment.name] = {*request.shapes, *request.later}
        return super().load_segment(request)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_the_same_with_few_shapes(bundle: Path, temperature: float) -> None:
    device, prompt = _Choosy(), [1, 2, 3]
    with open_engine(bundle, EngineOptions(candidates=CandidateSource.DRAFT), draft=device) as engine:
        found, plain = (
            engine.generate_tokens(prompt, max_new_tokens=40, temperature=temperature, seed=5, mode=mode)
            for mode in ("mirror", "plain")
        )
        shapes = draft_shapes(engine.plan, 64)
    assert device.asked == {"draft": set(shapes), "draft_trunk": {PassShape(engine.plan.gamma + 1), *shapes}}
    assert len(shapes) == 1, "one branch has no pass of its own"
    assert found.tokens == plain.tokens
    assert not found.events
    assert np.mean([item.accepted for item in found.rounds]) > 0
