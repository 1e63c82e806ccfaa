"""The target's choice: greedy ties, transformers' processing order, and the law of a draw."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mirror
from mirror.errors import DeviceError, RequestError
from mirror.runtime import sampling
from mirror.runtime.contenders import Peaks
from mirror.runtime.engine import chooser_for
from mirror.runtime.noise import PICK_TOKEN, TAIL_TOKEN, gumbel, philox, uniforms
from mirror.runtime.records import Floats
from mirror.runtime.sampling import Kept, Sampler, SamplingParams, draw, process
from tests.lookup import Lookup, LookupBundle, chi_square, chi_square_limit, random_table, softmax, write_bundle

NO_CONTEXT = np.zeros(0, np.int64)
FALSE_ALARM = 1e-7


# The noise.


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: tuple[int, int], expected: list[int]) -> None:
    words = philox(np.array(counter, np.uint64)[:, None], key)
    assert words[:, 0].tolist() == expected


def test_noise_depends_on_seed_position_and_token_only() -> None:
    tokens = np.arange(50)
    base = uniforms(3, 10, tokens)
    assert np.array_equal(base[[7, 3]], uniforms(3, 10, np.array([7, 3])))
    for other in (uniforms(4, 10, tokens), uniforms(3, 11, tokens), uniforms(3 + 2**32, 10, tokens)):
        assert not np.isin(other, base).any()


def test_uniforms_lie_strictly_inside_the_unit_interval() -> None:
    # The extreme words: (2**52 - 1 + 0.5) / 2**52 must not round to 1.
    assert ((2**52 - 1) + 0.5) * 2.0**-52 < 1.0
    values = uniforms(0, 0, np.arange(100_000))
    assert values.min() > 0
    assert values.max() < 1
    # Mean 1/2 within 6 standard errors: false alarm 2e-9.
    assert abs(values.mean() - 0.5) < 6 / math.sqrt(12 * values.size)
    assert np.isfinite(gumbel(values)).all()


# Processing.


def _transformers_law(logits: np.ndarray, params: SamplingParams, context: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    process_module = pytest.importorskip("transformers.generation.logits_process")
    scores, ids = torch.tensor(logits)[None], torch.tensor([context])
    if params.repetition_penalty != 1:
        scores = process_module.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    if params.temperature != 1:
        scores = process_module.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = process_module.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = process_module.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = process_module.MinPLogitsWarper(params.min_p)(ids, scores)
    law: np.ndarray = torch.softmax(scores.double(), -1)[0].numpy()
    return law


@pytest.mark.parametrize("vocab", [7, 300])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.7),
        SamplingParams(1.0, top_k=5),
        SamplingParams(1.5, top_p=0.8),
        SamplingParams(1.0, top_p=0.999),
        SamplingParams(1.0, min_p=0.1),
        SamplingParams(0.8, top_k=100, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
        SamplingParams(1.0, repetition_penalty=0.8),
    ],
)
def test_processed_law_is_that_of_transformers(params: SamplingParams, vocab: int) -> None:
    for seed in range(5):
        logits = random_table(seed, 1, vocab)[0]
        context = [0, 3, 3, 6]
        seen = np.zeros(vocab, np.bool_)
        seen[context] = True
        kept = process(logits, params, seen)
        ours = np.zeros(vocab)
        ours[kept.ids] = np.exp(kept.scores) / np.exp(kept.scores).sum()
        theirs = _transformers_law(logits, params, context)
        assert np.array_equal(ours > 0, theirs > 0)
        assert np.allclose(ours, theirs, atol=1e-6)


def test_top_p_reaches_past_the_first_guess_of_its_size() -> None:
    kept = process(np.zeros(1000, np.float32), SamplingParams(1.0, top_p=0.75), None)
    # All alike: ties go to the lower ids, and 750 of them reach the mass.
    assert kept.ids.tolist() == list(range(750))


def test_greedy_takes_the_lowest_id_on_ties_and_minds_the_penalty() -> None:
    logits = np.array([1, 4, 4, -2], np.float32)
    assert Sampler(SamplingParams(), 4, NO_CONTEXT).choose(logits, 0) == 1
    assert Sampler(SamplingParams(repetition_penalty=2.0), 4, np.array([1])).choose(logits, 0) == 2
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), 4, np.array([1]))
    sampler.see(2)
    assert sampler.choose(np.array([1, 4, 4, 2.5], np.float32), 0) == 3


@pytest.mark.parametrize("by", ["numpy", "library"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("size", "place"), [(3, 1), (100, 64), (100, 99)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(
    temperature: float, bad: float, size: int, place: int, by: str
) -> None:
    logits = np.zeros(size, np.float32)
    logits[place] = bad
    with pytest.raises(DeviceError, match=f"greatest logit is {bad}"):
        _sampler(SamplingParams(temperature), size, NO_CONTEXT, by).choose(logits, 0)
    if temperature > 0.0:
        with pytest.raises(DeviceError, match="greatest logit is -inf"):
            _sampler(SamplingParams(temperature), size, NO_CONTEXT, by).choose(np.full(size, -np.inf, np.float32), 0)


def _sampler(params: SamplingParams, vocab_size: int, context: np.ndarray, by: str) -> Sampler:
    """Return a sampler that draws in numpy, or by the package's library where that is built."""
    if by == "numpy" or params.temperature == 0.0:
        return Sampler(params, vocab_size, context)
    choose_row = chooser_for(params)
    if choose_row is None:
        pytest.skip("mirror's kernels were not built")
    return Sampler(params, vocab_size, context, choose_row)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_params_out_of_range_are_refused_by_name(arguments: dict[str, float]) -> None:
    (name,) = arguments
    with pytest.raises(RequestError, match=f"{name} is .*; it must be"):
        SamplingParams(**arguments)  # type: ignore[arg-type]


