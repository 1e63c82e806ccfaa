"""How a draft or an exit head is pulled towards the target: loss and gradient in one pass over the vocabulary.

The logits of a batch don't fit: `[positions, vocab]` is made chunk by chunk, and the gradient is
written down instead of recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirror.distill.target import Head

_CHUNK_BYTES = 2**31  # of one float32 [chunk, vocab]


@dataclass(frozen=True)
class LossWeights:
    """What is minimised: `kl * KL(target || student) + ce * focused cross-entropy on the target's argmax`.

    With focus g the cross-entropy's gradient is scaled by the student's odds of that token to the
    power g (generalised cross-entropy, Zhang and Sabuncu 2018, eq. 6): it leaves alone what the
    student can't learn. At 1 it is the gradient of the expected share of agreement.
    """

    kl: float = 1.0
    ce: float = 0.5
    focus: float = 0.0


@dataclass(frozen=True)
class Taught:
    """One student's result: the gradient at its states `[n, hidden]`, and sums over the n positions.

    `agreed` and `covered` count positions whose likeliest token, or whose eight likeliest, are or hold
    the target's; zero where they weren't asked for, since they cost passes over the vocabulary.
    """

    gradient: Tensor
    loss: Tensor
    agreed: Tensor
    covered: Tensor


@dataclass(frozen=True)
class Pupil:
    """One who learns: normalised states `[n, hidden]` without history, its LM head, and what is minimised."""

    states: Tensor
    head: Head
    weights: LossWeights


def teach(pupils: Sequence[Pupil], final: Tensor, head: Head, compiled: bool, counted: bool) -> list[Taught]:
    """Return loss and gradient of several pupils on the same positions.

    Args:
        pupils: who learns.
        final: the target's normalised states `[n, hidden]`.
        head: the target's LM head.
        compiled: fuse the passes over the vocabulary with torch.compile; worth it on CUDA.
        counted: whether agreement and coverage are wanted.
    """
    chunk = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
    step = _compiled_step() if compiled else _loss_and_gradient
    parts: list[list[Taught]] = [[] for _ in pupils]
    for start in range(0, final.shape[0], chunk):
        rows = slice(start, start + chunk)
        with torch.no_grad():
            teacher = head(final[rows])
            best = teacher.argmax(-1)
            for part, pupil in zip(parts, pupils, strict=True):
                part.append(_teach_chunk(pupil, rows, teacher, best, step, counted))
    return [_joined(part) for part in parts]


Step = Callable[[Tensor, Tensor, Tensor, float, float, float], tuple[Tensor, Tensor]]


def _teach_chunk(pupil: Pupil, rows: slice, teacher: Tensor, best: Tensor, step: Step, counted: bool) -> Taught:
    logits = pupil.head(pupil.states[rows])  # [chunk, vocab]
    weight = pupil.weights
    loss, slope = step(logits, teacher, best, weight.kl, weight.ce, weight.focus)
    agreed, covered = _counts(logits, best) if counted else (loss.new_zeros(()), loss.new_zeros(()))
    return Taught(pupil.head.states_gradient(slope, logits), loss.sum(), agreed, covered)


def _counts(logits: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    rank = (logits > logits.gather(1, best[:, None])).sum(-1)
    return (logits.argmax(-1) == best).sum(), (rank < 8).sum()


def _loss_and_gradient(
    logits: Tensor, teacher: Tensor, best: Tensor, kl: float, ce: float, focus: float
) -> tuple[Tensor, Tensor]:
    """Return the loss `[n]` (float32) and its gradient at the logits `[n, vocab]` (the logits' dtype)."""
    log_q = torch.log_softmax(logits.float(), -1)
    log_p = torch.log_softmax(teacher.float(), -1)
    p, q = log_p.exp(), log_q.exp()
    nll = -log_q.gather(1, best[:, None])  # [n, 1]
    weight = ce * torch.exp(-focus * nll)
    divergence = (p * (log_p - log_q)).sum(-1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    slope = kl * (q - p) + weight * (q - (columns == best[:, None]).to(q.dtype))
    return kl * divergence + (weight * nll)[:, 0], slope.to(logits.dtype)


_STEPS: dict[str, Step] = {}


def _compiled_step() -> Step:
    if "step" not in _STEPS:
        _STEPS["step"] = torch.compile(_loss_and_gradient, dynamic=True)
    return _STEPS["step"]


def _joined(parts: Sequence[Taught]) -> Taught:
    return Taught(
        torch.cat([part.gradient for part in parts]),
        torch.stack([part.loss for part in parts]).sum(),
        torch.stack([part.agreed for part in parts]).sum(),
        torch.stack([part.covered for part in parts]).sum(),
    )
