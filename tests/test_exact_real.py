"""A real model: SmolLM2-135M-Instruct exported here, its tokens in every mode against transformers and against plain.

The full matrix, on all prompts, is `python -m mirror.bench.exactness`; this is a part of it that fits a test run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mirror.bench.exactness import (
    GREEDY,
    SAMPLED,
    Answers,
    Arm,
    Case,
    Difference,
    Law,
    Tokens,
    answer_all,
    first_difference,
    judge,
    make_cases,
    transformers_tokens,
)
from mirror.bench.prompts import KINDS, load_prompts
from mirror.bundle import DRAFT_CONTEXT, read_manifest
from mirror.default_model import locate_model
from mirror.errors import ExportError
from mirror.export.build import ExportOptions, export_bundle
from mirror.runtime.engine import Engine
from mirror.runtime.records import Mode

TOKENS = 24
# A draft of all layers but one: right often enough to be accepted, wrong often enough to be corrected.
NEARLY_ALL = "layers:" + ",".join(str(layer) for layer in range(30) if layer != 20)


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    try:
        return locate_model()
    except ExportError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def bundle(smollm2: Path) -> Path:
    """In float32, with the trained draft that comes with it."""
    return smollm2


@pytest.fixture(scope="module")
def int4_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In int4, with a draft of the target's own layers; removed when the tests are over."""
    folder = tmp_path_factory.mktemp("int4")
    export_bundle(str(checkpoint), folder / "bundle", ExportOptions(precision="int4", draft=NEARLY_ALL, max_length=512))
    yield folder / "bundle"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cases(bundle: Path) -> Sequence[Case]:
    """One prompt of each kind."""
    return make_cases(bundle, per_kind=1)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, bundle: Path, cases: Sequence[Case]) -> Sequence[Tokens]:
    return transformers_tokens(checkpoint, read_manifest(bundle), cases, TOKENS)


def test_what_a_draft_reads_is_as_it_was_trained(bundle: Path, int4_bundle: Path) -> None:
    """The trained one guesses less with more; the target's own layers know long texts."""
    assert read_manifest(bundle).settings.draft_context == DRAFT_CONTEXT
    assert read_manifest(int4_bundle).settings.draft_context is None