# The draw.


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(2, 200))
@settings(max_examples=50)
def test_a_draw_is_repeatable_and_inside_the_support(seed: int, position: int, vocab: int) -> None:
    kept = process(random_table(vocab, 1, vocab)[0], SamplingParams(1.0, top_p=0.9), None)
    token = draw(kept, seed, position)
    assert token in kept.ids
    assert token == draw(kept, seed, position)


@pytest.mark.parametrize("head", [1, 4, 64])
def test_draws_follow_the_law_with_and_without_a_tail(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square over 10,000 positions; a false alarm has odds below 1e-7."""
    monkeypatch.setattr(sampling, "HEAD_TOKENS", head)
    logits = random_table(1, 1, 12, spread=1.0)[0]
    kept = process(logits, SamplingParams(1.0), None)
    drawn = np.array([draw(kept, 11, position) for position in range(10_000)])
    statistic, degrees = chi_square(np.bincount(drawn, minlength=12), softmax(logits))
    assert statistic < chi_square_limit(degrees, FALSE_ALARM)


def test_equal_weights_in_a_wide_support_all_come_equally_often() -> None:
    """300 tokens of which 44 share a Gumbel; 20,000 draws, false alarm below 1e-7."""
    kept = Kept(np.arange(300), np.zeros(300))
    drawn = np.array([draw(kept, 5, position) for position in range(20_000)])
    statistic, degrees = chi_square(np.bincount(drawn, minlength=300), np.full(300, 1 / 300))
    assert statistic < chi_square_limit(degrees, FALSE_ALARM)


def test_draws_at_neighbouring_positions_are_independent() -> None:
    """Chi-square of pairs; false alarm below 1e-7."""
    logits = random_table(2, 1, 5, spread=0.5)[0]
    kept = process(logits, SamplingParams(1.0), None)
    drawn = np.array([draw(kept, 3, position) for position in range(10_001)])
    pairs = np.bincount(drawn[:-1] * 5 + drawn[1:], minlength=25)
    statistic, degrees = chi_square(pairs, np.outer(softmax(logits), softmax(logits)).ravel())
    assert statistic < chi_square_limit(degrees, FALSE_ALARM)


def _plain_choice(logits: Floats, params: SamplingParams, seen: np.ndarray, position: int) -> int:
    """Choose as docs/sampling.md says it, step by step over the whole row."""
    penalty = np.float32(params.repetition_penalty)
    lowered = np.where(logits < 0, logits * penalty, logits / penalty)
    scores = np.where(seen, lowered, logits).astype(np.float64) / params.temperature
    ids = np.flatnonzero(scores > -np.inf)
    scores = scores[ids] - scores[ids].max()
    if 0 < params.top_k < ids.size:
        keep = scores >= np.sort(scores)[-params.top_k]
        ids, scores = ids[keep], scores[keep]
    order = np.argsort(-scores, kind="stable")
    if params.top_p < 1:
        reached = np.cumsum(np.exp(scores)[order]) >= params.top_p * np.cumsum(np.exp(scores))[-1]
        count = int(np.argmax(reached)) + 1 if reached.any() else ids.size
        keep = np.sort(order[:count])
        ids, scores = ids[keep], scores[keep]
    if params.min_p > 0:
        keep = np.exp(scores) >= params.min_p
        ids, scores = ids[keep], scores[keep]
    return _plain_draw(ids, scores, params.seed, position)


def _plain_draw(ids: np.ndarray, scores: np.ndarray, seed: int, position: int) -> int:
    order = np.argsort(-scores, kind="stable")
    head, tail = np.sort(order[: sampling.HEAD_TOKENS]), np.sort(order[sampling.HEAD_TOKENS :])
    values = scores[head] + gumbel(uniforms(seed, position, ids[head]))
    if tail.size == 0:
        return int(ids[head[np.argmax(values)]])
    noise = uniforms(seed, position, np.array([TAIL_TOKEN, PICK_TOKEN]))
    mass = np.cumsum(np.exp(scores[tail]))
    if mass[-1] == 0 or values.max() >= np.log(mass[-1]) + gumbel(noise[:1])[0]:
        return int(ids[head[np.argmax(values)]])
    return int(ids[tail[min(int(np.searchsorted(mass, noise[1] * mass[-1], side="right")), mass.size - 1)]])


def _odd_rows() -> Iterator[tuple[str, Floats]]:
    """Yield rows of logits that shortcuts might get wrong."""
    source, wide = np.random.default_rng(7), 16_384 + 64 + 11  # blocks enough for the search by blocks, and a rest
    for vocab in (7, 256, 257, 600, 16_383, wide):
        for spread in (0.5, 2.0, 8.0):
            yield f"spread {spread}", (source.standard_normal(vocab) * spread).astype(np.float32)
    likely = (source.standard_normal(wide) * 2).astype(np.float32)
    likely[source.integers(0, wide, 100)] += source.exponential(6, 100).astype(np.float32)
    yield "a few likely ones", likely
    yield "half precision, so many ties", likely.astype(np.float16).astype(np.float32)
    yield "all alike", np.full(wide, 3, np.float32)
    likely[-5:] = 25
    yield "the likeliest last, past the last block", likely
    for finite in (1, 3, 256, 257, 512, 900):
        sparse = np.full(wide, -np.inf, np.float32)
        sparse[source.choice(wide, finite, replace=False)] = source.standard_normal(finite)
        yield f"{finite} finite ones", sparse
    # Their scores are one number in float64, though their logits differ: the lowest ids are the head.
    close = (source.standard_normal(wide) * 1e-20).astype(np.float32)
    close[[5, 50]] = 3
    yield "differences that are lost", close


_LAWS = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 500, "top_p": 0.95},
    {"min_p": 0.05},
    {"min_p": 0.02, "top_p": 0.9},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("by", ["numpy", "library"])
@pytest.mark.parametrize("temperature", [1e-40, 0.3, 1.0, 4.0, 1e300])
@pytest.mark.parametrize("law", _LAWS, ids=str)
def test_shortcuts_change_no_choice(law: dict[str, float], temperature: float, by: str) -> None:
    """Bounds in float32 and searches by blocks save time; the token is that of the whole row, worked through."""
    params = SamplingParams(temperature, seed=3, **law)  # type: ignore[arg-type]
    for name, logits in _odd_rows():
        context = np.arange(0, logits.size, 3)
        seen = np.zeros(logits.size, np.bool_)
        seen[context] = True
        sampler = _sampler(params, logits.size, context, by)
        for position in range(4):
            expected = _plain_choice(logits, params, seen, position)
            with np.errstate(over="raise", invalid="raise"):
                assert sampler.choose(logits, position) == expected, (name, logits.size, position)


@pytest.mark.parametrize("by", ["numpy", "library"])
def test_a_tail_that_wins_is_drawn_from_as_the_whole_row_would(by: str) -> None:
    """Most of the mass is past the head here, so most draws go all the way."""
    logits = (np.random.default_rng(1).standard_normal(20_011) * 0.5).astype(np.float32)
    params, seen = SamplingParams(1.0, seed=9), np.zeros(logits.size, np.bool_)
    head = set(np.argsort(-logits)[: sampling.HEAD_TOKENS].tolist())
    sampler = _sampler(params, logits.size, NO_CONTEXT, by)
    chosen = [sampler.choose(logits, position) for position in range(40)]
    assert chosen == [_plain_choice(logits, params, seen, position) for position in range(40)]
    assert sum(token in head for token in chosen) < 20


@pytest.mark.parametrize(("nudge", "kept"), [(-1e-9, 25), (1e-9, 26)])
def test_top_p_within_the_error_of_float32_is_settled_in_float64(nudge: float, kept: int) -> None:
    logits = np.full(8_192, -3.3, np.float32)
    logits[100:150] = 0
    mass = np.exp(logits.astype(np.float64)).sum()
    params = SamplingParams(1.0, top_p=25 / mass * (1 + nudge))
    assert process(logits, params, None).ids.tolist() == list(range(100, 100 + kept))
    sampler = _sampler(params, logits.size, NO_CONTEXT, "library")
    drawn = {sampler.choose(logits, position) for position in range(1_000)}
    assert drawn == set(range(100, 100 + kept))


@pytest.mark.parametrize("by", ["numpy", "library"])
def test_a_row_of_one_head_and_no_tail_has_no_tail_to_lose_to(by: str) -> None:
    """Each of the 256 tokens stands in a block of its own, and the tail's noise is as great as it hardly ever is."""
    logits = np.full(16_384, -np.inf, np.float32)
    logits[:256] = np.linspace(0, 0.1, 256)
    noise = uniforms(3, np.arange(200_000), np.full(200_000, TAIL_TOKEN))
    position = int(np.argmax(noise))
    expected = _plain_choice(logits, SamplingParams(1.0, seed=3), np.zeros(16_384, np.bool_), position)
    assert _sampler(SamplingParams(1.0, seed=3), 16_384, NO_CONTEXT, by).choose(logits, position) == expected


def test_the_whole_row_is_left_alone_where_the_head_is_sure_to_win(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.zeros(20_011, np.float32)
    logits[[3, 7_000]] = 40
    monkeypatch.setattr(sampling, "_of_tail", lambda race, scores, head: pytest.fail("the tail was summed up"))
    monkeypatch.setattr(Peaks, "mass", lambda peaks: pytest.fail("the row's exponentials were taken"))
    sampler = Sampler(SamplingParams(1.0, seed=9), logits.size, NO_CONTEXT)
    assert {sampler.choose(logits, position) for position in range(20)} == {3, 7_000}


def test_an_answer_is_the_same_with_and_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "bundle", LookupBundle(Lookup(random_table(1, 600, 23))))
    if chooser_for(SamplingParams(1.0)) is None:
        pytest.skip("mirror's kernels were not built")
    answers = []
    for kernels in ("", "off"):
        monkeypatch.setenv("MIRROR_KERNELS", kernels)
        with mirror.load(bundle, mode="plain", threads=1) as engine:
            for law in ({}, {"top_p": 0.9}, {"top_k": 30, "repetition_penalty": 1.2}):
                answers.append(
                    engine.generate_tokens([1, 2, 3], max_new_tokens=40, temperature=1.3, seed=5, **law).tokens
                )
    assert answers[:3] == answers[3:]
    assert len(set(answers[:3])) == 3


def test_a_penalty_that_leaves_no_finite_logit_is_an_error() -> None:
    params = SamplingParams(1.0, repetition_penalty=1e-45)
    sampler = _sampler(params, 4, np.array([1]), "library")
    with np.errstate(over="ignore"), pytest.raises(DeviceError, match="greatest logit is inf"):
        sampler.choose(np.array([1, 4, 4, -2], np.float32), 0)
