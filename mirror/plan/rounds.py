"""The terms of a round, from the times of its passes. Pure.

The course is that of `runtime/generation.py`: the draft's trunk runs beside the prefix, its rollout from when the
candidates are there, beside the suffix. What has not begun when the outcome is known goes on for the one branch that
fits; without such a branch the draft is asked again, and the target waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mirror.bundle import DRAFT_CONTEXT
from mirror.plan.acceptance import Curve
from mirror.plan.passes import Part, PassSize, PassTime, whole_time
from mirror.plan.timeline import Overlap, run_beside
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.lookahead import BranchPass, branch_passes


@dataclass(frozen=True)
class Choice:
    """How a round is run."""

    exit_layer: int
    gamma: int
    source: CandidateSource
    branches: int
    tokens_per_pass: tuple[int, ...]

    @property
    def passes(self) -> tuple[BranchPass, ...]:
        """The passes of a rollout, for each branch."""
        return branch_passes(self.tokens_per_pass, self.gamma)


@dataclass(frozen=True)
class Setting:
    """What is planned for: target and draft on their devices, the draft's curve, tokens of context."""

    target: Part
    draft: Part
    curve: Curve
    context: int

    @property
    def host_ms(self) -> float:
        """What a round takes beside its passes."""
        return self.target.box.host_ms.value


@dataclass(frozen=True)
class RoundTerms:
    """A predicted round, ms.

    Attributes:
        prefix, exit_head, suffix, trunk, rollout: passes, each alone; no exit head where none is asked.
        overlap: when they end beside each other; passes that hadn't begun by the target's end are left out.
        late_ms: how long the target then waits for the draft's pass in flight, and for what is left of the branch.
        redraft_ms: the mean wait for a draft that starts anew.
        fits: whether the whole rollout ends before the suffix does.
        prepared: the share of outcomes with a branch.
        tokens: mean tokens of a round, the same in serial mode.
        plain_ms, serial_ms: a round of the other modes.
    """

    choice: Choice
    prefix: PassTime
    exit_head: PassTime | None
    suffix: PassTime
    trunk: PassTime
    rollout: tuple[PassTime, ...]
    overlap: Overlap
    late_ms: float
    redraft_ms: float
    host_ms: float
    fits: bool
    prepared: float
    tokens: float
    plain_ms: float
    serial_ms: float

    @property
    def round_ms(self) -> float:
        """A mirror round."""
        return self.overlap.target_ms + self.late_ms + self.redraft_ms + self.host_ms

    @property
    def over_plain(self) -> float:
        """Mirror's speed over plain decoding's."""
        return self.tokens * self.plain_ms / self.round_ms

    @property
    def serial_over_plain(self) -> float:
        """Serial's speed over plain decoding's."""
        return self.tokens * self.plain_ms / self.serial_ms

    @property
    def needed_tokens(self) -> float:
        """How many tokens a mirror round must give to be as fast as plain decoding."""
        return self.round_ms / self.plain_ms

    @property
    def limit(self) -> str:
        """What holds a round up, and what binds that: a wait that takes a fifth of it or more, else the target."""
        slowest = max((self.trunk, *self.rollout), key=lambda item: item.ms)
        waits = {
            f"the exposed rollout: {slowest.bound}": self.late_ms,
            f"drafting anew: {slowest.bound}": self.redraft_ms,
            "the host": self.host_ms,
        }
        most = max(waits, key=lambda name: waits[name])
        return most if waits[most] >= self.round_ms / 5 else f"the target: {self.suffix.bound}"


def plan_round(setting: Setting, choice: Choice) -> RoundTerms:
    """Return the terms of a round that is run in some way.

    Raises:
        RequestError: a profile or the curve lacks a figure that this needs.
    """
    width = choice.gamma + 1
    size = PassSize(width, width, setting.context)
    target = setting.target
    prefix = target.time(target.model.prefix(choice.exit_layer), size)
    suffix = target.time(target.model.suffix(choice.exit_layer), size)
    exit_head = target.time(target.model.exit(), size) if choice.source.needs_exit else None
    trunk = _draft_pass(setting, "draft_trunk", width, width)
    rollout = tuple(_branch_pass(setting, item, choice.branches) for item in choice.passes)
    before = [prefix, exit_head] if exit_head else []
    overlap = run_beside(
        [item for item in (prefix, exit_head, suffix) if item is not None], (trunk, *rollout), len(before)
    )
    begun = len(overlap.draft_ends) - 1
    share = setting.curve.share_prepared(
        choice.source, choice.branches, choice.exit_layer / setting.target.model.layers
    )
    rest_ms = sum(_branch_pass(setting, item, 1).ms for item in choice.passes[begun:])
    tokens = setting.curve.tokens_per_round(choice.tokens_per_pass, choice.gamma)
    return RoundTerms(
        choice,
        prefix,
        exit_head,
        suffix,
        trunk,
        rollout,
        overlap,
        late_ms=max(overlap.draft_ms - overlap.target_ms, 0.0) + share * rest_ms,
        redraft_ms=(1.0 - share) * propose_ms(setting, choice, 1),
        host_ms=setting.host_ms,
        fits=begun == len(rollout) and overlap.draft_ms <= overlap.target_ms,
        prepared=share,
        tokens=tokens,
        plain_ms=plain_ms(setting),
        serial_ms=serial_ms(setting, choice, tokens),
    )


def plain_ms(setting: Setting) -> float:
    """Return the time of a token of plain decoding: all layers and the LM head over one row."""
    return whole_time(setting.target, "target", PassSize(1, 1, setting.context)).ms + setting.host_ms


def serial_ms(setting: Setting, choice: Choice, tokens: float) -> float:
    """Return the time of a round that drafts, then verifies; the draft first reads what the last round committed."""
    width = choice.gamma + 1
    verify = whole_time(setting.target, "target", PassSize(width, width, setting.context))
    return propose_ms(setting, choice, max(round(tokens), 1)) + verify.ms + setting.host_ms


def propose_ms(setting: Setting, choice: Choice, reading: int) -> float:
    """Return the time of drafting gamma tokens for one continuation, the first pass reading some rows."""
    passes = branch_passes(choice.tokens_per_pass, choice.gamma, reading)
    return sum(_branch_pass(setting, item, 1).ms for item in passes)


def _branch_pass(setting: Setting, item: BranchPass, branches: int) -> PassTime:
    return _draft_pass(setting, "draft", branches * item.rows, branches * item.gives)


def _draft_pass(setting: Setting, name: str, rows: int, logit_rows: int) -> PassTime:
    read = min(setting.context, DRAFT_CONTEXT)
    return whole_time(setting.draft, name, PassSize(rows, logit_rows, read))


def rollout_ms(terms: RoundTerms) -> float:
    """Return how long trunk and rollout take alone."""
    return terms.trunk.ms + sum(item.ms for item in terms.rollout)


def fastest(rounds: Sequence[RoundTerms]) -> list[RoundTerms]:
    """Return rounds by falling speed."""
    return sorted(rounds, key=lambda item: -item.over_plain)
