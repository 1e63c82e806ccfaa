"""The target's own choice of a token, from one row of logits. Pure; numpy alone.

Greedy: the likeliest token, the lowest id on ties. Sampled: the processed distribution, in the
order and with the conventions of transformers, then a draw by Gumbel noise that depends only on
(seed, absolute position, token). So the choice does not depend on the draft, the window or the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mirror.errors import DeviceError, RequestError
from mirror.runtime.contenders import FLOAT32_SLACK, Peaks, find_peaks, least_of_best
from mirror.runtime.noise import F64, PICK_TOKEN, TAIL_TOKEN, gumbel, uniforms
from mirror.runtime.records import Candidates, Floats, Ints

# Kept tokens with a Gumbel of their own; the others share one.
HEAD_TOKENS = 256
_FLOAT64_SLACK = 1e-9  # far more than float64 gets wrong in a sum over a vocabulary, as a share of it
_NO_WEIGHT = -1e3  # a score whose exponential is 0 in float32 and in float64
_TAIL_AND_PICK = np.array([TAIL_TOKEN, PICK_TOKEN], np.int64)


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep tokens no less likely than the k-th; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose mass reaches it; 1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides a positive and multiplies a negative logit of every token that
            the context holds; 1 is none.
        seed: 0 <= seed < 2**64.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1 (all tokens)")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "between 0 (all tokens) and 1")
        _require(0.0 < self.repetition_penalty < float("inf"), "repetition_penalty", self.repetition_penalty, "above 0")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2**64 - 1")

    @property
    def keeps_all(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_k == 0 and self.top_p == 1.0 and self.min_p == 0.0


def _require(holds: bool, name: str, found: float, expected: str) -> None:
    if not holds:
        raise RequestError(f"{name} is {found}; it must be {expected}")


@dataclass(frozen=True)
class Kept:
    """The processed distribution's support.

    Attributes:
        ids: int64 [kept], ascending.
        scores: float64 [kept], log weight of each; the greatest is 0.
    """

    ids: Ints
    scores: F64


def process(logits: Floats, params: SamplingParams, seen: NDArray[np.bool_] | None) -> Kept:
    """Return the processed distribution of one row.

    Args:
        logits: float32 [vocab].
        params: temperature above 0.
        seen: bool [vocab], the tokens of the context; None without a repetition penalty.
    """
    return _processed(penalised(logits, params.repetition_penalty, seen), params)


def _processed(logits: Floats, params: SamplingParams) -> Kept:
    """Return the distribution of a row whose penalties are applied."""
    peaks = find_peaks(logits, params.temperature)
    alone = params.top_k == 0 and params.top_p < 1.0
    kept = _nucleus(peaks, params.top_p) if peaks is not None and alone else None
    if kept is None:
        kept = _scored(logits, params.temperature, _that_may_stay(peaks, params))
        kept = _top_p(_top_k(kept, params.top_k), params.top_p)
    return _only(kept, np.exp(kept.scores) >= params.min_p) if params.min_p > 0.0 else kept


def _that_may_stay(peaks: Peaks | None, params: SamplingParams) -> Ints | None:
    """Return ids, ascending, with all tokens that the first limit on their number keeps; None for all."""
    if peaks is None:
        return None
    if params.top_k > 0:
        return peaks.best(params.top_k)
    return peaks.at_least(params.min_p) if params.min_p > 0.0 and params.top_p == 1.0 else None


def _scored(logits: Floats, temperature: float, ids: Ints | None) -> Kept:
    """Return the scores of some tokens, the likeliest among them; of all where ids is None. Drops those at -inf."""
    scores = _scores(logits if ids is None else logits[ids], temperature)
    ids = np.arange(scores.size) if ids is None else ids
    finite = scores > -np.inf
    return Kept(ids, scores) if finite.all() else Kept(ids[finite], scores[finite])


def _scores(logits: Floats, temperature: float) -> F64:
    """Return logits over a temperature less the greatest, in float64."""
    scores = logits.astype(np.float64)
    if temperature != 1.0:
        scores /= temperature
    scores -= scores.max()
    return scores


def _only(kept: Kept, where: NDArray[np.bool_]) -> Kept:
    return Kept(kept.ids[where], kept.scores[where])


def _top_k(kept: Kept, top_k: int) -> Kept:
    """Keep the k likeliest; as transformers does, ties with the k-th stay."""
    size = kept.ids.size
    if not 0 < top_k < size:
        return kept
    return _only(kept, kept.scores >= np.partition(kept.scores, size - top_k)[size - top_k])


def _top_p(kept: Kept, top_p: float) -> Kept:
    """Keep the fewest likeliest tokens whose mass reaches top_p, ties by lower id."""
    if top_p == 1.0:
        return kept
    mass = float(np.cumsum(np.exp(kept.scores))[-1])
    share = _negligible(top_p, mass, kept.ids.size)
    near = _only(kept, kept.scores >= np.log(share)) if share > 0.0 else kept
    ranked, reached = _ranked(near.scores)
    return _first(near, ranked, int(np.searchsorted(reached, top_p * mass, side="left")) + 1)


def _nucleus(peaks: Peaks, top_p: float) -> Kept | None:
    """Return what top-p alone keeps, from the likely tokens and the mass of all; None where it is next to 1."""
    mass = peaks.mass()
    share = _negligible(top_p, mass, peaks.logits.size)
    ids = peaks.at_least(share) if share > 0.0 else None
    if ids is None:
        return None
    near = _scored(peaks.logits, peaks.temperature, ids)
    ranked, reached = _ranked(near.scores)
    wanted = top_p * mass
    bounds = np.searchsorted(reached, (wanted * (1.0 - FLOAT32_SLACK), wanted * (1.0 + FLOAT32_SLACK)), side="left")
    if bounds[0] == bounds[1]:
        return _first(near, ranked, int(bounds[0]) + 1)
    # Float32 leaves the last token in doubt.
    mass = float(np.cumsum(np.exp(_scored(peaks.logits, peaks.temperature, None).scores))[-1])
    return _first(near, ranked, int(np.searchsorted(reached, top_p * mass, side="left")) + 1)


def _negligible(top_p: float, mass: float, size: int) -> float:
    """Return a weight such that all tokens below it add up to less than top-p leaves out; 0 for no such."""
    # Half of what would do, so that rounding doesn't matter; next to 1 it would.
    return (1.0 - top_p) * mass / (2 * size) if top_p < 1.0 - _FLOAT64_SLACK else 0.0


def _ranked(scores: F64) -> tuple[F64, F64]:
    """Return scores from the greatest down, and the running sums of their weights."""
    ranked = -np.sort(-scores)
    return ranked, np.cumsum(np.exp(ranked))


def _first(kept: Kept, ranked: F64, count: int) -> Kept:
    """Return the `count` likeliest tokens, ties by lower id; all if there are fewer."""
    if count >= ranked.size:
        return kept
    least = ranked[count - 1]
    where = kept.scores > least
    ties = np.flatnonzero(kept.scores == least)
    where[ties[: count - int(np.count_nonzero(where))]] = True
    return _only(kept, where)


def _likeliest(scores: F64, count: int) -> Ints:
    """Return the indices of the `count` greatest scores, greatest first, ties by lower index."""
    inside = np.flatnonzero(scores >= least_of_best(scores, count)) if count < scores.size else np.arange(scores.size)
    order = np.argsort(-scores[inside], kind="stable")
    result: Ints = inside[order[:count]]
    return result


@dataclass(frozen=True)
class _Race:
    """The head's race, and the noise of the tail that runs against it.

    Attributes:
        head: int64 [HEAD_TOKENS], its tokens, ascending.
        scores: float64 [HEAD_TOKENS], theirs.
        token: the winner.
        value: the winner's score with its noise.
        tail_noise: the Gumbel that the other tokens share.
        pick: the uniform that picks among them.
    """

    head: Ints
    scores: F64
    token: int
    value: float
    tail_noise: float
    pick: float

    def is_won(self, tail_mass: float) -> bool:
        """Whether the head wins against a tail whose weights don't add up to this mass."""
        return tail_mass == 0.0 or self.value > float(np.log(tail_mass)) + self.tail_noise

    def rest(self, mass: float) -> float:
        """Return a number that the tail's weights don't add up to, from a mass of all that float32 gave."""
        return max(mass - float(np.exp(self.scores).sum()), 0.0) + FLOAT32_SLACK * mass


