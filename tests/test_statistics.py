"""Counts, times and timeline of hand-made rounds."""

import json

import pytest

from mirror.runtime.records import Lane, Mode, Round, Span
from mirror.runtime.statistics import SPAN_NAMES, PromptFacts, summarise
from mirror.runtime.trace import chrome_trace

PROMPT = PromptFacts(tokens=10, reused_tokens=4, passes=2, ttft_s=0.5, first_tokens=1)

MIRROR_ROUND = Round(
    mode=Mode.MIRROR,
    proposed=3,
    accepted=2,
    committed=3,
    reused=True,
    branches=8,
    start_s=10.0,
    end_s=10.020,
    spans=(
        Span("prefix", Lane.TARGET, 10.000, 10.004),
        Span("exit_head", Lane.TARGET, 10.004, 10.005),
        Span("suffix", Lane.TARGET, 10.005, 10.013),
        Span("verify", Lane.TARGET, 10.013, 10.014),
        Span("rollout_wait", Lane.TARGET, 10.014, 10.016),
        Span("trunk", Lane.DRAFT, 10.000, 10.003),
        Span("candidate_wait", Lane.DRAFT, 10.003, 10.005),
        Span("rollout", Lane.DRAFT, 10.005, 10.010),
    ),
)
REDRAFT_ROUND = Round(
    mode=Mode.MIRROR,
    proposed=3,
    accepted=0,
    committed=1,
    reused=False,
    branches=4,
    start_s=11.0,
    end_s=11.010,
    spans=(Span("redraft", Lane.TARGET, 11.0, 11.002), Span("propose", Lane.DRAFT, 11.0, 11.002)),
)
LAST_ROUND = Round(Mode.MIRROR, 0, 0, 1, None, 0, 12.0, 12.010, ())


def test_counts() -> None:
    found = summarise(PROMPT, [MIRROR_ROUND, REDRAFT_ROUND, LAST_ROUND])
    assert (found.prompt_tokens, found.reused_prompt_tokens, found.ttft_s) == (10, 4, 0.5)
    assert found.generated_tokens == 6
    assert found.rounds == 3
    assert found.target_forward_passes == 5
    assert (found.draft_tokens_proposed, found.draft_tokens_accepted) == (6, 2)
    assert found.acceptance_rate == pytest.approx(1 / 3)
    assert found.tokens_per_round == pytest.approx(5 / 3)
    assert found.reuse_rate == pytest.approx(1 / 2)
    assert found.redrafts == 1
    assert found.branches_per_round == pytest.approx(6)
    assert found.decode_tokens_per_s == pytest.approx(5 / 0.040)


def test_terms_are_means_per_round_and_host_time_is_what_remains() -> None:
    found = summarise(PROMPT, [MIRROR_ROUND, REDRAFT_ROUND])
    assert found.round_ms == pytest.approx(15)
    assert (found.prefix_ms, found.exit_head_ms, found.suffix_ms) == pytest.approx((2, 0.5, 4))
    assert (found.trunk_ms, found.rollout_ms, found.propose_ms) == pytest.approx((1.5, 2.5, 1))
    assert (found.candidate_wait_ms, found.rollout_wait_ms, found.redraft_ms) == pytest.approx((1, 1, 1))
    # 20 - 4 - 1 - 8 - 2 in the first round, choosing tokens included; 10 - 2 in the second.
    assert found.host_ms == pytest.approx((5 + 8) / 2)


def test_hidden_draft_time_is_the_part_that_nobody_waited_for() -> None:
    # 3 + 5 + 2 ms of work, 2 + 2 ms of waiting.
    assert summarise(PROMPT, [MIRROR_ROUND, REDRAFT_ROUND]).draft_hidden == pytest.approx(0.6)
    assert summarise(PROMPT, [REDRAFT_ROUND]).draft_hidden == pytest.approx(0.0)
    assert summarise(PROMPT, [LAST_ROUND]).draft_hidden is None


def test_without_rounds_rates_are_absent() -> None:
    found = summarise(PROMPT, [])
    assert found.generated_tokens == 1
    assert found.acceptance_rate is found.tokens_per_round is found.reuse_rate is found.decode_tokens_per_s is None


def test_the_trace_has_a_row_per_device_and_starts_at_zero() -> None:
    prefill = (Span("prefill", Lane.TARGET, 9.0, 9.5),)
    trace = json.loads(json.dumps(chrome_trace(prefill, [MIRROR_ROUND], {Lane.TARGET: "cuda:0", Lane.DRAFT: "cpu"})))
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert sorted(names.values()) == ["draft on cpu", "rounds", "target on cuda:0"]
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert min(event["ts"] for event in complete) == 0
    suffix = next(event for event in complete if event["name"] == "suffix")
    assert names[suffix["tid"]] == "target on cuda:0"
    assert (suffix["ts"], suffix["dur"]) == pytest.approx((1.005e6, 8e3))
    assert next(event for event in complete if event["name"] == "round 0")["args"]["accepted"] == 2


def test_hand_made_spans_have_known_names() -> None:
    known = set(SPAN_NAMES[Lane.TARGET]) | set(SPAN_NAMES[Lane.DRAFT])
    assert {span.name for span in MIRROR_ROUND.spans + REDRAFT_ROUND.spans} <= known
