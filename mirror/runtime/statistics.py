"""Counts and times of one answer, computed from its rounds. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mirror.runtime.records import Lane, Round, Span

# Every span name, by the lane that it is noted in.
SPAN_NAMES = {
    Lane.TARGET: (
        "prefill",  # one chunk of the prompt
        "prefix",  # the window up to the exit layer
        "exit_head",  # the exit's candidates
        "suffix",  # the rest of the target
        "verify",  # choosing the target's tokens and comparing; host work
        "rollout_wait",  # waiting for a rollout that outlasted the suffix
        "redraft",  # waiting for a proposal that no branch held
        "draft_prefill_wait",  # waiting for the draft to have read the prompt
    ),
    Lane.DRAFT: (
        "draft_prefill",  # reading the prompt
        "trunk",  # reading the window
        "candidate_wait",  # waiting for the exit's candidates
        "rollout",  # continuing the branches
        "propose",  # drafting with the target waiting
    ),
}
_DRAFT_WORK = ("trunk", "rollout", "propose")
_EXPOSED = ("rollout_wait", "redraft")


@dataclass(frozen=True)
class Statistics:
    """Counts and times of one answer.

    Attributes:
        prompt_tokens: tokens of the prompt.
        reused_prompt_tokens: those that the cache already held.
        generated_tokens: tokens of the answer.
        rounds: verifications, plain passes included.
        draft_tokens_proposed: draft tokens that were verified.
        draft_tokens_accepted: those that stood.
        acceptance_rate: accepted / proposed; None without proposals.
        target_forward_passes: passes over the target, those of the prompt included.
        tokens_per_round: committed tokens / rounds; None without rounds.
        reuse_rate: outcomes whose branch was ready / outcomes that wanted one; None without any.
        redrafts: outcomes that no branch fitted.
        branches_per_round: mean branches begun, over the rounds with a rollout; None without any.
        ttft_s: from the request to the first token.
        decode_tokens_per_s: tokens after the first / time in rounds; None without rounds.
        round_ms: mean time of a round; and of its terms, each the mean over all rounds:
        prefix_ms, exit_head_ms, suffix_ms: the target's segments.
        trunk_ms, rollout_ms, propose_ms: the draft's work.
        candidate_wait_ms: the draft's thread waiting for the exit's candidates.
        rollout_wait_ms, redraft_ms: the target's thread waiting for the draft.
        host_ms: what remains of the target's thread's time, choosing tokens included.
        draft_hidden: the share of the draft's time that the target did not wait for; None without
            draft work. It does not see a target slowed down by sharing its cores.
    """

    prompt_tokens: int
    reused_prompt_tokens: int
    generated_tokens: int
    rounds: int
    draft_tokens_proposed: int
    draft_tokens_accepted: int
    acceptance_rate: float | None
    target_forward_passes: int
    tokens_per_round: float | None
    reuse_rate: float | None
    redrafts: int
    branches_per_round: float | None
    ttft_s: float | None
    decode_tokens_per_s: float | None
    round_ms: float
    prefix_ms: float
    exit_head_ms: float
    suffix_ms: float
    trunk_ms: float
    rollout_ms: float
    propose_ms: float
    candidate_wait_ms: float
    rollout_wait_ms: float
    redraft_ms: float
    host_ms: float
    draft_hidden: float | None


@dataclass(frozen=True)
class PromptFacts:
    """What the statistics need of the time before the first round."""

    tokens: int
    reused_tokens: int
    passes: int
    ttft_s: float | None
    first_tokens: int


def summarise(prompt: PromptFacts, rounds: Sequence[Round]) -> Statistics:
    """Return the statistics of an answer."""
    proposed = sum(item.proposed for item in rounds)
    accepted = sum(item.accepted for item in rounds)
    committed = sum(item.committed for item in rounds)
    wanted = [item.reused for item in rounds if item.reused is not None]
    rolled = [item.branches for item in rounds if item.branches]
    seconds = sum(item.end_s - item.start_s for item in rounds)
    terms = _terms_ms(rounds)
    work_ms = sum(terms.get(name, 0.0) for name in _DRAFT_WORK)
    exposed_ms = sum(terms.get(name, 0.0) for name in _EXPOSED)
    return Statistics(
        prompt_tokens=prompt.tokens,
        reused_prompt_tokens=prompt.reused_tokens,
        generated_tokens=prompt.first_tokens + committed,
        rounds=len(rounds),
        draft_tokens_proposed=proposed,
        draft_tokens_accepted=accepted,
        acceptance_rate=_ratio(accepted, proposed),
        target_forward_passes=prompt.passes + len(rounds),
        tokens_per_round=_ratio(committed, len(rounds)),
        reuse_rate=_ratio(sum(wanted), len(wanted)),
        redrafts=len(wanted) - sum(wanted),
        branches_per_round=_ratio(sum(rolled), len(rolled)),
        ttft_s=prompt.ttft_s,
        decode_tokens_per_s=_ratio(committed, seconds),
        round_ms=1e3 * seconds / max(len(rounds), 1),
        prefix_ms=terms.get("prefix", 0.0),
        exit_head_ms=terms.get("exit_head", 0.0),
        suffix_ms=terms.get("suffix", 0.0),
        trunk_ms=terms.get("trunk", 0.0),
        rollout_ms=terms.get("rollout", 0.0),
        propose_ms=terms.get("propose", 0.0),
        candidate_wait_ms=terms.get("candidate_wait", 0.0),
        rollout_wait_ms=terms.get("rollout_wait", 0.0),
        redraft_ms=terms.get("redraft", 0.0),
        host_ms=_host_ms(rounds),
        draft_hidden=None if work_ms == 0.0 else max(0.0, 1.0 - exposed_ms / work_ms),
    )


def _terms_ms(rounds: Sequence[Round]) -> dict[str, float]:
    terms: dict[str, float] = {}
    for item in rounds:
        for span in item.spans:
            terms[span.name] = terms.get(span.name, 0.0) + 1e3 * span.seconds / len(rounds)
    return terms


def _host_ms(rounds: Sequence[Round]) -> float:
    host = sum(item.end_s - item.start_s - _seconds(_device_and_waits(item.spans)) for item in rounds)
    return 1e3 * host / max(len(rounds), 1)


def _device_and_waits(spans: Iterable[Span]) -> Iterable[Span]:
    return (span for span in spans if span.lane is Lane.TARGET and span.name != "verify")


def _seconds(spans: Iterable[Span]) -> float:
    return sum(span.seconds for span in spans)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