def _run(kept: Kept, seed: int, position: int) -> _Race:
    inside = np.sort(_likeliest(kept.scores, HEAD_TOKENS))
    head, scores = kept.ids[inside], kept.scores[inside]
    noise = uniforms(seed, position, np.append(head, _TAIL_AND_PICK))
    values = scores + gumbel(noise[:-2])
    winner = int(np.argmax(values))
    return _Race(
        head, scores, int(head[winner]), float(values[winner]), float(gumbel(noise[-2:-1])[0]), float(noise[-1])
    )


def draw(kept: Kept, seed: int, position: int) -> int:
    """Return the token drawn at an absolute position.

    Exact in law: let G_t be independent standard Gumbels. argmax(log w_t + G_t) has law w / sum w.
    For a set T, max over T of (log w_t + G_t) is itself log(sum of T's w) + a standard Gumbel, and
    which token of T attains it is independent of that maximum, with law w / (sum of T's w). So the
    tokens past the likeliest `HEAD_TOKENS` may share one Gumbel on their total mass, and, where the
    shared one wins, an independent uniform picks among them. Which tokens share depends on the
    logits alone, never on the noise.
    """
    if kept.ids.size <= HEAD_TOKENS:
        return int(kept.ids[np.argmax(kept.scores + gumbel(uniforms(seed, position, kept.ids)))])
    race = _run(kept, seed, position)
    # In float32 the tail costs little, and most races need no more of it.
    mass = float(np.exp(np.maximum(kept.scores, _NO_WEIGHT).astype(np.float32)).sum())
    if race.is_won(race.rest(mass)):
        return race.token
    index = _of_tail(race, kept.scores.copy(), np.searchsorted(kept.ids, race.head))
    return race.token if index is None else int(kept.ids[index])


