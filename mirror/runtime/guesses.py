"""Tokens that a draft's pass gives, and that its next pass reads: on the host, or still on a device's way.

A device that only launches passes need not be waited for between two of them: the next one's ids are copied from
the last one's output where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from mirror.runtime.records import Ints
from mirror.targets.base import DeviceTensor, Fetched, FollowOn, GivenIds


class Guess(Protocol):
    """`count` tokens of each of some branches."""

    @property
    def branches(self) -> int:
        """How many branches."""
        ...

    @property
    def count(self) -> int:
        """Tokens of each."""
        ...

    def known(self) -> Ints | None:
        """Return the tokens, int64 `[branches, count]`, None while they are on a device's way."""
        ...

    def fetch(self) -> Guess:
        """Return the same tokens, on their way to the host."""
        ...

    def tokens(self) -> Ints:
        """Return the tokens, int64 `[branches, count]`; wait for them, once, if they were fetched."""
        ...

    def follow(self, ids: Ints, stride: int) -> FollowOn | None:
        """Return ids `[1, width]` with these tokens in them, a branch every `stride`; None if they are there."""
        ...

    def some(self, first: int, count: int) -> Guess:
        """Return those of `count` branches from the `first`-th on."""
        ...


@dataclass(frozen=True)
class Known:
    """Tokens on the host, int64 `[branches, count]`."""

    values: Ints

    @property
    def branches(self) -> int:
        """How many branches."""
        return int(self.values.shape[0])

    @property
    def count(self) -> int:
        """Tokens of each."""
        return int(self.values.shape[1])

    def known(self) -> Ints:
        """Return the tokens."""
        return self.values

    def fetch(self) -> Known:
        """Return itself."""
        return self

    def tokens(self) -> Ints:
        """Return the tokens."""
        return self.values

    def follow(self, ids: Ints, stride: int) -> FollowOn | None:
        """Return None: the ids hold them already."""
        return None

    def some(self, first: int, count: int) -> Known:
        """Return some branches'."""
        return Known(self.values[first : first + count])


@dataclass(frozen=True)
class Launched:
    """Tokens of a pass that was launched.

    Attributes:
        given: int64 `[1, n]`, the pass's output, from `first` on each branch's tokens after the last's.
        fetched: the same on its way to the host.
    """

    given: DeviceTensor
    branches: int
    count: int
    first: int = 0
    fetched: Fetched | None = None

    def known(self) -> None:
        """Return None: a device has them."""

    def fetch(self) -> Launched:
        """Start to bring the tokens to the host, before a later pass writes over them."""
        return replace(self, fetched=self.given.fetch())

    def tokens(self) -> Ints:
        """Wait for the tokens."""
        values = self.given.numpy() if self.fetched is None else self.fetched()
        values = values[0, self.first : self.first + self.branches * self.count]
        found: Ints = values.reshape(self.branches, self.count)
        return found

    def follow(self, ids: Ints, stride: int) -> FollowOn | None:
        """Return ids that are completed where the pass ran, or by who takes them."""
        return FollowOn(ids, (GivenIds(self.given, self.first, 0, self.branches, self.count, stride),))

    def part(self, place: int, stride: int) -> GivenIds:
        """Return ids from a place on that are completed by what was fetched, for whoever may not look where it was."""
        assert self.fetched is not None, "a later pass may have written over it"
        return GivenIds(self.fetched, self.first, place, self.branches, self.count, stride)

    def some(self, first: int, count: int) -> Launched:
        """Return some branches'."""
        return Launched(self.given, count, self.count, self.first + first * self.count)
