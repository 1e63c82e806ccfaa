"""What the target says about a batch, kept in device memory for the epochs that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirror.distill.data import Batch, Corpus, to_device
from mirror.distill.target import Target


@dataclass(frozen=True)
class Lesson:
    """The target's states at a batch's learned positions, `[n, hidden]` each.

    `final` is normalised, ready for the LM head; `exits` are raw, by layer.
    """

    final: Tensor
    exits: dict[int, Tensor]


class Teacher:
    """Runs the target over batches, each text once where memory allows.

    Mutable: the stored states and which texts they cover.
    """

    def __init__(self, target: Target, corpus: Corpus, exit_layers: Sequence[int], cache_bytes: int) -> None:
        self._target, self._exit_layers = target, tuple(exit_layers)
        self._answers = np.diff(corpus.offsets) - corpus.prompt_lengths
        self._starts = np.concatenate([[0], np.cumsum(self._answers)[:-1]])
        self._seen = np.zeros(len(corpus), bool)
        row_bytes = (1 + len(self._exit_layers)) * target.head.weight.shape[1] * target.dtype.itemsize
        self._fits = int(self._answers.sum()) * row_bytes <= cache_bytes
        self._store: dict[int | None, Tensor] = {}

    def lesson(self, batch: Batch) -> Lesson:
        """Return the target's states for a batch, on the target's device."""
        if self._fits and self._seen[batch.texts].all():
            return self._recall(batch)
        final, exits = self._target.states(to_device(batch.input_ids, self._target.device), self._exit_layers)
        where = to_device(batch.learned, self._target.device)
        lesson = Lesson(final.flatten(0, 1)[where], {layer: exits[layer].flatten(0, 1)[where] for layer in exits})
        if self._fits:
            self._remember(batch, lesson)
        return lesson

    def _remember(self, batch: Batch, lesson: Lesson) -> None:
        rows = self._rows(batch)
        for layer, states in ((None, lesson.final), *lesson.exits.items()):
            if layer not in self._store:
                self._store[layer] = states.new_empty(int(self._answers.sum()), states.shape[1])
            self._store[layer][rows] = states
        self._seen[batch.texts] = True

    def _recall(self, batch: Batch) -> Lesson:
        rows = self._rows(batch)
        return Lesson(self._store[None][rows], {layer: self._store[layer][rows] for layer in self._exit_layers})

    def _rows(self, batch: Batch) -> Tensor:
        parts = [np.arange(self._starts[text], self._starts[text] + self._answers[text]) for text in batch.texts]
        return to_device(torch.from_numpy(np.concatenate(parts)), self._target.device)