def _of_tail(race: _Race, scores: F64, head: Ints) -> int | None:
    """Return the place of the tail's token that beats a race's winner, None where none does.

    Args:
        scores: float64 [n], of all tokens, by ascending token. Written over.
        head: int64 [HEAD_TOKENS], places of the head's among them.
    """
    scores[head] = -np.inf  # a weight of 0 changes no sum
    last = scores.size - 1 - int(np.argmax(scores[::-1] > -np.inf))  # the choice if rounding leaves none
    mass = np.cumsum(np.exp(scores, out=scores))
    # A tail so unlikely that its mass is 0, or one of no tokens, never wins.
    if mass[-1] == 0.0 or race.value >= float(np.log(mass[-1])) + race.tail_noise:
        return None
    return min(int(np.searchsorted(mass, race.pick * mass[-1], side="right")), last)


def sample(logits: Floats, params: SamplingParams, seen: NDArray[np.bool_] | None, position: int) -> int:
    """Return the token drawn at an absolute position from a row's processed distribution; see `process` and `draw`."""
    logits = penalised(logits, params.repetition_penalty, seen)
    peaks = find_peaks(logits, params.temperature) if params.keeps_all else None
    ids = peaks.best(HEAD_TOKENS) if peaks is not None else None
    if peaks is None or ids is None:
        return draw(_processed(logits, params), params.seed, position)
    # Nothing is dropped, so the head alone is computed as long as the tail can't win.
    race = _run(_scored(logits, params.temperature, ids), params.seed, position)
    if race.is_won(peaks.mass_below(float(logits[race.head].min()))) or race.is_won(race.rest(peaks.mass())):
        return race.token
    index = _of_tail(race, _scores(logits, params.temperature), race.head)
    return race.token if index is None else index


