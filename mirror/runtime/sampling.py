"""The target's own choice of a token, from one row of logits. Pure; numpy alone.

Greedy: the likeliest token, the lowest id on ties. Sampled: the processed distribution, in the
order and with the conventions of transformers, then a draw by Gumbel noise that depends only on
(seed, absolute position, token). So the choice does not depend on the draft, the window or the mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mirror.errors import DeviceError, RequestError
from mirror.runtime.noise import F64, PICK_TOKEN, TAIL_TOKEN, gumbel, uniforms
from mirror.runtime.records import Candidates, Floats, Ints

# Kept tokens with a Gumbel of their own; the others share one.
HEAD_TOKENS = 64
_BLOCK = 64  # scores whose maximum stands for them in the search for the likeliest
_FLOAT32_SLACK = 1e-4  # of a sum of exponentials: far more than float32 gets wrong
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
    scores = penalised(logits, params.repetition_penalty, seen).astype(np.float64) / params.temperature
    finite = scores > -np.inf
    ids = np.arange(scores.size) if finite.all() else np.flatnonzero(finite)
    if ids.size < scores.size:
        scores = scores[ids]
    scores -= scores.max()
    if 0 < params.top_k < ids.size:
        # As transformers does: ties with the k-th token stay.
        kth = np.partition(scores, ids.size - params.top_k)[ids.size - params.top_k]
        ids, scores = _where(scores >= kth, ids, scores)
    if params.top_p < 1.0:
        ids, scores = _where(_top_p(scores, params.top_p), ids, scores)
    if params.min_p > 0.0:
        ids, scores = _where(np.exp(scores) >= params.min_p, ids, scores)
    return Kept(ids, scores)


def _where(keep: NDArray[np.bool_], ids: Ints, scores: F64) -> tuple[Ints, F64]:
    return ids[keep], scores[keep]


def _top_p(scores: F64, top_p: float) -> NDArray[np.bool_]:
    """Return bool [kept]: the fewest likeliest tokens whose mass reaches top_p, ties by lower id."""
    weights = np.exp(scores)
    wanted = top_p * np.cumsum(weights)[-1]
    count = min(HEAD_TOKENS, scores.size)
    while True:
        order = _likeliest(scores, count)
        mass = np.cumsum(weights[order])
        if mass[-1] >= wanted or count == scores.size:
            break
        count = min(8 * count, scores.size)
    kept = min(int(np.searchsorted(mass, wanted, side="left")) + 1, order.size)
    keep = np.zeros(scores.size, np.bool_)
    keep[order[:kept]] = True
    return keep


def _likeliest(scores: F64, count: int) -> Ints:
    """Return the indices of the `count` greatest scores, greatest first, ties by lower index."""
    inside = np.flatnonzero(scores >= _not_above(scores, count)) if count < scores.size else np.arange(scores.size)
    order = np.argsort(-scores[inside], kind="stable")
    result: Ints = inside[order[:count]]
    return result


def _not_above(scores: F64, count: int) -> float:
    """Return a number that at least `count` scores reach, and not many more."""
    whole = scores.size // _BLOCK * _BLOCK
    if whole // _BLOCK < 2 * count:
        return float(np.partition(scores, scores.size - count)[scores.size - count])
    # Each of the `count` blocks with the greatest maxima has one such score: far cheaper than a partition.
    greatest = scores[:whole].reshape(-1, _BLOCK).max(axis=1)
    return float(np.partition(greatest, greatest.size - count)[greatest.size - count])


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
    head = np.sort(_likeliest(kept.scores, HEAD_TOKENS))
    noise = uniforms(seed, position, np.append(kept.ids[head], _TAIL_AND_PICK))
    race = kept.scores[head] + gumbel(noise[:-2])
    winner = int(np.argmax(race))
    if race[winner] > _tail_at_most(kept.scores, head) + gumbel(noise[-2]):
        return int(kept.ids[head[winner]])
    tail = np.ones(kept.ids.size, np.bool_)
    tail[head] = False
    mass = np.cumsum(np.exp(kept.scores[tail]))
    # A tail so unlikely that its mass is 0 scores -inf and never wins.
    with np.errstate(divide="ignore"):
        tail_score = np.log(mass[-1]) + gumbel(noise[-2])
    if race[winner] >= tail_score:
        return int(kept.ids[head[winner]])
    index = min(int(np.searchsorted(mass, noise[-1] * mass[-1], side="right")), mass.size - 1)
    return int(kept.ids[tail][index])


def _tail_at_most(scores: F64, head: Ints) -> float:
    """Return a number just above the log of the mass of all scores but the head's.

    In float32, which takes a fraction of the time, so that most draws need no more of the tail.
    """
    mass = float(np.exp(scores.astype(np.float32)).sum(dtype=np.float64))
    return float(np.log(max(mass - float(np.exp(scores[head]).sum()), 0.0) + _FLOAT32_SLACK * mass))


@dataclass(frozen=True)
class CoupledNoise:
    """The target's own noise, for whoever guesses its draws.

    The target draws argmax(log p + Gumbel noise), and the noise of (seed, position, token) is no secret.
    A draft that adds it to its own scores guesses far more draws, and nothing depends on it but how
    often a guess is right.
    """

    seed: int
    temperature: float

    def ordered(self, candidates: Candidates, positions: Ints) -> Candidates:
        """Return candidates by falling score with the noise in it.

        Args:
            candidates: ids [n, top]; left as they are where the source has no odds.
            positions: int64 [n], the absolute position of the token that each row is for.
        """
        if candidates.logprobs is None:
            return candidates
        ids = candidates.ids
        words = np.maximum(ids, 0).reshape(-1)
        noise = gumbel(uniforms(self.seed, np.repeat(positions, ids.shape[1]), words)).reshape(ids.shape)
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
    lowered = np.where(logits < 0, logits * np.float32(penalty), logits / np.float32(penalty))
    return np.where(seen, lowered, logits)


class Sampler:
    """Chooses tokens of one sequence; remembers which tokens the context holds, if that matters."""

    def __init__(self, params: SamplingParams, vocab_size: int, context: Ints) -> None:
        self._params = params
        self._seen: NDArray[np.bool_] | None = None
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[context] = True

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
        _check_finite(float(logits.max()))
        return draw(process(logits, params, self._seen), params.seed, position)

    def see(self, token: int) -> None:
        """Note that the context now holds a token."""
        if self._seen is not None:
            self._seen[token] = True


def _check_finite(greatest: float) -> None:
    # NaN wins every argmax and max, so the greatest value tells.
    if not np.isfinite(greatest):
        raise DeviceError(
            f"the target's greatest logit is {greatest}; the device or the precision can't run this model"
        )
