"""Every mode, draft, candidate source and cache form gives the plain path, and plain gives the table's.

Real sessions on lookup-table models whose logits depend on the whole context through the caches.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mirror
from mirror.bundle import Form
from mirror.errors import RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.engine import Engine, Result
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import FinishReason, Mode
from mirror.runtime.sampling import Sampler, SamplingParams
from mirror.targets.base import Tensor
from mirror.targets.cpu import CpuDevice
from tests.hooked import HookedDevice
from tests.lookup import (
    Lookup,
    LookupBundle,
    agreeing_table,
    open_engine,
    oracle_greedy,
    oracle_logits,
    random_table,
    write_bundle,
)

TARGET = Lookup(random_table(1, 97, 23))
DRAFT = Lookup(agreeing_table(TARGET.table, 0.8, 2))
EXIT_TABLE = random_table(3, 97, 23)
PROMPT = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lookup") / "bundle"
    return write_bundle(folder, LookupBundle(TARGET, DRAFT, EXIT_TABLE))


@pytest.fixture(scope="module")
def ngram_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Few rows: the greedy path soon repeats itself, which is what a lookup draft lives on.
    folder = tmp_path_factory.mktemp("lookup") / "ngram"
    target = Lookup(random_table(8, 11, 11), context=0)
    return write_bundle(folder, LookupBundle(target, None, random_table(9, 11, 11), draft_kind="ngram"))


def test_plain_is_the_tables_own_path(bundle: Path) -> None:
    with open_engine(bundle, EngineOptions(mode=Mode.PLAIN)) as engine:
        for prompt in (PROMPT, [5], list(range(20))):
            result = engine.generate_tokens(prompt, max_new_tokens=40)
            assert list(result.tokens) == oracle_greedy(TARGET, prompt, 40)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("draft_form", list(Form))
@pytest.mark.parametrize("source", list(CandidateSource))
@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_speculation_keeps_the_path(
    bundle: Path, mode: Mode, source: CandidateSource, draft_form: Form, pinned: bool
) -> None:
    options = EngineOptions(mode=mode, candidates=source, pinned=pinned)
    with open_engine(bundle, options, draft=CpuDevice(draft_form)) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=40)
        assert list(result.tokens) == oracle_greedy(TARGET, PROMPT, 40)
        assert not result.events
        assert result.statistics.draft_tokens_accepted > 5
        if mode is Mode.MIRROR:
            assert result.statistics.reuse_rate is not None
            assert result.statistics.reuse_rate > 0


@pytest.mark.parametrize("form", list(Form))
def test_a_perfect_draft_is_always_right_in_either_form(tmp_path: Path, form: Form) -> None:
    """A slot, position or visibility gone wrong in the draft's cache would cost an acceptance."""
    folder = write_bundle(tmp_path / "b", LookupBundle(TARGET, TARGET, EXIT_TABLE, gamma=4, kappa=3))
    for mode in (Mode.SERIAL, Mode.MIRROR):
        options = EngineOptions(mode=mode, candidates=CandidateSource.DRAFT)
        with open_engine(folder, options, draft=CpuDevice(form), target=CpuDevice(form)) as engine:
            statistics = engine.generate_tokens(PROMPT, max_new_tokens=41).statistics
            assert statistics.acceptance_rate == 1.0
            assert statistics.rounds == 8  # 40 tokens after the first, five a round
            assert statistics.reuse_rate in (None, 1.0)


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
def test_every_proposal_is_the_drafts_own_continuation(tmp_path: Path, mode: Mode) -> None:
    """After a mismatch too: what an outcome leaves in the draft's cache must not bend later proposals."""
    table = TARGET.table.copy()
    table[::3] = np.roll(table[::3], 1, axis=1)  # wrong in a third of the contexts, right in the rest
    folder = write_bundle(tmp_path / "b", LookupBundle(TARGET, Lookup(table), EXIT_TABLE, gamma=3, kappa=22))
    with open_engine(folder, EngineOptions(mode=mode, candidates=CandidateSource.DRAFT)) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=50)
    # With every token a candidate, every outcome has its branch.
    assert result.statistics.reuse_rate == (1.0 if mode is Mode.MIRROR else None)
    tokens = PROMPT + list(result.tokens)
    done = len(PROMPT) + 1
    for item in result.rounds:
        expected = oracle_greedy(Lookup(table), tokens[:done], item.proposed)
        agreeing = list(
            itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected, tokens[done:], strict=False))
        )
        assert item.accepted == min(len(agreeing), item.proposed)
        done += item.committed


