"""Every architecture family: exported once, its graphs against torch, its tokens in every mode against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mirror.bench.exactness import GREEDY, Arm, Case, Finding, Law, Tokens, answer_all, judge, transformers_tokens
from mirror.export.build import ExportOptions, ExportReport, export_bundle
from mirror.runtime.records import Mode
from tests.families import FAMILIES, VOCAB, make_checkpoint

TOKENS = 64
# The prompt needs several chunks, and the text outgrows every family's window.
OPTIONS = ExportOptions(max_length=128, prefill_chunk=8, draft="layers:0,1,2,3")
CASE = Case("fixed", tuple((7 * index + 3) % VOCAB for index in range(19)), seed=5)
# Some random models repeat one token for ever; no model does that under a penalty.
PENALISED = Law(repetition_penalty=3.0)
SAMPLED = Law(temperature=1.5, top_p=0.9, repetition_penalty=3.0)
SPECULATIVE = (Arm(Mode.SERIAL, 5), Arm(Mode.MIRROR, 5, "both", kappa=3))


@dataclasses.dataclass(frozen=True)
class Exported:
    """A family's checkpoint, its bundle, and what the export said."""

    checkpoint: Path
    bundle: Path
    report: ExportReport


def export(family: str, folder: Path, options: ExportOptions) -> Exported:
    # Without an end token the texts are as long as asked.
    checkpoint = make_checkpoint(family, folder / "checkpoint", eos_token_id=None)
    return Exported(checkpoint, folder / "bundle", export_bundle(str(checkpoint), folder / "bundle", options))


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A family with a draft of all the target's layers, which is right nearly always."""
    return export(request.param, tmp_path_factory.mktemp(request.param), OPTIONS)


def expected_tokens(family: Exported, law: Law) -> list[Tokens]:
    tokens = transformers_tokens(
        family.checkpoint, family.report.manifest, [CASE], TOKENS, repetition_penalty=law.repetition_penalty
    )
    assert len(tokens[0]) == TOKENS
    return tokens


def findings(family: Exported, law: Law, expected: list[Tokens]) -> Iterator[Finding]:
    for arm in SPECULATIVE:
        with arm.load(family.bundle) as engine:
            yield judge(arm, law, [CASE], expected, answer_all(engine, [CASE], law, TOKENS), reference="expected")


def plain_tokens(family: Exported, law: Law) -> list[Tokens]:
    with Arm(Mode.PLAIN).load(family.bundle) as engine:
        return list(answer_all(engine, [CASE], law, TOKENS).tokens)


def test_every_family_computes_what_torch_computes(exported: Exported) -> None:
    check = exported.report.check
    assert check.skipped is None
    assert check.split is not None
    assert check.torch is not None
    assert check.split.largest < 1e-5
    assert check.torch.largest < 1e-4
    assert check.torch.first_token is None


def test_every_mode_repeats_transformers(exported: Exported) -> None:
    expected = expected_tokens(exported, GREEDY)
    assert plain_tokens(exported, GREEDY) == expected
    for finding in findings(exported, GREEDY, expected):
        assert finding.first_difference is None
        assert finding.exact
        # The draft computes what the target does, so nearly all is accepted: the cache behind it is right too.
        assert finding.acceptance_rate is not None
        assert finding.acceptance_rate > 0.9
        assert finding.reuse_rate is None or finding.reuse_rate > 0.9


@pytest.mark.parametrize("law", [PENALISED, SAMPLED], ids=["penalised", "sampled"])
def test_varied_tokens_are_one_in_every_mode(exported: Exported, law: Law) -> None:
    """The draft, which chooses greedily, is often wrong: windows are cut at every length, caches roll back."""
    expected = plain_tokens(exported, law)
    assert len(set(expected[0])) > 16
    if law == PENALISED:
        assert expected == expected_tokens(exported, law)
    for finding in findings(exported, law, expected):
        assert finding.first_difference is None
        assert finding.exact
        assert finding.acceptance_rate is not None
        assert finding.acceptance_rate < 0.9


def test_a_draft_of_few_layers_changes_nothing(tmp_path: Path) -> None:
    weak = export("gemma2", tmp_path, dataclasses.replace(OPTIONS, draft="layers:0,3"))
    for law in (GREEDY, PENALISED):
        for finding in findings(weak, law, expected_tokens(weak, law)):
            assert finding.first_difference is None
            assert finding.exact