@dataclass(frozen=True)
class CoupledNoise:
    """The target's own noise, for whoever guesses its draws.

    The target draws argmax(log p + Gumbel noise), and the noise of (seed, position, token) is no secret.
    A draft that adds it to its own scores guesses far more draws, and nothing depends on it but how
    often a guess is right.

    Attributes:
        skipped: what to add to a position to make it absolute, for a draft that counts from a later token.
    """

    seed: int
    temperature: float
    skipped: int = 0

    def gumbel_at(self, positions: int | Ints, words: Ints) -> F64:
        """Return the noise of tokens `words` at positions, float64, in the shape of both broadcast."""
        return gumbel(uniforms(self.seed, positions + self.skipped, words))

    def ordered(self, candidates: Candidates, positions: Ints) -> Candidates:
        """Return candidates by falling score with the noise in it.

        Args:
            candidates: ids [n, top]; left as they are where the source has no odds.
            positions: int64 [n], the position of the token that each row is for.
        """
        if candidates.logprobs is None:
            return candidates
        ids = candidates.ids
        words = np.maximum(ids, 0).reshape(-1)
        noise = self.gumbel_at(np.repeat(positions, ids.shape[1]), words).reshape(ids.shape)
        scores = np.where(ids >= 0, candidates.logprobs.astype(np.float64) / self.temperature + noise, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")
        logprobs = np.take_along_axis(candidates.logprobs, order, axis=1)
        return Candidates(np.take_along_axis(ids, order, axis=1), logprobs)


def coupled(params: SamplingParams) -> CoupledNoise | None:
    """Return the noise that a sampled answer is drawn with, None for a greedy one."""
    return CoupledNoise(params.seed, params.temperature) if params.temperature > 0.0 else None


def penalised(logits: Floats, penalty: float, seen: NDArray[np.bool_] | None) -> Floats:
    """Return logits with the repetition penalty applied to the tokens of the context."""
    if seen is None or penalty == 1.0:
        return logits
    ids, changed = np.flatnonzero(seen), logits.copy()
    values = logits[ids]
    changed[ids] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    return changed


class LogitRows(Protocol):
    """The logits of some rows, of which only those that are asked for need be at hand."""

    def row(self, index: int) -> Floats:
        """Return one row, float32 [vocab]."""
        ...

    def likeliest(self, index: int) -> int:
        """Return a row's likeliest token, the lowest id on ties; -1 where its logit is no finite number."""
        ...


# Draws a token from a row of logits, float32 [vocab], at a position, as `sample` does without its penalties; -1 where
# the greatest logit is no finite number.
ChooseRow = Callable[[Floats, int], int]


class Sampler:
    """Chooses tokens of one sequence; remembers which tokens the context holds, if that matters.

    Args:
        vocab_size: the tokens that a context may hold.
        context: int64 [n], those that it holds at first.
        choose_row: what draws in `sample`'s place, by the same law; None for `sample`.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, context: Ints, choose_row: ChooseRow | None = None
    ) -> None:
        self._params = params
        self._choose_row = choose_row
        self._as_it_is = params.temperature == 0.0 and params.repetition_penalty == 1.0
        self._seen: NDArray[np.bool_] | None = None
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[context] = True

    @property
    def takes_likeliest(self) -> bool:
        """Whether every choice is the likeliest token of the logits as they are."""
        return self._as_it_is

    def choose_row(self, logits: LogitRows, index: int, position: int) -> int:
        """Return the target's token for an absolute position, from one row of logits; see `choose`."""
        if not self._as_it_is:
            return self.choose(logits.row(index), position)
        token = logits.likeliest(index)
        if token < 0:
            raise _no_number("no finite number")
        return token

    def choose(self, logits: Floats, position: int) -> int:
        """Return the target's token for an absolute position, from its logits `[vocab]`.

        The caller commits what it keeps with `see` before choosing for a later position.

        Raises:
            DeviceError: the logits hold NaN or no finite value.
        """
        params = self._params
        if params.temperature == 0.0:
            scores = penalised(logits, params.repetition_penalty, self._seen)
            token = int(np.argmax(scores))
            _check_finite(float(scores[token]))
            return token
        if self._choose_row is None:
            _check_finite(float(logits.max()))
            return sample(logits, params, self._seen, position)
        row = penalised(logits, params.repetition_penalty, self._seen)
        token = self._choose_row(row, position)
        if token < 0:
            raise _no_number(str(float(row.max())))
        return token

    def see(self, token: int) -> None:
        """Note that the context now holds a token."""
        if self._seen is not None:
            self._seen[token] = True


def _check_finite(greatest: float) -> None:
    # NaN wins every argmax and max, so the greatest value tells.
    if not np.isfinite(greatest):
        raise _no_number(str(greatest))


def _no_number(found: str) -> DeviceError:
    return DeviceError(f"the target's greatest logit is {found}; the device or the precision can't run this model")