@pytest.mark.parametrize("form", list(Form))
def test_padding_rows_of_devices_with_fixed_widths_are_harmless(tmp_path: Path, form: Form) -> None:
    """A perfect draft stays perfect where its passes are padded, so no real row sees a padding row."""
    spec = LookupBundle(TARGET, TARGET, EXIT_TABLE, gamma=4, kappa=3, max_length=40, prefill_chunk=16)
    folder = write_bundle(tmp_path / "b", spec)
    prompt = list(range(9))
    widths: set[tuple[str, int]] = set()

    def note(name: str, feeds: Mapping[str, Tensor]) -> None:
        widths.add((name, np.shape(feeds["position_ids"])[1]))

    device = HookedDevice(note, static=True, form=form)
    with open_engine(folder, EngineOptions(candidates=CandidateSource.DRAFT), target=device, draft=device) as engine:
        result = engine.generate_tokens(prompt, max_new_tokens=28)
    assert list(result.tokens) == oracle_greedy(TARGET, prompt, 28)
    assert result.statistics.acceptance_rate == 1.0
    # The last window has room for one draft token and none follows it, so nothing is rolled out.
    assert [item.branches > 0 for item in result.rounds[-2:]] == [True, False]
    # Nine tokens ran in a prefill of sixteen rows, and three branches' worth of rows at full width.
    assert {("target_prefix", 16), ("target_prefix", 5), ("draft", 15)} <= widths


def test_ngram_draft_keeps_the_path_and_finds_repetitions(ngram_bundle: Path) -> None:
    plain = _run(ngram_bundle, EngineOptions(mode=Mode.PLAIN))
    for mode, source in itertools.product((Mode.SERIAL, Mode.MIRROR), CandidateSource):
        result = _run(ngram_bundle, EngineOptions(mode=mode, candidates=source))
        assert result.tokens == plain.tokens
        assert result.statistics.draft_tokens_accepted > 10
        assert not result.events
        if mode is Mode.MIRROR and source is not CandidateSource.EXIT:
            assert result.statistics.reuse_rate is not None
            assert result.statistics.reuse_rate > 0.5


@pytest.mark.parametrize("mode", [Mode.SERIAL, Mode.MIRROR])
@pytest.mark.parametrize("pinned", [False, True])
def test_an_answer_may_have_fewer_draft_tokens_a_round(bundle: Path, mode: Mode, pinned: bool) -> None:
    with open_engine(bundle, EngineOptions(mode=mode, pinned=pinned)) as engine:
        for most, expected in ((1, 1), (2, 2), (9, 3)):
            result = engine.generate_tokens(PROMPT, max_new_tokens=40, num_assistant_tokens=most)
            assert list(result.tokens) == oracle_greedy(TARGET, PROMPT, 40)
            assert max(item.proposed for item in result.rounds) == expected
        with pytest.raises(RequestError, match="num_assistant_tokens is 0; it must be 1 or more"):
            engine.generate_tokens(PROMPT, num_assistant_tokens=0)


def test_the_lookup_size_is_a_choice(ngram_bundle: Path) -> None:
    # One token's successors differ here and there; three tokens in a row hardly ever lie.
    short = _run(ngram_bundle, EngineOptions(mode=Mode.SERIAL, max_ngram_size=1))
    long = _run(ngram_bundle, EngineOptions(mode=Mode.SERIAL, max_ngram_size=5))
    assert short.tokens == long.tokens
    with pytest.raises(RequestError, match="max_ngram_size is 0"):
        EngineOptions(max_ngram_size=0)
    with mirror.load(ngram_bundle, mode="serial", max_ngram_size=4) as engine:
        assert engine.plan.options.max_ngram_size == 4


def _run(bundle: Path, options: EngineOptions) -> Result:
    with open_engine(bundle, options) as engine:
        return engine.generate_tokens(PROMPT, max_new_tokens=50)


