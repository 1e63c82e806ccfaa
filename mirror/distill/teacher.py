"""What the target says about a batch, kept in device memory for the epochs that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirror.distill.data import Batch, Corpus, Ints, to_device
from mirror.distill.target import Target


@dataclass(frozen=True)
class Lesson:
    """The target's states at a batch's learned positions, `[n, hidden]` each.

    `final` is normalised, ready for the LM head; `exits` are raw, by layer. `features` are the raw states
    `[batch, length, hidden]` of the layer that feeds the draft, None where none does.
    """

    final: Tensor
    exits: dict[int, Tensor]
    features: Tensor | None = None


class Teacher:
    """Runs the target over batches, each text once as far as memory allows.

    Where not all of a corpus fits, the longest texts are kept: they hold the most prompt and so cost the
    most for each position that is learned. Features are never kept; a draft that takes them costs a pass
    of the target for every batch.

    Mutable: the stored states and which texts they cover.
    """

    def __init__(
        self,
        target: Target,
        corpus: Corpus,
        exit_layers: Sequence[int],
        cache_bytes: int,
        feature_layer: int | None = None,
    ) -> None:
        self._target, self._exit_layers, self._feature_layer = target, tuple(exit_layers), feature_layer
        row_bytes = (1 + len(self._exit_layers)) * target.head.weight.shape[1] * target.dtype.itemsize
        room = 0 if feature_layer is not None else cache_bytes // row_bytes
        lengths = np.diff(corpus.offsets)
        self._answers = lengths - corpus.prompt_lengths
        self._starts, self._rows_kept = _kept(lengths, self._answers, int(room))
        self._seen = np.zeros(len(corpus), bool)
        self._store: dict[int | None, Tensor] = {}

    def lesson(self, batch: Batch) -> Lesson:
        """Return the target's states for a batch, on the target's device."""
        if self._seen[batch.texts].all():
            return self._recall(batch)
        fed = () if self._feature_layer is None else (self._feature_layer,)
        layers = tuple(dict.fromkeys((*self._exit_layers, *fed)))
        final, exits = self._target.states(to_device(batch.input_ids, self._target.device), layers)
        where = to_device(batch.learned, self._target.device)
        lesson = Lesson(
            final.flatten(0, 1)[where],
            {layer: exits[layer].flatten(0, 1)[where] for layer in self._exit_layers},
            None if self._feature_layer is None else exits[self._feature_layer],
        )
        if (self._starts[batch.texts] >= 0).all():
            self._remember(batch, lesson)
        return lesson

    def _remember(self, batch: Batch, lesson: Lesson) -> None:
        rows = self._rows(batch)
        for layer, states in ((None, lesson.final), *lesson.exits.items()):
            if layer not in self._store:
                self._store[layer] = states.new_empty(self._rows_kept, states.shape[1])
            self._store[layer][rows] = states
        self._seen[batch.texts] = True

    def _recall(self, batch: Batch) -> Lesson:
        rows = self._rows(batch)
        return Lesson(self._store[None][rows], {layer: self._store[layer][rows] for layer in self._exit_layers})

    def _rows(self, batch: Batch) -> Tensor:
        parts = [np.arange(self._starts[text], self._starts[text] + self._answers[text]) for text in batch.texts]
        return to_device(torch.from_numpy(np.concatenate(parts)), self._target.device)


def _kept(lengths: Ints, answers: Ints, room: int) -> tuple[Ints, int]:
    """Return each text's first row in the store, -1 for texts that aren't kept, and the store's rows."""
    starts = np.full(len(lengths), -1)
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(answers[order])
    count = int(np.searchsorted(ends, room, side="right"))
    starts[order[:count]] = ends[:count] - answers[order[:count]]
    return starts, int(ends[count - 1]) if count else 0
