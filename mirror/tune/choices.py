"""What may be chosen, and how fast each choice should be. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from mirror.bundle import Settings
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.records import Mode
from mirror.tune.costs import PassCosts, RoundShares, mirror_ms, serial_ms
from mirror.tune.outcomes import Foresight, Shares

_BRANCHES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Places:
    """The devices of one choice; the suffix is the target's unless it says otherwise."""

    target: str
    draft: str
    suffix: str | None = None

    def __str__(self) -> str:
        suffix = f" > {self.suffix}" if self.suffix else ""
        return f"{self.target}{suffix} + {self.draft}"


@dataclass(frozen=True)
class Choice:
    """One way to run a bundle on this box; a plain one has neither draft tokens nor branches.

    Attributes:
        proposal_tokens_per_pass: of proposals that the target waits for; empty for the rollout's.
    """

    mode: Mode
    places: Places
    exit_layer: int
    gamma: int = 0
    source: CandidateSource = CandidateSource.BOTH
    fanout: tuple[int, ...] = ()
    tokens_per_pass: tuple[int, ...] = (1,)
    proposal_tokens_per_pass: tuple[int, ...] = ()

    @property
    def branches(self) -> int:
        """Branches of a rollout."""
        return sum(self.fanout)

    def settings(self) -> Settings:
        """Return what the bundle is to say."""
        places = self.places
        if self.mode is Mode.PLAIN:
            return Settings(mode="plain", target_device=places.target, suffix_device=places.suffix)
        mirror = self.mode is Mode.MIRROR
        return Settings(
            mode=self.mode.value,
            candidates=self.source.value if mirror else None,
            gamma=self.gamma,
            fanout=self.fanout if mirror else None,
            tokens_per_pass=self.tokens_per_pass if self.tokens_per_pass != (1,) else None,
            proposal_tokens_per_pass=self.proposal_tokens_per_pass or None,
            target_device=places.target,
            suffix_device=places.suffix,
            draft_device=places.draft,
        )


@dataclass(frozen=True)
class Prediction:
    """A choice and what a round of it should do."""

    choice: Choice
    round_ms: float
    shares: RoundShares

    @property
    def tokens_per_s(self) -> float:
        """The decode speed."""
        return 1e3 * self.shares.committed / self.round_ms


@dataclass(frozen=True)
class Knowledge:
    """What was measured on one set of devices, with the target cut at one layer.

    Attributes:
        mirror, serial: pass times beside each other, and one after the other.
        foresight: what each source prepares.
        stands: by tokens per pass, how often 0, 1, .. draft tokens of the widest window stand.
    """

    places: Places
    exit_layer: int
    mirror: PassCosts
    serial: PassCosts
    foresight: Mapping[CandidateSource, Foresight]
    stands: Mapping[tuple[int, ...], Sequence[Shares]]


def predict_mirror(known: Knowledge, kappa: int) -> Iterator[Prediction]:
    """Yield a prediction for every window, source, number of branches, and passes of rollout and proposal."""
    for rollout, proposal in product(known.stands, repeat=2):
        for shares, proposed in zip(known.stands[rollout], known.stands[proposal], strict=True):
            passes = _Passes(rollout, proposal, shares, proposed)
            for (source, foresight), branches in product(known.foresight.items(), _BRANCHES):
                if branches <= kappa * shares.size:
                    yield _mirror(known, passes, source, foresight, branches)


def predict_serial(known: Knowledge) -> Iterator[Prediction]:
    """Yield a prediction for every window and tokens per pass."""
    for tokens_per_pass, stands in known.stands.items():
        for shares in stands:
            committed, gamma = _committed(shares), shares.size - 1
            choice = Choice(Mode.SERIAL, known.places, known.exit_layer, gamma, tokens_per_pass=tokens_per_pass)
            time_ms = serial_ms(known.serial, gamma, tokens_per_pass, committed)
            yield Prediction(choice, time_ms, RoundShares(0.0, committed))


@dataclass(frozen=True)
class _Passes:
    """Tokens per pass of rollouts, which are hidden, and of proposals; how often 0, 1, .. tokens of each stand."""

    rollout: tuple[int, ...]
    proposal: tuple[int, ...]
    prepared: Shares
    proposed: Shares


def _mirror(
    known: Knowledge, passes: _Passes, source: CandidateSource, foresight: Foresight, branches: int
) -> Prediction:
    gamma = passes.prepared.size - 1
    fanout = foresight.shape(passes.prepared, branches)
    found = foresight.prepared(passes.prepared, fanout)
    committed = found * _committed(passes.prepared) + (1.0 - found) * _committed(passes.proposed)
    chance, own = RoundShares(found, committed), passes.proposal if passes.proposal != passes.rollout else ()
    choice = Choice(Mode.MIRROR, known.places, known.exit_layer, gamma, source, fanout, passes.rollout, own)
    time_ms = mirror_ms(known.mirror, gamma, branches, passes.rollout, source, chance, passes.proposal)
    return Prediction(choice, time_ms, chance)


def best_of_each(predictions: Sequence[Prediction], count: int) -> list[Prediction]:
    """Return the fastest predictions, at most one for each draft device, exit layer and source."""
    best: dict[tuple[str, int, str], Prediction] = {}
    for item in sorted(predictions, key=lambda item: -item.tokens_per_s):
        choice = item.choice
        best.setdefault((str(choice.places), choice.exit_layer, choice.source.value), item)
    return list(best.values())[:count]


def more_and_fewer_branches(choice: Choice, predictions: Sequence[Prediction]) -> list[Prediction]:
    """Return those predictions that differ from a mirror choice in branches alone, about half and twice as many."""
    alike = [item for item in predictions if replace(item.choice, fanout=choice.fanout) == choice]
    fewer = [item for item in alike if item.choice.branches < choice.branches]
    more = [item for item in alike if item.choice.branches > choice.branches]
    return [
        _nearest(side, wanted) for side, wanted in ((fewer, choice.branches / 2), (more, 2 * choice.branches)) if side
    ]


def _nearest(predictions: Sequence[Prediction], branches: float) -> Prediction:
    return min(predictions, key=lambda item: abs(item.choice.branches - branches))


def _committed(shares: Shares) -> float:
    return float(shares @ np.arange(1, shares.size + 1))
