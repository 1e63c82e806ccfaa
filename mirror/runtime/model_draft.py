"""A draft that is a language model on a device, with the tree layout of `docs/bundle.md`.

The draft's cache holds the trunk, one slot per committed token that it has read. A rollout appends
one row per branch and pass after the window's rows; the next pass over the trunk writes over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mirror.runtime.candidates import CandidateSource, choose_branches
from mirror.runtime.draft import Meeting
from mirror.runtime.feeds import NO_BRANCH, FeedPool, chunk_width, fit_width
from mirror.runtime.records import NO_BRANCHES, Branches, Candidates, Ints, Lane, Proposal, Rollout
from mirror.runtime.spans import SpanLog
from mirror.targets.base import KVCache, LoadedSegment, Tensor, to_host


@dataclass(frozen=True)
class DraftSegments:
    """The draft's two graphs, loaded on one device, over one cache."""

    trunk: LoadedSegment
    branch: LoadedSegment
    cache: KVCache


@dataclass(frozen=True)
class DraftShape:
    """Sizes of a draft.

    Attributes:
        capacity: slots of its cache; see `rollout_capacity`.
        max_positions: positions it knows.
        vocab_size: its own vocabulary, rows of its embedding.
        target_vocab_size: tokens past it are never proposed.
        prefill_chunk: the most rows of a pass, where the device takes any.
    """

    capacity: int
    max_positions: int
    vocab_size: int
    target_vocab_size: int
    prefill_chunk: int


def rollout_capacity(max_length: int, gamma: int, branches: int) -> int:
    """Return the slots that a draft's cache needs: the context, a window and gamma rows per branch."""
    return max_length + gamma + 1 + gamma * branches


