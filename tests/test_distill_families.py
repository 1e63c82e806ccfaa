"""Decoding in bulk, draft and head on every family whose attention, logits or norms differ."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from mirror.distill.decode import BatchDecoder, Job  # noqa: E402
from mirror.distill.student import make_student  # noqa: E402
from mirror.distill.target import Target, load_target  # noqa: E402
from tests.families import FAMILIES, make_checkpoint  # noqa: E402

NAMES = [name for name in ("mistral", "opt", "gemma2", "gpt2", "granite", "cohere", "phi") if name in FAMILIES]


@pytest.fixture(params=NAMES)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return load_target(
        str(make_checkpoint(request.param, tmp_path / request.param)), torch.device("cpu"), torch.float32
    )


def greedy(target: Target, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Decode with the whole model at every step, without any cache."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, target.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tuple(ids[0, len(prompt) :].tolist())


def test_rows_draft_and_head_are_the_models_own(target: Target) -> None:
    prompts = [tuple(range(5, 5 + count)) for count in (3, 12, 6)]
    jobs = [Job(prompt, 20, 0.0) for prompt in prompts]
    answers = {answer.job: answer.tokens for answer in BatchDecoder(target, 2, 64, (), 0).run(jobs)}
    assert [answers[i] for i in range(len(jobs))] == [greedy(target, prompt, 20) for prompt in prompts]
    ids = torch.arange(5, 40)[None]
    student = make_student(target, range(len(target.layers)))
    with torch.no_grad():
        final, exits = target.states(ids, (2,))
        torch.testing.assert_close(student(ids), final)
        torch.testing.assert_close(target.head(final), target.model(ids).logits)
        assert exits[2].shape == final.shape
