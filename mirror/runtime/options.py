"""What a user may choose: at loading, and for one generation. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from mirror.errors import RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.records import Mode
from mirror.runtime.sampling import SamplingParams


@dataclass(frozen=True)
class EngineOptions:
    """Choices that hold as long as a bundle is loaded; None takes the bundle's or the machine's.

    Attributes:
        mode: how tokens are made; `generate` may say otherwise, over the same sessions. None takes the
            bundle's setting, else mirror.
        threads: CPU threads in all; None takes one per physical core.
        max_length: tokens that a context may have.
        gamma: draft tokens of a window.
        kappa: branches that leave after each window position.
        fanout: the same, per position, gamma + 1 counts; overrides kappa.
        tokens_per_pass: tokens that each of a rollout's passes gives a branch, by the draft's streams; the last
            number repeats.
        branches_per_pass: branches that take part in each of a rollout's passes at most, the likeliest; the last
            number repeats. None takes the bundle's setting, else all.
        proposal_tokens_per_pass: as `tokens_per_pass`, for proposals that the target waits for; None takes the
            bundle's setting, else `tokens_per_pass`.
        draft_context: tokens of a context's end that the draft reads at most, 2 or more; None takes the bundle's
            setting, else all.
        candidates: where the branches' first tokens come from; None takes the bundle's setting, else the
            draft's, with n-grams both.
        pinned: every target pass after prefill runs at width gamma + 1.
        draft_timeout_s: how long to wait for the draft before it counts as hung.
        max_ngram_size: the most tokens that an n-gram draft looks up at once.
    """

    mode: Mode | None = None
    threads: int | None = None
    max_length: int | None = None
    gamma: int | None = None
    kappa: int | None = None
    fanout: tuple[int, ...] | None = None
    tokens_per_pass: tuple[int, ...] | None = None
    branches_per_pass: tuple[int, ...] | None = None
    proposal_tokens_per_pass: tuple[int, ...] | None = None
    draft_context: int | None = None
    candidates: CandidateSource | None = None
    pinned: bool = False
    draft_timeout_s: float = 30.0
    max_ngram_size: int = 3

    def __post_init__(self) -> None:
        for name in ("threads", "max_length", "gamma", "kappa", "max_ngram_size"):
            found = getattr(self, name)
            if found is not None and found < 1:
                raise RequestError(f"{name} is {found}; it must be 1 or more")
        if self.draft_context is not None and self.draft_context < 2:
            raise RequestError(f"draft_context is {self.draft_context}; it must be 2 or more")
        if self.draft_timeout_s <= 0:
            raise RequestError(f"draft_timeout_s is {self.draft_timeout_s}; it must be above 0")


@dataclass(frozen=True)
class GenerationOptions:
    """Choices for one generation.

    Attributes:
        max_new_tokens: the most tokens of the answer.
        sampling: how a token is chosen.
        stop: strings that end the text.
        mode: how tokens are made; None takes the engine's.
        num_assistant_tokens: the most draft tokens of a round; None takes gamma.
    """

    max_new_tokens: int = 128
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    mode: Mode | None = None
    num_assistant_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if self.num_assistant_tokens is not None and self.num_assistant_tokens < 1:
            raise RequestError(
                f"num_assistant_tokens is {self.num_assistant_tokens}; it must be 1 or more (mode plain drafts nothing)"
            )
