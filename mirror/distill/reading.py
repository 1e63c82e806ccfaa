"""A draft reading texts: its states at the learned positions, and on chains behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirror.distill.data import Batch, to_device
from mirror.distill.layout import ChainOptions, Layout, chains
from mirror.distill.student import Student


@dataclass(frozen=True)
class Read:
    """Normalised states: `own` `[n, hidden]` at the learned positions, `chains` `[m, hidden]` as `layout.where` says.

    Without chains `layout` is None and `chains` is empty.
    """

    own: Tensor
    chains: Tensor
    layout: Layout | None


def read_draft(
    student: Student, batch: Batch, features: Tensor | None, chosen: ChainOptions, device: torch.device
) -> Read:
    """Let a draft read a batch.

    Args:
        student: the draft.
        batch: the texts.
        features: raw states `[batch, length, target_hidden]` of the layer that feeds the draft, or None.
        chosen: chains behind the texts; a length of 0 for none.
        device: where the draft is.
    """
    learned = to_device(batch.learned, device)
    if not chosen.length:
        fed = None if features is None else _fed(features, features.shape[1])
        own = student(to_device(batch.input_ids, device), features=fed).flatten(0, 1)
        return Read(own[learned], own[:0], None)
    layout = chains(batch, chosen, student.vocab_size)
    width, text = layout.input_ids.shape[1], layout.text_width
    fed = None if features is None else _fed(features, width)
    states = student(to_device(layout.input_ids, device), layout=layout, features=fed).flatten(0, 1)
    moved = torch.div(learned, text, rounding_mode="floor") * width + learned % text
    where = to_device(torch.from_numpy(layout.where), device)
    return Read(states[moved], states[where], layout)


def _fed(states: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return each row's feature, the state of the row before it, and which rows have one: a text's, but its first."""
    rows, length, hidden = states.shape
    moved = states.new_zeros(rows, width, hidden)
    moved[:, 1:length] = states[:, :-1]
    known = torch.zeros(rows, width, dtype=torch.bool, device=states.device)
    known[:, 1:length] = True
    return moved, known
