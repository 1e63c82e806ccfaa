"""A draft that is a language model on a device, with the tree layout of `docs/bundle.md`.

The draft's cache holds the trunk, one slot per committed token that it has read. A rollout appends the
rows of its branches, pass after pass, behind the window's rows; the next pass over the trunk writes over
them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mirror.bundle import NOISE_POSITIONS
from mirror.runtime.candidates import CandidateSource, by_likelihood, choose_branches, likeliest
from mirror.runtime.draft import Meeting
from mirror.runtime.features import FeatureStore
from mirror.runtime.feeds import NO_BRANCH, FeedPool, PassFeeds, chunk_width, fit_width, line_rows
from mirror.runtime.guesses import Guess, Known, Launched
from mirror.runtime.lookahead import BranchPass, branch_passes, branches_at
from mirror.runtime.noise_table import NoiseTable
from mirror.runtime.pace import BranchPace
from mirror.runtime.proposal import LaunchedProposal, Proposal
from mirror.runtime.records import NO_BRANCHES, Branches, Candidates, Floats, Ints, Lane, Rollout
from mirror.runtime.sampling import CoupledNoise
from mirror.runtime.spans import SpanLog
from mirror.targets.base import KVCache, LoadedSegment, Tensor, to_host


@dataclass(frozen=True)
class SampledSegment:
    """The draft's graph that adds the target's noise to its scores, and where that lies."""

    graph: LoadedSegment
    noise: NoiseTable


@dataclass(frozen=True)
class DraftSegments:
    """The draft's graphs, loaded on one device, over one cache.

    Attributes:
        sampled: for answers that are drawn, where passes are only launched; None elsewhere: the host adds the noise to
            the likeliest of the trunk's candidates.
    """

    trunk: LoadedSegment
    branch: LoadedSegment
    cache: KVCache
    sampled: SampledSegment | None = None


@dataclass(frozen=True)
class DraftShape:
    """Sizes of a draft.

    Attributes:
        capacity: slots of its cache; see `lookahead.rollout_capacity`.
        max_positions: positions it knows.
        vocab_size: its own vocabulary, rows of its embedding; the first stream's id.
        target_vocab_size: tokens past it are never proposed.
        prefill_chunk: the most rows of a pass, where the device takes any.
        tokens_per_pass: tokens that pass 0, 1, ... of a rollout gives a branch; the last number repeats.
        branches_per_pass: branches that take part in pass 0, 1, ..., the likeliest; see `lookahead.branches_at`.
        proposal_tokens_per_pass: tokens that each pass of a proposal gives, while the target waits for it.
        adapts: whether rollouts take fewer branches where they end late; see `pace.BranchPace`.
    """

    capacity: int
    max_positions: int
    vocab_size: int
    target_vocab_size: int
    prefill_chunk: int
    tokens_per_pass: tuple[int, ...] = (1,)
    branches_per_pass: tuple[int, ...] = ()
    proposal_tokens_per_pass: tuple[int, ...] = (1,)
    adapts: bool = False


class ModelDraft:
    """An independent language model as draft, with lookahead streams and fed features where it has them.

    Invariant: slots below `_filled` hold the rows of the tokens given last, with one exception that
    every entry point repairs first: rows of draft tokens which the target then refused. They start
    at the context's last token but one at the earliest, so keeping `len(tokens) - 1` rows is safe.
    """

    def __init__(
        self,
        segments: DraftSegments,
        shape: DraftShape,
        source: CandidateSource,
        fanout: Ints,
        features: FeatureStore | None = None,
    ) -> None:
        self._segments = segments
        self._shape = shape
        self._source = source
        self._fanout = fanout
        self._features = features
        self._pool = FeedPool(shape.capacity, shape.max_positions)
        self._log = SpanLog(Lane.DRAFT)
        self._filled = 0
        self._known = 0  # positions whose exit state is that of the context
        self._pace = BranchPace(int(fanout.sum())) if shape.adapts else None
        self._last: tuple[Meeting, float, float] | None = None  # the last rollout's, when it began and ended

    def keep(self, length: int) -> None:
        """Forget the rows past the first `length` tokens."""
        self._filled = min(self._filled, length)

    def see_states(self, start: int, states: Floats) -> None:
        """Take the exit layer's states `[n, hidden]` at positions `start..`."""
        if self._features is not None:
            self._features.put(start, states)

    def read(self, tokens: Ints) -> None:
        """Read the context up to its end."""
        self._know(tokens.shape[0] - 1)
        with self._log.span("draft_prefill"):
            self._advance(tokens, 1, None)

    def draw_ahead(self, noise: CoupledNoise, position: int, count: int) -> None:
        """Draw noise into the device's table, if there is one, whose ring bounds how far ahead."""
        if self._segments.sampled is not None:
            self._segments.sampled.noise.draw(noise, position + np.arange(min(count, NOISE_POSITIONS)))

    def propose(self, tokens: Ints, count: int, noise: CoupledNoise | None) -> Proposal | LaunchedProposal:
        """Draft pass after pass, the likeliest token each time."""
        start_s = time.perf_counter()
        # A context read ahead of time would have no logits left; its last row is run again.
        self._know(tokens.shape[0] - 1)
        first, *others = branch_passes(self._shape.proposal_tokens_per_pass, count)
        guesses = [self._advance(tokens, first.gives, noise).fetch()]
        for item in others:
            width = fit_width(self._segments.branch.widths, item.rows)
            guesses.append(self._step(guesses[-1], item.gives, width, noise).fetch())
        launched = tuple(guess for guess in guesses if isinstance(guess, Launched))
        # The target would have no embedding for a token that it doesn't know.
        if len(launched) == len(guesses) and self._shape.vocab_size <= self._shape.target_vocab_size:
            return LaunchedProposal(launched, start_s, self._log.take())
        proposed = np.concatenate([guess.tokens()[0] for guess in guesses])
        self._log.add("propose", start_s, time.perf_counter())
        return Proposal(self._known_tokens(proposed), self._log.take())

    def roll_out(self, tokens: Ints, window: Ints, depth: int, meeting: Meeting, noise: CoupledNoise | None) -> Rollout:
        """Read the window, then continue all branches together."""
        start_s, base = time.perf_counter(), tokens.shape[0] - 1
        self._learn_pace()
        self._know(base)
        self._wait_states(base, meeting)
        with self._log.span("trunk"):
            if self._filled < base:
                self._advance(tokens[:base], 1, None)
            own = self._run_trunk(window, noise)
        branches = self._branches(window, own, meeting, noise)
        with self._log.span("rollout"):
            continuations, lengths = self._continue(branches, base, depth, meeting, noise)
        self._last = meeting, start_s, time.perf_counter()
        return Rollout(branches, self._cut(continuations, lengths), continuations, self._log.take())

    def _learn_pace(self) -> None:
        """Take in how late the last rollout was, now that its outcome is known."""
        last, self._last = self._last, None
        if self._pace is None or last is None:
            return
        meeting, start_s, end_s = last
        if meeting.decided_s is not None and not meeting.abandoned:
            self._pace.note(end_s - meeting.decided_s, end_s - start_s)

    def _know(self, count: int) -> None:
        """Begin with a context whose first `count` tokens have exit states and may keep their rows."""
        if self._features is not None:
            # Rows past these were drafted before their feature was known; they are run again with it.
            self.keep(self._known + 1)
        self.keep(count)
        self._known = count

    def _wait_states(self, base: int, meeting: Meeting) -> None:
        """Wait for the window's exit states, if this draft is fed by them."""
        if self._features is None:
            return
        with self._log.span("candidate_wait"):
            states = meeting.wait_states()
        if states is not None:
            self._features.put(base, states)
            self._known = base + states.shape[0]

    def _branches(self, window: Ints, own: Candidates, meeting: Meeting, noise: CoupledNoise | None) -> Branches:
        # The draft's candidates go first: at equal rank they are right more often than the exit's.
        sources = [own] if self._source.needs_draft else []
        if self._source.needs_exit:
            with self._log.span("candidate_wait"):
                exits = meeting.wait_candidates()
            if exits is None:
                return NO_BRANCHES
            after = self._filled - window.size + 1 + np.arange(window.size)
            sources.append(exits if noise is None else noise.ordered(exits, after))
        branches = choose_branches(window, sources, self._fanout)
        # One that the first pass leaves out would propose nothing, where a proposal made anew may.
        most = branches_at(0, len(branches), self._shape.branches_per_pass)
        return likeliest(branches, self._fanout, most if self._pace is None else self._pace.first(most))

    # Passes over the trunk.

    def _advance(self, tokens: Ints, gives: int, noise: CoupledNoise | None) -> Guess:
        """Run the tokens not read yet; return the `gives` likeliest tokens after them."""
        widths = self._segments.branch.widths
        while True:
            waiting = tokens[self._filled :]
            rows = min(waiting.shape[0], self._shape.prefill_chunk) + gives - 1
            taken, width = chunk_width(widths, rows, self._shape.capacity - self._filled)
            if waiting.shape[0] == 1:
                return self._step(Known(waiting[None]), gives, fit_width(widths, rows), noise)
            if taken == waiting.shape[0] + gives - 1:
                return self._step(Known(waiting[None]), gives, width, noise)
            # Never the last one: the streams follow it in its own pass.
            self._step(Known(waiting[None, : min(taken, waiting.shape[0] - 1)]), 1, width, None)

    def _step(self, tokens: Guess, gives: int, width: int, noise: CoupledNoise | None) -> Guess:
        """Run one pass of the trunk's next tokens, one line; return the `gives` likeliest after the last one."""
        past, count = self._filled, tokens.count
        rows = count + gives - 1
        feeds, line = self._pool.at(width), line_rows(count, gives - 1, width)
        streams = self._pool.slot_branch[past + count : past + rows]
        streams[:] = 0
        self._fill_ids(feeds, tokens, gives)
        feeds.place_line(line, past)
        places = past + line.positions[:rows]
        chosen = self._choose(feeds, tokens, places, line.wanted, past, self._known, noise)
        streams[:] = NO_BRANCH
        self._filled += count
        return chosen

    def _run_trunk(self, window: Ints, noise: CoupledNoise | None) -> Candidates:
        """Run the window; return the draft's candidates, ids int64 [width, kappa + 1]; see `_candidates`."""
        past = self._filled
        feeds = self._pool.at(fit_width(self._segments.trunk.widths, window.shape[0]))
        feeds.fill_causal(self._embeddable(window), past)
        rows = np.arange(window.shape[0])
        candidates = self._candidates(feeds, past + rows, rows, past, self._known, noise)
        self._filled += window.shape[0]
        return candidates

    # Passes over branches.

    def _continue(
        self, branches: Branches, base: int, depth: int, meeting: Meeting, noise: CoupledNoise | None
    ) -> tuple[Ints, Ints]:
        """Continue every branch as far as it may go; once the outcome is known, only the one that it takes.

        Returns:
            Tokens int64 [branches, depth], and how many of each row are filled, int64 [branches].
        """
        continuations = np.zeros((len(branches), depth), np.int64)
        lengths = np.zeros(len(branches), np.int64)
        rows = by_likelihood(branches, self._fanout)
        tokens: Guess = Known(branches.next_tokens[rows, None])
        given: list[tuple[Ints, Guess]] = []
        first_slot = slot = self._filled
        read = 0
        for number, item in enumerate(branch_passes(self._shape.tokens_per_pass, depth)):
            limit = branches_at(number, len(branches), self._shape.branches_per_pass)
            if self._pace is not None:
                limit = min(limit, self._pace.later(number, len(branches)))
            alive = _still_wanted(rows, branches, meeting, limit)
            if alive.size == 0:
                break
            if alive.size < rows.size:
                tokens = tokens.some(int(np.flatnonzero(rows == alive[0])[0]), alive.size)
                rows = alive
            starts = base + 1 + branches.accepted[rows]
            slot, tokens = self._branch_pass(item, tokens, rows, starts, read, slot, noise)
            tokens = tokens.fetch()
            given.append((rows, tokens))
            read += item.real
        self._pool.slot_branch[first_slot:slot] = NO_BRANCH
        if noise is not None:
            # As far as the next round's rollout may look, while this one's passes run.
            self.draw_ahead(noise, base + 1, 3 * (depth + 1))
        # Where passes are only launched, this is the first wait since the branches were chosen.
        for rows, guess in given:
            start = lengths[rows[0]]
            continuations[rows, start : start + guess.count] = guess.tokens()
            lengths[rows] += guess.count
        return continuations, lengths

    def _branch_pass(
        self,
        item: BranchPass,
        tokens: Guess,
        rows: Ints,
        starts: Ints,
        read: int,
        slot: int,
        noise: CoupledNoise | None,
    ) -> tuple[int, Guess]:
        """Run one pass over some branches, each one's rows side by side.

        Args:
            tokens: what to read, `item.real` of each branch.
            rows: int64 [branches], their numbers.
            starts: int64 [branches], the position of each branch's first token.
            read: tokens of each branch that earlier passes read.
            slot: the first free one.

        Returns:
            The next free slot, and `item.gives` tokens of each branch.
        """
        count = rows.size * item.rows
        feeds = self._pool.at(fit_width(self._segments.branch.widths, count))
        places = (starts[:, None] + (read + np.arange(item.rows))).reshape(-1)
        slots = self._pool.slot_branch[slot : slot + count].reshape(rows.size, item.rows)
        slots[...] = rows[:, None]
        self._fill_ids(feeds, tokens, item.gives)
        feeds.place_rows(places, np.repeat(starts, item.rows), np.repeat(rows, item.rows), slot)
        wanted = _wanted_rows(rows.size, item)
        # The token before a branch's second one is the branch's own, which the target has not seen.
        fed = 0 if self._features is None else np.repeat(np.minimum(starts, self._known), item.rows)
        chosen = self._choose(feeds, tokens, places, wanted, slot, fed, noise)
        slots[:, item.real :] = NO_BRANCH  # a stream is seen by its own pass alone
        return slot + feeds.width, chosen

    # One pass.

    def _fill_ids(self, feeds: PassFeeds, tokens: Guess, gives: int) -> None:
        """Fill a pass's ids, each branch's tokens and its streams; what isn't there yet stays as it was."""
        rows = tokens.count + gives - 1
        count = tokens.branches * rows
        ids = feeds.ids[0, :count].reshape(tokens.branches, rows)
        if (known := tokens.known()) is not None:
            ids[:, : tokens.count] = self._embeddable(known)
        if gives > 1:
            ids[:, tokens.count :] = self._streams(gives)
        feeds.pad_ids(count)

    def _choose(
        self,
        feeds: PassFeeds,
        tokens: Guess,
        places: Ints,
        wanted: Ints,
        past: int,
        fed: int | Ints,
        noise: CoupledNoise | None,
    ) -> Guess:
        """Run a pass; return the token that each wanted row proposes.

        Args:
            tokens: those that the pass reads; what isn't known yet goes from pass to pass.
            places: int64 [rows], each row's position.
            wanted: int64 [branches, n], rows of the pass.
            fed: the last position whose row has a feature; one for all, or int64 [rows].
        """
        branches, gives = wanted.shape
        rows = wanted.reshape(-1)
        graph, sampled, more = self._segments.branch, self._segments.sampled, dict[str, Tensor]()
        if noise is not None:
            if sampled is None:
                candidates = self._candidates(feeds, places, rows, past, fed, noise)
                return Known(candidates.ids[:, 0].reshape(branches, gives))
            graph = sampled.graph
            more |= sampled.noise.feeds(noise, places[rows] + 1)
        if (follow := tokens.follow(feeds.ids, tokens.count + gives - 1)) is not None:
            more["input_ids"] = follow
        chosen = self._run(graph, feeds, places, rows, past, fed, more)["token_ids"]
        if isinstance(chosen, np.ndarray):
            return Known(chosen[0, : rows.size].reshape(branches, gives).copy())
        return Launched(chosen, branches, gives)

    def _candidates(
        self, feeds: PassFeeds, places: Ints, wanted: Ints, past: int, fed: int | Ints, noise: CoupledNoise | None
    ) -> Candidates:
        """Return each wanted row's candidates, by falling score with the noise in it; ids -1 for no token."""
        sampled, after = self._segments.sampled, places[wanted] + 1
        if noise is not None and sampled is not None:
            feeds_of_noise = sampled.noise.feeds(noise, after)
            outputs = self._run(sampled.graph, feeds, places, wanted, past, fed, feeds_of_noise)
            return Candidates(self._of_target(outputs, wanted.size), None)
        # No graph asks for it; kernels of our own give drawn answers more candidates, to which the noise is added here.
        drawn = dict[str, Tensor]()
        if noise is not None:
            drawn["inverse_temperature"] = np.array([1.0 / noise.temperature], np.float32)
        outputs = self._run(self._segments.trunk, feeds, places, wanted, past, fed, drawn)
        found = Candidates(
            self._of_target(outputs, wanted.size), to_host(outputs["candidate_logprobs"])[0, : wanted.size]
        )
        return found if noise is None else noise.ordered(found, after)

    def _of_target(self, outputs: Mapping[str, Tensor], rows: int) -> Ints:
        """Return candidates with -1 in place of padding of the draft's vocabulary, which is no token of the target."""
        ids: Ints = to_host(outputs["candidate_ids"])[0, :rows]
        return np.where(ids < self._shape.target_vocab_size, ids, -1)

    def _run(
        self,
        segment: LoadedSegment,
        feeds: PassFeeds,
        places: Ints,
        wanted: Ints,
        past: int,
        fed: int | Ints,
        more: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Mapping[str, Tensor]:
        tensors: dict[str, Tensor] = {**feeds.tensors, "logit_rows": wanted, **more}
        if self._features is not None:
            tensors["features"], tensors["feature_rows"] = self._features.at(places, fed, feeds.width)
        return segment.run(tensors, self._segments.cache, past)

    def _streams(self, gives: int) -> Ints:
        """Return the ids of the stream rows of a pass that gives so many tokens, int64 [gives - 1]."""
        return self._shape.vocab_size + np.arange(gives - 1)

    def _embeddable(self, tokens: Ints) -> Ints:
        """Return tokens with those the draft has no embedding for replaced; only its guesses suffer."""
        if self._shape.vocab_size >= self._shape.target_vocab_size:
            return tokens
        return np.minimum(tokens, self._shape.vocab_size - 1)

    def _known_tokens(self, tokens: Ints) -> tuple[int, ...]:
        """Return the tokens up to the first that the target does not have."""
        unknown = np.flatnonzero((tokens < 0) | (tokens >= self._shape.target_vocab_size))
        return tuple(tokens[: unknown[0] if unknown.size else tokens.size].tolist())

    def _cut(self, continuations: Ints, lengths: Ints) -> Ints:
        """Return each row's length up to its first token that the target does not have."""
        unknown = (continuations < 0) | (continuations >= self._shape.target_vocab_size)
        first = np.where(unknown.any(axis=1), unknown.argmax(axis=1), continuations.shape[1])
        cut: Ints = np.minimum(lengths, first)
        return cut


@functools.cache
def _wanted_rows(branches: int, item: BranchPass) -> Ints:
    """Return the rows of a pass over branches whose tokens are wanted, int64 [branches, gives]."""
    return (np.arange(branches) * item.rows)[:, None] + item.real - 1 + np.arange(item.gives)


def _still_wanted(rows: Ints, branches: Branches, meeting: Meeting, limit: int) -> Ints:
    """Return the rows worth continuing: the first ones until the outcome is known, then at most one."""
    if meeting.abandoned:
        return rows[:0]
    if meeting.outcome is None:
        return rows[:limit]
    taken = branches.row(meeting.outcome)
    return rows[:0] if taken is None else rows[rows == taken]
