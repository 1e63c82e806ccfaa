"""How training tells what it is doing; the command line draws it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class DistillProgress(Protocol):
    """Receives the stages of a training, one after the other."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` is its size in `advance` units, None where it is not known."""
        ...

    def advance(self, amount: int) -> None:
        """So many units more of the current stage are done."""
        ...

    def report(self, figures: Mapping[str, float]) -> None:
        """Figures of the current stage: losses, coverage, tokens per round, tokens/s."""
        ...


class SilentProgress:
    """A `DistillProgress` that says nothing."""

    def start(self, stage: str, total: int | None) -> None:
        """Ignore the stage."""

    def advance(self, amount: int) -> None:
        """Ignore the amount."""

    def report(self, figures: Mapping[str, float]) -> None:
        """Ignore the figures."""