def test_a_generations_mode_may_differ_from_the_engines(bundle: Path) -> None:
    with open_engine(bundle, EngineOptions()) as engine:
        results = [
            engine.generate_tokens(PROMPT, max_new_tokens=30, mode=mode) for mode in ("mirror", "plain", "serial")
        ]
    assert len({result.tokens for result in results}) == 1
    assert [result.rounds[0].mode for result in results] == [Mode.MIRROR, Mode.PLAIN, Mode.SERIAL]


def test_shaped_fanout_prepares_as_many_branches_as_it_says(bundle: Path) -> None:
    with open_engine(bundle, EngineOptions(fanout=(2, 1, 0, 2))) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=20)
    assert list(result.tokens) == oracle_greedy(TARGET, PROMPT, 20)
    assert max(item.branches for item in result.rounds) == 5


@pytest.mark.parametrize("mode", list(Mode))
def test_pinned_passes_all_have_one_width_in_rows_and_in_logits(bundle: Path, mode: Mode) -> None:
    """Kernels round differently at different row counts, the LM head's included."""
    widths: dict[str, set[int]] = {"target_prefix": set(), "exit_head": set(), "target_suffix": set()}
    logit_rows: set[int] = set()
    prefill_passes = 2  # seven tokens in chunks of five
    passes = 0

    def note(name: str, feeds: Mapping[str, Tensor]) -> None:
        nonlocal passes
        passes += name == "target_prefix"
        if passes > prefill_passes:
            widths[name].add(np.asarray(feeds["position_ids"]).size)
            if name == "target_suffix":
                logit_rows.add(np.asarray(feeds["logit_rows"]).size)

    with open_engine(bundle, EngineOptions(mode=mode, pinned=True), target=HookedDevice(note)) as engine:
        engine.generate_tokens(PROMPT, max_new_tokens=20)
    assert set.union(*widths.values()) == logit_rows == {4}


@pytest.mark.parametrize("mode", list(Mode))
def test_the_end_token_ends_every_mode_at_the_same_place(tmp_path: Path, mode: Mode) -> None:
    path = oracle_greedy(TARGET, PROMPT, 40)
    eos = path[11]
    folder = write_bundle(tmp_path / "b", LookupBundle(TARGET, TARGET, EXIT_TABLE, eos=(eos,)))
    with open_engine(folder, EngineOptions(mode=mode)) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=40)
    assert list(result.tokens) == path[: path.index(eos) + 1]
    assert result.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("pinned", [False, True])
def test_a_full_cache_ends_with_reason_length_and_uses_every_slot(tmp_path: Path, mode: Mode, pinned: bool) -> None:
    folder = write_bundle(tmp_path / "b", LookupBundle(TARGET, DRAFT, EXIT_TABLE, max_length=25))
    positions: list[int] = []

    def note(name: str, feeds: Mapping[str, Tensor]) -> None:
        positions.append(int(np.max(np.asarray(feeds["position_ids"]))))

    options = EngineOptions(mode=mode, pinned=pinned)
    with open_engine(folder, options, target=HookedDevice(note)) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=100)
        assert list(result.tokens) == oracle_greedy(TARGET, PROMPT, 25 - len(PROMPT))
        assert result.finish_reason is FinishReason.LENGTH
        # The last token needs no pass; only padding may stand past it.
        assert max(positions) == 23 or pinned
        assert all(item.proposed < 25 - len(PROMPT) for item in result.rounds)
        # And the engine goes on working.
        assert engine.generate_tokens([3, 1], max_new_tokens=5).tokens == tuple(oracle_greedy(TARGET, [3, 1], 5))


def test_sampling_with_every_processor_keeps_the_path(bundle: Path) -> None:
    params = SamplingParams(1.2, top_k=12, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=77)
    expected = _oracle_sampled(TARGET, PROMPT, 40, params)
    for mode in Mode:
        with open_engine(bundle, EngineOptions(mode=mode)) as engine:
            result = engine.generate_tokens(
                PROMPT,
                max_new_tokens=40,
                temperature=1.2,
                top_k=12,
                top_p=0.95,
                min_p=0.01,
                repetition_penalty=1.2,
                seed=77,
            )
            assert list(result.tokens) == expected