def test_the_prompts_are_24_of_6_kinds() -> None:
    prompts = load_prompts()
    assert [sum(prompt.kind == kind for prompt in prompts) for kind in KINDS] == [4] * 6
    assert len({prompt.name for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 24
    assert all(any(letter.isdigit() for letter in prompt.text) for prompt in prompts if prompt.kind == "maths")


def test_a_differing_answer_is_found() -> None:
    cases = [Case("a", (1,), 0), Case("b", (1,), 1)]
    assert first_difference(cases, [(5, 6), (7, 8)], [(5, 6), (7, 8)]) is None
    assert first_difference(cases, [(5, 6), (7, 8)], [(5, 6), (7, 9)]) == Difference("b", 1, 8, 9)
    assert first_difference(cases, [(5, 6), (7, 8)], [(5,), (7, 8)]) == Difference("a", 1, 6, None)
    assert first_difference(cases, [(5,), (7, 8)], [(5, 6), (7, 8)]) == Difference("a", 1, None, 6)


def test_prompts_are_tokenised_as_transformers_does(bundle: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    for prompt, case in zip(load_prompts(), make_cases(bundle), strict=True):
        text = tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        assert tuple(tokenizer(text, add_special_tokens=False).input_ids) == case.prompt
        digits = [token for token in tokenizer.convert_ids_to_tokens(case.prompt) if any(map(str.isdigit, token))]
        assert all(sum(map(str.isdigit, token)) == 1 for token in digits), "this model's digits stand alone"


def test_plain_repeats_transformers(bundle: Path, cases: Sequence[Case], expected: Sequence[Tokens]) -> None:
    with Arm(Mode.PLAIN).load(bundle) as engine:
        found = answer_all(engine, cases, GREEDY, TOKENS)
    assert first_difference(cases, expected, found.tokens) is None
    assert found.tokens == tuple(expected)


@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("candidates", ["exit", "draft", "both"])
def test_mirror_repeats_transformers(
    bundle: Path, cases: Sequence[Case], expected: Sequence[Tokens], candidates: str, gamma: int
) -> None:
    arm = Arm(Mode.MIRROR, gamma, candidates, kappa=2)
    _check(bundle, arm, cases[1:3], expected[1:3])


@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_serial_repeats_transformers(
    bundle: Path, cases: Sequence[Case], expected: Sequence[Tokens], gamma: int
) -> None:
    _check(bundle, Arm(Mode.SERIAL, gamma), cases[3:], expected[3:])


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_a_draft_on_openvino_repeats_transformers(
    bundle: Path, cases: Sequence[Case], expected: Sequence[Tokens], mode: Mode
) -> None:
    pytest.importorskip("openvino")
    arm = Arm(mode, 3, "both" if mode is Mode.MIRROR else None, draft_device="openvino:CPU", kappa=2)
    _check(bundle, arm, cases[3:5], expected[3:5])


def _check(bundle: Path, arm: Arm, cases: Sequence[Case], expected: Sequence[Tokens]) -> None:
    with arm.load(bundle) as engine:
        finding = judge(arm, GREEDY, cases, expected, answer_all(engine, cases, GREEDY, TOKENS), reference="given")
    assert finding.first_difference is None
    assert finding.exact
    # Else nothing was tried: windows must be accepted, cut short and, in mirror mode, reused.
    assert finding.acceptance_rate is not None
    assert 0 < finding.acceptance_rate < 1
    # The exit, half way up and untrained, guesses a long window's outcome too seldom to be counted on.
    if arm.mode is Mode.MIRROR and (arm.candidates != "exit" or arm.gamma == 1):
        assert finding.reuse_rate is not None
        assert finding.reuse_rate > 0


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Iterator[Engine]:
    with Arm(Mode.MIRROR, 3, "both", kappa=2).load(bundle) as engine:
        yield engine


def _in_mode(engine: Engine, mode: Mode, cases: Sequence[Case], law: Law) -> Answers:
    results = [
        engine.generate_tokens(
            case.prompt,
            max_new_tokens=TOKENS,
            temperature=law.temperature,
            top_p=law.top_p,
            seed=case.seed,
            mode=mode,
        )
        for case in cases
    ]
    return Answers(tuple(results), 0.0)


@pytest.mark.parametrize("law", SAMPLED, ids=lambda law: f"{law.temperature}-{law.top_p}")
def test_one_seed_gives_one_text_in_every_mode(
    engine: Engine, cases: Sequence[Case], expected: Sequence[Tokens], law: Law
) -> None:
    greedy = tuple(expected[:2])
    expected = _in_mode(engine, Mode.PLAIN, cases[:2], law).tokens
    assert expected != greedy
    assert _in_mode(engine, Mode.SERIAL, cases[:2], law).tokens == expected
    assert _in_mode(engine, Mode.MIRROR, cases[:2], law).tokens == expected


def test_another_seed_gives_another_text(engine: Engine, cases: Sequence[Case]) -> None:
    first, second = (Case("same prompt", cases[0].prompt, seed) for seed in (0, 1))
    answers = _in_mode(engine, Mode.PLAIN, [first, second], Law(1.0)).tokens
    assert answers[0] != answers[1]


@pytest.mark.parametrize("mode", list(Mode))
def test_a_conversation_says_what_it_would_from_scratch(engine: Engine, mode: Mode) -> None:
    conversation = engine.conversation([{"role": "system", "content": "You answer in one short sentence."}])
    said = ("Name a fruit that is red.", "And one that is yellow?", "Add 17 and 25.")
    found = [conversation.say(text, max_new_tokens=16, mode=mode) for text in said]
    for turn, result in enumerate(found[1:], start=1):
        assert result.statistics.reused_prompt_tokens > found[turn - 1].prompt_tokens
    for turn, result in enumerate(found):
        scratch = engine.generate(conversation.messages[: 2 * turn + 2], max_new_tokens=16, mode="plain")
        assert scratch.statistics.reused_prompt_tokens == 0
        assert scratch.tokens == result.tokens


@pytest.mark.parametrize(("law", "gamma"), [(GREEDY, 7), (Law(1.0, 0.9), 3)], ids=["greedy-7", "sampled-3"])
def test_pinned_int4_gives_one_text_in_every_mode(int4_bundle: Path, law: Law, gamma: int) -> None:
    cases = make_cases(int4_bundle, per_kind=1)[:3]
    mirror = Arm(Mode.MIRROR, gamma, "both", kappa=2, pinned=True)
    with mirror.plain.load(int4_bundle) as engine:
        expected = answer_all(engine, cases, law, 2 * TOKENS).tokens
    for arm in (Arm(Mode.SERIAL, gamma, pinned=True), mirror):
        with arm.load(int4_bundle) as engine:
            finding = judge(arm, law, cases, expected, answer_all(engine, cases, law, 2 * TOKENS), reference="plain")
        assert finding.first_difference is None
        assert finding.exact
        assert finding.acceptance_rate is not None
        assert 0 < finding.acceptance_rate < 1
