"""The round loop: propose, verify, commit.

One `Generation` makes one answer over one sequence. The target runs on the calling thread, the
draft in its seat's thread. Whatever the draft does, the tokens are those that the target alone
would choose; a draft that fails is left out and the answer goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mirror.errors import DraftError
from mirror.runtime.acceptance import verify
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.logits import Logits
from mirror.runtime.proposal import LaunchedProposal, Proposal
from mirror.runtime.records import (
    Event,
    FinishReason,
    Floats,
    Ints,
    Lane,
    Mode,
    Outcome,
    Rollout,
    Round,
    Span,
)
from mirror.runtime.sampling import CoupledNoise, Sampler
from mirror.runtime.sequence import Sequence
from mirror.runtime.spans import SpanLog
from mirror.runtime.stopping import Stopping
from mirror.runtime.target import ExitState, Target
from mirror.runtime.worker import DraftSeat, Job


@dataclass(frozen=True)
class RoundShape:
    """What a round looks like.

    Attributes:
        gamma: the most draft tokens of a window.
        prefill_chunk: the most rows of a prefill pass.
        wants_exit: whether the rollout waits for the exit's candidates.
        wants_states: whether the draft is fed by the exit layer's states.
    """

    gamma: int
    prefill_chunk: int
    wants_exit: bool
    wants_states: bool = False


@dataclass
class _Overlap:
    """A rollout under way."""

    meeting: Meeting
    job: Job[Rollout]


@dataclass
class _Begun:
    """A round that has begun.

    Attributes:
        mode: the mode that it began in.
        window: x_0 and the draft's tokens, or any in place of those that are `coming`.
        state: the target's pass, where that could be launched.
        overlap: the rollout, if there is one; one over a window that is coming still begins later.
    """

    mode: Mode
    window: Ints
    coming: LaunchedProposal | None
    state: ExitState | None
    overlap: _Overlap | None
    start_s: float


class Generation:
    """One answer, made round by round.

    Attributes:
        finish_reason: why it ended; None while it goes on.
        rounds: the rounds so far.
        prefill_passes: target passes over the prompt.
        prefill_spans: their times.
        events: what the user should hear of.
    """

    def __init__(
        self,
        target: Target,
        seat: DraftSeat | None,
        sequence: Sequence,
        sampler: Sampler,
        stopping: Stopping,
        *,
        mode: Mode,
        shape: RoundShape,
        cancelled: Callable[[], bool],
        noise: CoupledNoise | None = None,
    ) -> None:
        self._target = target
        self._seat = seat
        self._sequence = sequence
        self._sampler = sampler
        self._stopping = stopping
        self._mode = mode
        self._shape = shape
        self._cancelled = cancelled
        self._noise = noise
        self._unseen: list[tuple[int, Floats]] = []
        self._log = SpanLog(Lane.TARGET)
        self._draft_spans: list[Span] = []
        self._prepared: tuple[int, ...] | None = None
        self._ahead: Logits | None = None  # of the next round's pass
        self._begun: _Begun | Exception | None = None  # the next round, or why it can't begin
        self._drafts_are_launched = False
        self._earlier: list[Job[None]] = []  # the draft's, that nobody has waited for yet
        self.finish_reason: FinishReason | None = None
        self.rounds: list[Round] = []
        self.events: list[Event] = []
        self.prefill_passes = 0
        self.prefill_spans: tuple[Span, ...] = ()

    def run(self) -> Iterator[tuple[int, ...]]:
        """Yield the tokens of each commit, until the answer ends or the caller closes the iterator."""
        try:
            self._start_draft()
            if first := self._prefill():
                yield first
            while self._goes_on():
                yield self.step()
        finally:
            self._sequence.settle()
            if isinstance(self._begun, _Begun) and self._begun.overlap is not None:
                self._begun.overlap.meeting.abandon()
            self._let_draft_end()

    def step(self) -> tuple[int, ...]:
        """Run one round; return the tokens that it committed."""
        begun, self._begun = self._begun, None
        if isinstance(begun, Exception):
            raise begun
        begun, first = begun or self._begin(), len(self._sequence)
        window, overlap = begun.window, begun.overlap
        if begun.coming is not None:
            window = self._read(window, begun.coming)
            overlap = self._start_rollout(window)
        if self._mode is Mode.SERIAL:
            # All that the next window's draft may look at, while the target works.
            self._draw_ahead(first, 2 * self._shape.gamma + 1)
        outcome = self._verify(window, overlap, begun.state)
        committed = self._commit((*window[1 : outcome.accepted + 1].tolist(), outcome.next_token))
        self._sequence.cached = first + outcome.accepted
        rollout = self._collect(overlap, outcome)
        self._note(begun, window, outcome, len(committed), rollout)
        self._begin_early()
        return committed

    def _begin(self) -> _Begun:
        """Begin a round: propose, and start what needs no waiting."""
        start_s, mode = time.perf_counter(), self._mode
        window, coming = self._propose()
        # Launching comes first where it is all that there is to do: the draft has the whole prefix to read the window,
        # and a proposal that is being made still is waited for by the target's device, not by this thread.
        launches = self._target.launches and self._ahead is None
        state = self._run_prefix(window, coming) if launches else None
        overlap = self._start_rollout(window) if coming is None else None
        return _Begun(mode, window, coming, state, overlap, start_s)

    def _begin_early(self) -> None:
        """Begin the next round before this one's tokens are handed out, if that only launches: no device waits then."""
        launches = self._prepared is not None or self._drafts_are_launched
        if self._mode is Mode.PLAIN or not launches or not self._target.launches or not self._goes_on():
            return
        try:
            self._begun = self._begin()
        except Exception as error:  # noqa: BLE001  (it is raised when the round's turn has come)
            self._begun = error

    def _goes_on(self) -> bool:
        if self.finish_reason is None and self._cancelled():
            self.finish_reason = FinishReason.CANCELLED
        return self.finish_reason is None

    # The prompt.

    def _start_draft(self) -> None:
        """Let the draft read the prompt, at the same time as the target where they overlap."""
        if self._seat is None:
            return
        tokens, kept = self._sequence.tokens.copy(), self._sequence.cached
        # One that is fed by the target's states reads when they are there.
        reads = self._mode is not Mode.PLAIN and not self._shape.wants_states

        def read(draft: Draft) -> None:
            # In plain mode too: the context changes, and a later answer may go on from it.
            draft.keep(kept)
            if reads:
                draft.read(tokens)

        self._earlier.append(self._seat.start(read))
        if self._mode is Mode.SERIAL:
            self._wait_earlier("draft_prefill_wait")
        # What the first proposal looks at, and the first rollout; the prompt's passes leave the time.
        gamma = self._shape.gamma
        self._draw_ahead(len(tokens) + 1, gamma if self._mode is Mode.SERIAL else 2 * gamma + 1)

    def _draw_ahead(self, position: int, count: int) -> None:
        """Let the draft draw noise from a position on, behind what it is doing."""
        if self._noise is not None and self._seat is not None and self._mode is not Mode.PLAIN:
            noise = self._noise
            self._earlier.append(self._seat.start(lambda draft: draft.draw_ahead(noise, position, count)))

    def _wait_earlier(self, span: str) -> None:
        """Wait for what the draft was given to do besides; it is lost if it failed at that."""
        jobs, self._earlier = self._earlier, []
        if not jobs or self._seat is None:
            return
        try:
            with self._log.span(span):
                for job in jobs:
                    self._seat.finish(job)
        except DraftError as error:
            self._lose_draft(error)

    def _prefill(self) -> tuple[int, ...]:
        """Run the prompt and commit its first answer token; nothing if cancelled on the way."""
        sequence, logits = self._sequence, None
        while logits is None and self._goes_on():
            waiting = sequence.tokens[sequence.cached :]
            with self._log.span("prefill"):
                rows, logits = self._target.prefill(waiting, sequence.cached, self._shape.prefill_chunk)
                if logits is not None:
                    logits.wait()  # the device may have the whole prompt before it
            self._note_states(sequence.cached)
            sequence.cached += rows
            self.prefill_passes += 1
        self.prefill_spans = self._log.take()
        if logits is None:
            return ()
        return self._commit((self._choose(logits, 0, len(sequence)),))

    # One round.

    @property
    def _room(self) -> int:
        """How many tokens may still be committed."""
        return min(self._stopping.left, self._sequence.room)

    def _propose(self) -> tuple[Ints, LaunchedProposal | None]:
        """Return the window: the last token, and what the draft says comes next; any ids for what is coming still."""
        prepared, self._prepared = self._prepared, None
        count = min(self._shape.gamma, self._room - 1)
        last = self._sequence.tokens[-1:]
        if prepared is None and count > 0 and self._mode is not Mode.PLAIN:
            proposal = self._redraft(count)
            if isinstance(proposal, LaunchedProposal):
                self._drafts_are_launched = True
                return np.repeat(last, 1 + proposal.count), proposal
            prepared = proposal.tokens
            self._draft_spans.extend(proposal.spans)
        return np.concatenate([last, np.array((prepared or ())[:count], np.int64)]), None

    def _redraft(self, count: int) -> Proposal | LaunchedProposal:
        """Return a proposal made while the target waits."""
        self._wait_earlier("redraft" if self.rounds else "draft_prefill_wait")
        if self._mode is Mode.PLAIN or self._seat is None:
            return Proposal(())
        tokens, states = self._sequence.tokens, self._take_states()

        def propose(draft: Draft) -> Proposal | LaunchedProposal:
            _deliver(draft, states)
            return draft.propose(tokens, count, self._noise)

        job: Job[Proposal | LaunchedProposal] = self._seat.start(propose)
        try:
            with self._log.span("redraft"):
                return self._seat.finish(job)
        except DraftError as error:
            self._lose_draft(error)
            return Proposal(())

    def _read(self, window: Ints, coming: LaunchedProposal | None) -> Ints:
        """Return the window once it is known; of one whose draft failed the last token, whose row is right anyway."""
        if coming is None or self._seat is None:
            return window
        try:
            with self._log.span("redraft"):
                proposal = self._seat.read(coming)
        except DraftError as error:
            self._lose_draft(error)
            return window[:1]
        self._draft_spans.extend(proposal.spans)
        return np.concatenate([window[:1], np.array(proposal.tokens, np.int64)])

    def _start_rollout(self, window: Ints) -> _Overlap | None:
        """Send the draft off to continue every likely outcome of this window."""
        # The next window has at most one token less than there is room for, and begins with x_0.
        depth = min(self._shape.gamma, self._room - 2)
        if self._mode is not Mode.MIRROR or self._seat is None or depth < 1:
            return None
        tokens, meeting, states = self._sequence.tokens, Meeting(), self._take_states()

        def roll_out(draft: Draft) -> Rollout:
            _deliver(draft, states)
            return draft.roll_out(tokens, window, depth, meeting, self._noise)

        return _Overlap(meeting, self._seat.start(roll_out))

    def _verify(self, window: Ints, overlap: _Overlap | None, state: ExitState | None) -> Outcome:
        """Run the target over the window, from the exit on if its prefix is under way, and compare."""
        try:
            logits = self._run_target(window, overlap, state)
            position = len(self._sequence)
            with self._log.span("verify"):
                outcome = verify(window.tolist(), lambda row: self._choose(logits, row, position + row))
        except BaseException:
            if overlap is not None:
                overlap.meeting.abandon()
            raise
        if overlap is not None:
            overlap.meeting.decide(outcome)
        return outcome

    def _run_target(self, window: Ints, overlap: _Overlap | None, state: ExitState | None) -> Logits:
        """Return the window's logits, once they are there; offer the exit's candidates on the way."""
        logits, self._ahead = self._ahead, None
        if logits is None:
            state = state or self._run_prefix(window)
            logits = self._serve_draft(state, overlap)
        with self._log.span("suffix"):
            if logits is None:
                assert state is not None
                logits = self._target.run_suffix(state)
            self._look_ahead(logits)
            logits.wait()
        return logits

    def _serve_draft(self, state: ExitState, overlap: _Overlap | None) -> Logits | None:
        """Give the draft what it wants of a pass under way; return the suffix's logits if that was launched with it."""
        if self._note_states(len(self._sequence) - 1) and overlap is not None:
            overlap.meeting.state(self._unseen[-1][1])
        if overlap is None or not self._shape.wants_exit:
            return None
        with self._log.span("exit_head"):
            candidates = self._target.run_exit_head(state)
            # Behind the exit head already: the device must not wait for the host that reads it.
            logits = self._target.run_suffix(state) if candidates.pending else None
            overlap.meeting.offer(candidates.read())
        return logits

    def _look_ahead(self, logits: Logits) -> None:
        """Where the next token is the likeliest, and alone, launch its pass before it is read: no device waits."""
        lone = self._mode is Mode.PLAIN and self._sampler.takes_likeliest and not self._shape.wants_states
        # One token comes of this pass, and there is no next one if it is the last.
        if lone and self._room > 1 and logits.unread is not None:
            logits.fetch()
            self._ahead = self._target.run_ahead(logits, len(self._sequence))

    def _note_states(self, start: int) -> bool:
        """Keep the last prefix pass's states for a draft that is fed by them; return whether it is."""
        if self._seat is None or not self._shape.wants_states:
            return False
        self._unseen.append((start, self._target.exit_states()))
        return True

    def _take_states(self) -> list[tuple[int, Floats]]:
        states, self._unseen = self._unseen, []
        return states

    def _run_prefix(self, window: Ints, coming: LaunchedProposal | None = None) -> ExitState:
        with self._log.span("prefix"):
            return self._target.run_prefix(window, len(self._sequence) - 1, coming)

    def _choose(self, logits: Logits, row: int, position: int) -> int:
        token = self._sampler.choose_row(logits, row, position)
        self._sampler.see(token)
        return token

    def _commit(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Append the tokens that count and note whether they end the answer."""
        kept, self.finish_reason = self._stopping.cut(tokens[: self._sequence.room])
        self._sequence.append(kept)
        if self.finish_reason is None and self._sequence.room == 0:
            self.finish_reason = FinishReason.LENGTH
        return kept

    def _collect(self, overlap: _Overlap | None, outcome: Outcome) -> Rollout | None:
        """Wait for the rollout and take over the branch that fits, if any."""
        if overlap is None or self._seat is None:
            return None
        if self.finish_reason is not None:
            overlap.meeting.abandon()
        try:
            with self._log.span("rollout_wait"):
                rollout = self._seat.finish(overlap.job)
        except DraftError as error:
            self._lose_draft(error)
            return None
        self._draft_spans.extend(rollout.spans)
        self._prepared = rollout.find(outcome)
        return rollout

    def _note(self, begun: _Begun, window: Ints, outcome: Outcome, committed: int, rollout: Rollout | None) -> None:
        wanted = rollout is not None and self.finish_reason is None
        self.rounds.append(
            Round(
                mode=begun.mode,
                proposed=window.size - 1,
                accepted=outcome.accepted,
                committed=committed,
                reused=self._prepared is not None if wanted else None,
                branches=len(rollout.branches) if rollout is not None else 0,
                start_s=begun.start_s,
                end_s=time.perf_counter(),
                spans=self._log.take() + tuple(self._draft_spans),
            )
        )
        self._draft_spans.clear()

    def _lose_draft(self, error: DraftError) -> None:
        self._mode = Mode.PLAIN
        self._prepared = None
        self.events.append(Event("draft_lost", str(error)))

    def _let_draft_end(self) -> None:
        """Wait until the draft's thread is idle, so that the next generation finds it so."""
        if self._seat is not None and self._seat.lost is None:
            try:
                states = self._take_states()
                self._seat.finish(self._seat.start(lambda draft: _deliver(draft, states)))
            except DraftError as error:
                self._lose_draft(error)


def _deliver(draft: Draft, states: list[tuple[int, Floats]]) -> None:
    """Give a draft, on its own thread, the exit states that it has not seen yet."""
    for start, values in states:
        draft.see_states(start, values)
