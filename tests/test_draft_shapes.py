"""Which passes a draft is loaded for, where each costs a compilation and where none does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mirror.bundle import DraftFacts, read_manifest
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
    assert draft_shapes(plan, few=True) == wide
    assert draft_shapes(plan, few=False) == [PassShape(1, 1), PassShape(2, 2), PassShape(5, 4), *wide]


def test_a_pass_keeps_its_own_program_where_no_other_serves_it(bundle: Path) -> None:
    many = planned(bundle, (23, 23, 23), (1,))
    assert draft_shapes(many, few=True) == [PassShape(1, 1), PassShape(69, 69)], "padding to 69 rows is no bargain"
    alone = planned(bundle, (1, 0, 0), (1,))
    assert draft_shapes(alone, few=True) == draft_shapes(alone, few=False) == [PassShape(1, 1)]
    few_logits = planned(bundle, (2, *[0] * 11), (4, 2, 1, 4), streams=3)
    assert PassShape(4, 4) in draft_shapes(few_logits, few=True), "the wider (4, 2) has two logits, this wants four"


@pytest.mark.parametrize("tokens_per_pass", [(1,), (1, 2, 4), (4,), (2, 1)])
@pytest.mark.parametrize("branches", [1, 2, 3, 8, 40])
def test_a_padded_pass_finds_room_in_the_cache(bundle: Path, tokens_per_pass: tuple[int, ...], branches: int) -> None:
    """One branch goes on in programs of all of them; its padded rows take no more slots than theirs would."""
    plan = planned(bundle, (branches, 0, 0, 0, 0, 0, 0, 0), tokens_per_pass, streams=3)
    shapes = draft_shapes(plan, few=True)
    passes = branch_passes(plan.tokens_per_pass, plan.gamma)
    taken = [min(shape.width for shape in shapes if shape.width >= item.rows) for item in passes]
    assert all(width <= branches * item.rows for width, item in zip(taken, passes, strict=True))
    room = rollout_capacity(plan.max_length, plan.gamma, plan.branches, plan.tokens_per_pass) - plan.max_length
    assert plan.gamma + 1 + sum(taken) <= room


class _Choosy(OnnxRuntimeDevice):
    """The CPU, taking the widths that it was loaded for and no others, and as few as possible."""

    few_shapes = True

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
        shapes = draft_shapes(engine.plan, few=True)
    assert device.asked == {"draft": set(shapes), "draft_trunk": {PassShape(engine.plan.gamma + 1), *shapes}}
    assert len(shapes) == 1, "one branch has no pass of its own"
    assert found.tokens == plain.tokens
    assert not found.events
    assert np.mean([item.accepted for item in found.rounds]) > 0
