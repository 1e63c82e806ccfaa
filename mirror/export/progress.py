"""How long work tells what it is doing; the command line draws bars from it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the stages of an export, one after the other."""

    def start(self, stage: str, total: int | None) -> None:
        """A stage begins; `total` is its size in bytes, None where it is not known."""
        ...

    def advance(self, amount: int) -> None:
        """So many bytes more of the current stage are done."""
        ...


class Silent:
    """A `Progress` that says nothing."""

    def start(self, stage: str, total: int | None) -> None:
        """Ignore the stage."""

    def advance(self, amount: int) -> None:
        """Ignore the amount."""