class ModelDraft:
    """An independent language model as draft.

    Invariant: slots below `_filled` hold the rows of the tokens given last, with one exception that
    every entry point repairs first: rows of draft tokens which the target then refused. They start
    at the context's last token but one at the earliest, so keeping `len(tokens) - 1` rows is safe.
    """

    def __init__(self, segments: DraftSegments, shape: DraftShape, source: CandidateSource, fanout: Ints) -> None:
        self._segments = segments
        self._shape = shape
        self._source = source
        self._fanout = fanout
        self._pool = FeedPool(shape.capacity, shape.max_positions)
        self._log = SpanLog(Lane.DRAFT)
        self._filled = 0

    def keep(self, length: int) -> None:
        """Forget the rows past the first `length` tokens."""
        self._filled = min(self._filled, length)

    def read(self, tokens: Ints) -> None:
        """Read the context up to its end."""
        self.keep(tokens.shape[0] - 1)
        with self._log.span("draft_prefill"):
            self._advance(tokens)

    def propose(self, tokens: Ints, count: int) -> Proposal:
        """Draft token after token, the likeliest each time."""
        # A context read ahead of time would have no logits left; its last row is run again.
        self.keep(tokens.shape[0] - 1)
        with self._log.span("propose"):
            proposed = [self._advance(tokens)]
            while len(proposed) < count:
                proposed.append(self._step(np.array(proposed[-1:], np.int64)))
        return Proposal(self._known(np.array(proposed)), self._log.take())

    def roll_out(self, tokens: Ints, window: Ints, depth: int, meeting: Meeting) -> Rollout:
        """Read the window, then continue all branches together, one row each."""
        base = tokens.shape[0] - 1
        self.keep(base)
        with self._log.span("trunk"):
            if self._filled < base:
                self._advance(tokens[:base])
            own = self._run_trunk(window)
        branches = self._branches(window, own, meeting)
        with self._log.span("rollout"):
            continuations, lengths = self._continue(branches, base, depth, meeting)
        return Rollout(branches, self._cut(continuations, lengths), continuations, self._log.take())

    def _branches(self, window: Ints, own: Candidates, meeting: Meeting) -> Branches:
        sources = [own] if self._source.needs_draft else []
        if self._source.needs_exit:
            with self._log.span("candidate_wait"):
                offered = meeting.wait_candidates()
            if offered is None:
                return NO_BRANCHES
            # The exit's candidates go first: at equal rank they saw the target's own state.
            sources.insert(0, offered)
        return choose_branches(window, sources, self._fanout)

    def _advance(self, tokens: Ints) -> int:
        """Run the tokens not read yet; return the likeliest token after the last one."""
        following = 0
        while self._filled < tokens.shape[0]:
            waiting = tokens[self._filled : self._filled + self._shape.prefill_chunk]
            widths = self._segments.branch.widths
            rows, _ = chunk_width(widths, waiting.shape[0], self._shape.capacity - self._filled)
            following = self._step(waiting[:rows])
        return following

    def _step(self, tokens: Ints) -> int:
        """Run one pass of the trunk's next tokens; return the likeliest token after the last one."""
        feeds = self._pool.at(fit_width(self._segments.branch.widths, tokens.shape[0]))
        feeds.fill_causal(self._embeddable(tokens), self._filled)
        outputs = self._run(self._segments.branch, feeds.tensors, self._filled)
        self._filled += tokens.shape[0]
        return int(to_host(outputs["token_ids"])[0, tokens.shape[0] - 1])

    def _run_trunk(self, window: Ints) -> Candidates:
        """Run the window; return the draft's candidates, ids int64 [width, kappa + 1]."""
        feeds = self._pool.at(fit_width(self._segments.trunk.widths, window.shape[0]))
        feeds.fill_causal(self._embeddable(window), self._filled)
        outputs = self._run(self._segments.trunk, feeds.tensors, self._filled)
        self._filled += window.shape[0]
        rows = slice(0, window.shape[0])
        ids: Ints = to_host(outputs["candidate_ids"])[0, rows]
        # Padding of the draft's vocabulary is no token of the target.
        ids = np.where(ids < self._shape.target_vocab_size, ids, -1)
        return Candidates(ids, to_host(outputs["candidate_logprobs"])[0, rows])

    def _continue(self, branches: Branches, base: int, depth: int, meeting: Meeting) -> tuple[Ints, Ints]:
        """Continue every branch; once the outcome is known, only the one that it takes.

        Returns:
            Tokens int64 [branches, depth], and how many of each row are filled, int64 [branches].
        """
        continuations = np.zeros((len(branches), depth), np.int64)
        lengths = np.zeros(len(branches), np.int64)
        rows = np.arange(len(branches))
        tokens = branches.next_tokens
        first_slot = slot = self._filled
        for step in range(depth):
            alive = _still_wanted(rows, branches, meeting)
            if alive.size == 0:
                break
            if alive.size < rows.size:
                tokens = tokens[rows == alive[0]]
                rows = alive
            visible = base + 1 + branches.accepted[rows]
            feeds = self._pool.at(fit_width(self._segments.branch.widths, rows.size))
            self._pool.slot_branch[slot : slot + rows.size] = rows
            feeds.fill_branches(self._embeddable(tokens), visible + step, visible, rows, slot)
            outputs = self._run(self._segments.branch, feeds.tensors, slot)
            slot += feeds.width
            tokens = to_host(outputs["token_ids"])[0, : rows.size].copy()
            continuations[rows, step] = tokens
            lengths[rows] = step + 1
        self._pool.slot_branch[first_slot:slot] = NO_BRANCH
        return continuations, lengths

    def _run(self, segment: LoadedSegment, feeds: Mapping[str, Tensor], past_length: int) -> Mapping[str, Tensor]:
        return segment.run(feeds, self._segments.cache, past_length)

    def _embeddable(self, tokens: Ints) -> Ints:
        """Return tokens with those the draft has no embedding for replaced; only its guesses suffer."""
        if self._shape.vocab_size >= self._shape.target_vocab_size:
            return tokens
        return np.minimum(tokens, self._shape.vocab_size - 1)

    def _known(self, tokens: Ints) -> tuple[int, ...]:
        """Return the tokens up to the first that the target does not have."""
        unknown = np.flatnonzero(tokens >= self._shape.target_vocab_size)
        return tuple(tokens[: unknown[0] if unknown.size else tokens.size].tolist())

    def _cut(self, continuations: Ints, lengths: Ints) -> Ints:
        """Return each row's length up to its first token that the target does not have."""
        if self._shape.vocab_size <= self._shape.target_vocab_size:
            return lengths
        unknown = continuations >= self._shape.target_vocab_size
        first = np.where(unknown.any(axis=1), unknown.argmax(axis=1), continuations.shape[1])
        cut: Ints = np.minimum(lengths, first)
        return cut


def _still_wanted(rows: Ints, branches: Branches, meeting: Meeting) -> Ints:
    """Return the rows worth continuing: all until the outcome is known, then at most one."""
    if meeting.abandoned:
        return rows[:0]
    if meeting.outcome is None:
        return rows
    taken = branches.row(meeting.outcome)
    return rows[:0] if taken is None else rows[rows == taken]
