"""Extra rows behind a batch's texts: what a rollout feeds, for many places of a text in one pass.

A *chain* hangs on an anchor, a position of its text. It stands for what a branch that leaves there
feeds next: first `copies` of the tokens that follow the anchor (for a draft with features: real rows
without a feature), then one row for each speculative stream. A row sees the text up to its anchor, and
its chain up to itself; nobody else sees it. That is the mask of the bundle's draft graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirror.distill.data import Batch, to_device

Ints = NDArray[np.int64]
_ALIGN = 32  # widths are multiples of this: attention kernels want it of their mask


@dataclass(frozen=True)
class ChainOptions:
    """Chains of `copies` rows with tokens and `streams` rows, at every `every`-th learned position from `first` on."""

    streams: int
    copies: int = 0
    every: int = 1
    first: int = 0

    @property
    def length(self) -> int:
        """Rows of a chain."""
        return self.copies + self.streams


@dataclass(frozen=True)
class Layout:
    """A batch with its chains, and what its extra rows should say.

    `input_ids`, `positions`: int64 `[batch, width]`; ids from `vocab_size` on are streams. `anchors`: int64
    `[batch, chains]`. `text_width`: rows before the chains. `chain_length`. `where`: int64 `[m]`, the extra
    rows that have something to learn, in the flattened batch; row j of them stands at place `step[j]` of its
    chain, and should say what the target says at learned position `lesson[j]` (which counts through the
    batch's learned positions), and its chain hangs on learned position `anchored[j]`.
    """

    input_ids: Tensor
    positions: Tensor
    anchors: Tensor
    text_width: int
    chain_length: int
    where: Ints
    lesson: Ints
    step: Ints
    anchored: Ints

    def visible(self, device: torch.device) -> Tensor:
        """Return which rows a row sees, bool `[batch, width, width]`."""
        width = self.input_ids.shape[1]
        index = torch.arange(width, device=device)
        chain = torch.div(index - self.text_width, self.chain_length, rounding_mode="floor").clamp_(min=-1)
        anchors = to_device(self.anchors, device)
        own = chain.clamp(0, anchors.shape[1] - 1)
        last = torch.where(chain >= 0, anchors[:, own], index)  # [batch, width]: the last text row that is seen
        in_text = (index < self.text_width) & (index <= last[:, :, None])
        in_chain = (chain[:, None] == chain) & (chain >= 0) & (index <= index[:, None])
        return in_text | in_chain


def chains(batch: Batch, options: ChainOptions, vocab_size: int) -> Layout:
    """Return a batch with chains of extra rows behind its texts.

    Args:
        batch: right-padded texts.
        options: which chains.
        vocab_size: the id of the first stream.
    """
    ids = batch.input_ids.numpy()
    rows, text_width = ids.shape
    starts = np.concatenate([[0], np.cumsum(batch.counts)])
    begins = batch.learned.numpy()[starts[:-1]] - np.arange(rows) * text_width  # [rows]: first learned position
    most = max(1, max(-(-max(count - options.first, 0) // options.every) for count in batch.counts))
    places = options.first + options.every * np.arange(most)  # which learned positions carry a chain
    real = places[None] < np.array(batch.counts)[:, None]  # [rows, most]
    anchors = np.where(real, begins[:, None] + places, 0)
    steps = np.arange(options.length)
    at = places[None, :, None] + steps + 1  # [1, most, length]: the learned position that a chain row repeats
    learned = real[:, :, None] & (at < np.array(batch.counts)[:, None, None])
    extra = _extra_ids(ids, anchors, options, vocab_size)
    width = -(-(text_width + most * options.length) // _ALIGN) * _ALIGN
    all_ids, positions = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int64)
    all_ids[:, :text_width], positions[:, :text_width] = ids, np.arange(text_width)
    stop = text_width + most * options.length
    all_ids[:, text_width:stop] = extra.reshape(rows, -1)
    positions[:, text_width:stop] = (anchors[:, :, None] + 1 + steps).reshape(rows, -1)
    row, chain, step = np.nonzero(learned)
    return Layout(
        torch.from_numpy(all_ids),
        torch.from_numpy(positions),
        torch.from_numpy(anchors),
        text_width,
        options.length,
        row * width + text_width + chain * options.length + step,
        starts[row] + places[chain] + step + 1,
        step,
        starts[row] + places[chain],
    )


def _extra_ids(ids: Ints, anchors: Ints, options: ChainOptions, vocab_size: int) -> Ints:
    """Return the ids `[rows, chains, length]` of chain rows."""
    copied = np.minimum(anchors[:, :, None] + 1 + np.arange(options.copies), ids.shape[1] - 1)
    tokens = np.take_along_axis(ids[:, None], copied, 2) if options.copies else copied
    streams = np.broadcast_to(vocab_size + np.arange(options.streams), (*anchors.shape, options.streams))
    return np.concatenate([tokens, streams], 2)
