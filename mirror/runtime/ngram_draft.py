"""A draft without a model: what followed the same few tokens earlier in the context (prompt lookup)."""

from __future__ import annotations

import numpy as np

from mirror.runtime.candidates import CandidateSource, choose_branches
from mirror.runtime.draft import Meeting
from mirror.runtime.proposal import Proposal
from mirror.runtime.records import NO_BRANCHES, Branches, Candidates, Floats, Ints, Lane, Rollout
from mirror.runtime.sampling import CoupledNoise
from mirror.runtime.spans import SpanLog


class NgramDraft:
    """Continues the longest recent repetition: the last `max_ngram_size` tokens, else fewer.

    Invariant: `_ends[g]` holds, for every n-gram g of `_read` up to the greatest size that has a
    token after it, the indices of those tokens, ascending.
    """

    def __init__(self, source: CandidateSource, fanout: Ints, max_ngram_size: int = 3) -> None:
        self._source = source
        self._fanout = fanout
        self._max_ngram_size = max_ngram_size
        self._log = SpanLog(Lane.DRAFT)
        self._read: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def keep(self, length: int) -> None:
        """Forget the tokens past the first `length`."""
        if length < len(self._read):
            kept = self._read[:length]
            self._read, self._ends = [], {}
            self._extend(kept)

    def see_states(self, start: int, states: Floats) -> None:
        """Need nothing of them."""

    def read(self, tokens: Ints) -> None:
        """Index the context."""
        with self._log.span("draft_prefill"):
            self._extend(tokens[len(self._read) :].tolist())

    def draw_ahead(self, noise: CoupledNoise, position: int, count: int) -> None:
        """Need no noise: what followed before is no guess at odds."""

    def propose(self, tokens: Ints, count: int, noise: CoupledNoise | None) -> Proposal:
        """Return what followed the context's last tokens before; empty if they are new."""
        with self._log.span("propose"):
            self._extend(tokens[len(self._read) :].tolist())
            found = self._continuation(self._read, count)
        return Proposal(tuple(found), self._log.take())

    def roll_out(self, tokens: Ints, window: Ints, depth: int, meeting: Meeting, noise: CoupledNoise | None) -> Rollout:
        """Look up every branch. The lookup's own candidates are the tokens that followed before."""
        with self._log.span("trunk"):
            self._extend(tokens[len(self._read) :].tolist())
        branches = self._branches(window, meeting)
        with self._log.span("rollout"):
            context = self._read[-self._max_ngram_size :]
            line = window[1:].tolist()
            continuations = np.zeros((len(branches), depth), np.int64)
            lengths = np.zeros(len(branches), np.int64)
            pairs = zip(branches.accepted.tolist(), branches.next_tokens.tolist(), strict=True)
            for row, (accepted, token) in enumerate(pairs):
                found = self._continuation([*context, *line[:accepted], token], depth)
                continuations[row, : len(found)] = found
                lengths[row] = len(found)
        return Rollout(branches, lengths, continuations, self._log.take())

    def _branches(self, window: Ints, meeting: Meeting) -> Branches:
        sources = [self._own_candidates(window)] if self._source.needs_draft else []
        if self._source.needs_exit:
            with self._log.span("candidate_wait"):
                offered = meeting.wait_candidates()
            if offered is None:
                return NO_BRANCHES
            sources.append(offered)
        return choose_branches(window, sources, self._fanout)

    def _own_candidates(self, window: Ints) -> Candidates:
        """Return per window position the tokens that followed before, latest first; int64 [width, top]."""
        top = int(self._fanout.max()) + 1
        ids = np.full((window.size, top), -1, np.int64)
        line = self._read[-self._max_ngram_size :]
        for position, token in enumerate(window.tolist()):
            line = line if position == 0 else [*line, token]
            nexts = dict.fromkeys(self._read[end] for end in reversed(self._matches(line)))
            ids[position, : min(top, len(nexts))] = list(nexts)[:top]
        return Candidates(ids, None)

    def _continuation(self, line: list[int], count: int) -> list[int]:
        matches = self._matches(line)
        return self._read[matches[-1] : matches[-1] + count] if matches else []

    def _matches(self, line: list[int]) -> list[int]:
        """Return where the longest known ending of a line was followed by what."""
        for size in range(min(self._max_ngram_size, len(line)), 0, -1):
            found = self._ends.get(tuple(line[-size:]))
            if found:
                return found
        return []

    def _extend(self, tokens: list[int]) -> None:
        for token in tokens:
            index = len(self._read)
            for size in range(1, min(self._max_ngram_size, index) + 1):
                self._ends.setdefault(tuple(self._read[index - size :]), []).append(index)
            self._read.append(token)