def _oracle_sampled(
    model: Lookup, prompt: list[int], count: int, params: SamplingParams, eos: tuple[int, ...] = ()
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in eos):
        sampler = Sampler(params, model.vocab_size, np.array(tokens))
        tokens.append(sampler.choose(oracle_logits(model, tokens), len(tokens)))
    return tokens[len(prompt) :]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_models_windows_and_limits_give_the_plain_path(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    vocab = data.draw(st.integers(2, 12), "vocab")
    rows = data.draw(st.sampled_from([7, 31]), "rows")
    seed = data.draw(st.integers(0, 10_000), "seed")
    target = Lookup(random_table(seed, rows, vocab), context=data.draw(st.sampled_from([0, 1])))
    draft = Lookup(agreeing_table(target.table, data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]), "agreement"), seed))
    form = data.draw(st.sampled_from(list(Form)), "form")
    spec = LookupBundle(
        target,
        draft,
        random_table(seed + 1, rows, vocab),
        eos=tuple(data.draw(st.sets(st.integers(0, vocab - 1), max_size=1), "eos")),
        gamma=data.draw(st.integers(1, 5), "gamma"),
        kappa=data.draw(st.integers(1, 4), "kappa"),
        max_length=data.draw(st.integers(8, 40), "max_length"),
        prefill_chunk=data.draw(st.integers(1, 6), "chunk"),
        draft_kind=data.draw(st.sampled_from(["model", "model", "ngram"]), "kind"),
        forms=(form,),
        streams=data.draw(st.integers(0, 3), "streams"),
        feature_layer=data.draw(st.sampled_from([None, None, 1]), "feature layer"),
    )
    prompt = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=min(8, spec.max_length - 1)), "prompt")
    count = data.draw(st.integers(1, 40), "count")
    params = SamplingParams(
        data.draw(st.sampled_from([0.0, 0.0, 0.7, 1.5]), "temperature"),
        top_p=data.draw(st.sampled_from([1.0, 0.8]), "top_p"),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.3]), "penalty"),
        seed=seed,
    )
    folder = write_bundle(tmp_path_factory.mktemp("random") / "b", spec)
    expected = _oracle_sampled(target, prompt, min(count, spec.max_length - len(prompt)), params, spec.eos)
    source = data.draw(st.sampled_from(list(CandidateSource)), "source")
    pinned = data.draw(st.booleans(), "pinned")
    per_pass = data.draw(st.lists(st.integers(1, 1 + spec.streams), min_size=1, max_size=3), "tokens per pass")
    per_pass = per_pass if spec.draft_kind == "model" else [1]
    proposal = data.draw(st.none() | st.integers(1, 1 + spec.streams), "tokens per pass of a proposal")
    limits = data.draw(st.lists(st.integers(1, 12), max_size=3), "branches per pass")
    read = data.draw(st.sampled_from([None, 2, 5, 12]), "draft context")
    modes = [data.draw(st.sampled_from([Mode.SERIAL, Mode.MIRROR]), "mode"), Mode.PLAIN]
    options = EngineOptions(
        mode=modes[0],
        candidates=source,
        pinned=pinned,
        tokens_per_pass=tuple(per_pass),
        branches_per_pass=tuple(sorted(limits, reverse=True)) or None,
        proposal_tokens_per_pass=None if proposal is None or spec.draft_kind != "model" else (proposal,),
        draft_context=read if spec.draft_kind == "model" and spec.feature_layer is None else None,
    )
    # Devices that compile ahead take few widths, so passes are padded.
    target_device = HookedDevice(form=form, static=data.draw(st.booleans(), "static target"))
    draft_device = HookedDevice(form=form, static=data.draw(st.booleans(), "static draft"))
    with open_engine(folder, options, target=target_device, draft=draft_device) as engine:
        for mode in modes:
            result = _sample(engine, prompt, count, params, mode)
            assert list(result.tokens) == expected
            assert not result.events


def _sample(engine: Engine, prompt: list[int], count: int, params: SamplingParams, mode: Mode) -> Result:
    return engine.generate_tokens(
        prompt,
        max_new_tokens=count,
        temperature=params.temperature,
        top_p=params.top_p,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        mode=mode,
    )
