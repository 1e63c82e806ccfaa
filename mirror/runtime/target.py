"""The target on its device: three segments, two caches, one pass at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mirror.runtime.feeds import FeedPool, chunk_width, fit_width
from mirror.runtime.logits import Logits
from mirror.runtime.proposal import LaunchedProposal
from mirror.runtime.records import Candidates, Floats, Ints
from mirror.targets.base import Fetched, FollowOn, GivenIds, KVCache, LoadedSegment, Tensor, to_host


@dataclass(frozen=True)
class TargetSegments:
    """The target's graphs with their caches: prefix and exit head on one device, the suffix there or on another.

    Attributes:
        apart: whether they are on two devices; the exit layer's state then goes through host memory.
    """

    prefix: LoadedSegment
    exit_head: LoadedSegment
    suffix: LoadedSegment
    prefix_cache: KVCache
    suffix_cache: KVCache
    apart: bool = False

    @functools.cached_property
    def widths(self) -> tuple[int, ...] | None:
        """The widths that prefix and suffix both take, ascending; None when they take any."""
        fixed = [set(part.widths) for part in (self.prefix, self.suffix) if part.widths is not None]
        return tuple(sorted(set.intersection(*fixed))) if fixed else None


@dataclass(frozen=True)
class ExitState:
    """A pass between prefix and suffix: the exit layer's state, on the prefix's device.

    Attributes:
        feeds: the pass's inputs with `hidden_states` [1, width, hidden].
        rows: real rows; the others are padding.
    """

    feeds: Mapping[str, Tensor]
    past_length: int
    rows: int
    width: int


@dataclass(frozen=True)
class ExitCandidates:
    """What the exit head says of a pass.

    Attributes:
        ids, logprobs: [1, width, top], when they are there.
        rows: real rows.
        pending: whether the suffix can be launched, and should be, before anyone waits for them.
    """

    ids: Fetched
    logprobs: Fetched
    rows: int
    pending: bool

    def read(self) -> Candidates:
        """Wait for the candidates of each real row."""
        return Candidates(self.ids()[0, : self.rows], self.logprobs()[0, : self.rows])


def _sent(tensor: Tensor) -> Fetched:
    """Return a tensor on its way to the host."""
    return (lambda: tensor) if isinstance(tensor, np.ndarray) else tensor.fetch()


class Target:
    """Runs passes over tokens; keeps no count of them (the sequence does).

    Args:
        capacity: slots of the caches.
        max_positions: positions that the model knows.
        pinned_width: the width of every pass but prefill's, and of its logits; None lets it vary.
    """

    def __init__(
        self, segments: TargetSegments, *, capacity: int, max_positions: int, pinned_width: int | None
    ) -> None:
        self._segments = segments
        self._capacity = capacity
        self._pinned_width = pinned_width
        self._pool = FeedPool(capacity, max_positions)
        self._rows = np.arange(capacity, dtype=np.int64)
        self._last: ExitState | None = None

    @property
    def launches(self) -> bool:
        """Whether the last pass was only launched: another can follow it, and the host is free meanwhile."""
        return self._last is not None and not isinstance(self._last.feeds["hidden_states"], np.ndarray)

    def run_prefix(self, tokens: Ints, past_length: int, coming: LaunchedProposal | None = None) -> ExitState:
        """Run the layers below the exit over a window, int64 [n]; write slots `past_length..`.

        Args:
            coming: what the window's tokens behind the first will be, whatever `tokens` has in their place.
        """
        rows = tokens.shape[0]
        return self._prefix(tokens, past_length, fit_width(self._segments.widths, self._pinned_width or rows), coming)

    def exit_states(self) -> Floats:
        """Return a host copy of the last prefix pass's states, `[rows, hidden]`, its real rows alone."""
        assert self._last is not None, "no prefix has run yet"
        states: Floats = to_host(self._last.feeds["hidden_states"])[0, : self._last.rows].copy()
        return states

    def run_exit_head(self, state: ExitState) -> ExitCandidates:
        """Return the exit's candidates for each real row of a pass; a device may be computing them still."""
        outputs = self._segments.exit_head.run(state.feeds, None, state.past_length)
        ids, logprobs = (_sent(outputs[name]) for name in ("candidate_ids", "candidate_logprobs"))
        launched = not isinstance(outputs["candidate_ids"], np.ndarray)
        return ExitCandidates(ids, logprobs, state.rows, pending=launched and not self._segments.apart)

    def run_suffix(self, state: ExitState) -> Logits:
        """Return the logits of each row, real ones first; a device may be computing them still."""
        # Pinned: the LM head too must run on the same number of rows in every pass.
        first, last = 0, (state.width if self._pinned_width else state.rows)
        return self._suffix(state, first, last)

    def run_ahead(self, logits: Logits, past_length: int) -> Logits | None:
        """Launch the pass over the likeliest token after a pass's first row, which the host has not read.

        That token must be on its way to the host already (`Logits.fetch`); no row of `logits` can be read any more.

        Args:
            past_length: slots that will be filled before it.

        Returns:
            The new pass's logits; None, and nothing was launched, where the host has to be waited for.
        """
        given = logits.unread
        if given is None or self._segments.apart:
            return None
        width = fit_width(self._segments.widths, self._pinned_width or 1)
        feeds = self._pool.at(width)
        feeds.fill_causal(np.zeros(1, np.int64), past_length)
        ids = FollowOn(feeds.ids, (GivenIds(given, first=0, place=0, groups=1, count=1, stride=1),))
        return self.run_suffix(self._launch_prefix({**feeds.tensors, "input_ids": ids}, past_length, 1, width))

    def prefill(self, tokens: Ints, past_length: int, chunk: int) -> tuple[int, Logits | None]:
        """Run one chunk of a prompt.

        Args:
            tokens: int64 [n], the prompt's tokens that the cache doesn't hold yet.
            past_length: slots filled before.
            chunk: the most rows of a pass.

        Returns:
            How many tokens were run, and the last one's logits, as row 0, if that was all.
        """
        rows, width = chunk_width(self._segments.widths, min(chunk, tokens.shape[0]), self._capacity - past_length)
        state = self._prefix(tokens[:rows], past_length, width)
        logits = self._suffix(state, rows - 1, rows)
        return rows, logits if rows == tokens.shape[0] else None

    def _prefix(self, tokens: Ints, past_length: int, width: int, coming: LaunchedProposal | None = None) -> ExitState:
        feeds = self._pool.at(width)
        feeds.fill_causal(tokens, past_length)
        tensors = feeds.tensors if coming is None else {**feeds.tensors, "input_ids": coming.follow(feeds.ids)}
        return self._launch_prefix(tensors, past_length, tokens.shape[0], width)

    def _launch_prefix(self, feeds: Mapping[str, Tensor], past_length: int, rows: int, width: int) -> ExitState:
        outputs = self._segments.prefix.run(feeds, self._segments.prefix_cache, past_length)
        self._last = ExitState({**feeds, "hidden_states": outputs["hidden_states"]}, past_length, rows, width)
        return self._last

    def _suffix(self, state: ExitState, first: int, last: int) -> Logits:
        feeds = {**state.feeds, "logit_rows": self._rows[first:last]}
        if self._segments.apart:
            feeds["hidden_states"] = to_host(state.feeds["hidden_states"])
        outputs = self._segments.suffix.run(feeds, self._segments.suffix_cache, state.past_length)
        return Logits(outputs["logits"], outputs.get("token_ids"))
