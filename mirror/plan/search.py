"""Which choices are worth most, and how large a draft may be. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mirror.plan.acceptance import Curve, best_schedule
from mirror.plan.rounds import Choice, RoundTerms, Setting, fastest, plan_round
from mirror.runtime.candidates import CandidateSource

# Only what the curves were measured for: beyond it they say nothing.
BRANCHES = (8, 16, 24, 32, 48, 64, 96, 128)
GAMMAS = tuple(range(1, 8))
DRAFT_LAYERS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 28)


@dataclass(frozen=True)
class Limits:
    """What may be chosen.

    Attributes:
        exit_layers: where the target may be cut.
        streams: stream rows that the draft was trained with.
        kappa: the most branches of one window position.
    """

    exit_layers: tuple[int, ...]
    streams: int
    kappa: int


def exit_layers(layers: int, curve: Curve) -> tuple[int, ...]:
    """Return cuts between the exits that the curve knows, four at most."""
    shares = curve.exit_shares()
    if not shares:
        return (max(layers // 2, 1),)
    steps = [shares[0] + (shares[-1] - shares[0]) * step / 3 for step in range(4)]
    return tuple(sorted({min(max(round(share * layers), 1), layers - 1) for share in steps}))


def choices(limits: Limits, curve: Curve) -> Iterator[Choice]:
    """Yield every choice: exit, window, source, branches, and for each number of passes the best schedule."""
    places = [(CandidateSource.DRAFT, limits.exit_layers[0])]
    places += [(source, cut) for source in (CandidateSource.EXIT, CandidateSource.BOTH) for cut in limits.exit_layers]
    known = {item.source for item in curve.prepared}
    for gamma in GAMMAS:
        schedules = [best_schedule(curve, gamma, passes, limits.streams) for passes in range(1, gamma + 1)]
        for schedule in (item for item in schedules if item is not None):
            for source, cut in places:
                for branches in BRANCHES:
                    if source in known and branches <= limits.kappa * (gamma + 1):
                        yield Choice(cut, gamma, source, branches, schedule)


def best_rounds(setting: Setting, limits: Limits, count: int) -> list[RoundTerms]:
    """Return the fastest rounds, at most one for each source, exit layer and number of passes."""
    best: dict[tuple[CandidateSource, int, int], RoundTerms] = {}
    for terms in fastest([plan_round(setting, choice) for choice in choices(limits, setting.curve)]):
        choice = terms.choice
        best.setdefault((choice.source, choice.exit_layer, len(choice.tokens_per_pass)), terms)
    return list(best.values())[:count]


def draft_sizes(setting: Setting, limits: Limits, sizes: Sequence[int] = DRAFT_LAYERS) -> list[RoundTerms]:
    """Return the fastest round of drafts with some numbers of layers, all as often right as the curve says."""
    found = []
    for layers in sizes:
        draft = dataclasses.replace(setting.draft, model=setting.draft.model.with_layers(layers))
        found.append(best_rounds(dataclasses.replace(setting, draft=draft), limits, 1)[0])
    return found
