"""What an answer is: the result, the stream that makes it, and who may listen."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

from mirror.runtime.records import Event, FinishReason, Lane, Round, Span
from mirror.runtime.statistics import Statistics
from mirror.runtime.text import TextStream
from mirror.runtime.trace import chrome_trace

T = TypeVar("T", covariant=True)


class TextSink(Protocol):
    """A streamer with methods: `write` gets each piece, True from it stops; `end` is called once."""

    def write(self, text: str) -> bool | None:
        """Take a piece of text."""
        ...

    def end(self) -> None:
        """The text is over."""
        ...


Streamer = Callable[[str], bool | None] | TextSink


@dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
        tokens: the answer's tokens, the end token included.
        text: the answer, None for token-level calls.
        prompt_tokens: how many tokens the prompt had.
        events: what went wrong on the way without harming the text.
        rounds: every round as it went.
        prefill_spans: the times of the passes over the prompt.
        devices: the device of each lane, for `trace`.
    """

    tokens: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    statistics: Statistics
    events: tuple[Event, ...]
    rounds: tuple[Round, ...]
    prefill_spans: tuple[Span, ...]
    devices: Mapping[Lane, str]

    def to_json(self) -> dict[str, Any]:
        """Return text, tokens, finish reason, statistics and events as plain JSON values."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason.value,
            "statistics": asdict(self.statistics),
            "events": [asdict(event) for event in self.events],
        }

    def trace(self) -> dict[str, Any]:
        """Return a timeline of every round as Chrome trace events."""
        return chrome_trace(self.prefill_spans, self.rounds, self.devices)


class Stream(Generic[T]):
    """An answer being made: iterate for its pieces; close it to stop.

    Attributes:
        result: the answer, once the iterator has ended or was closed; None before.
    """

    def __init__(self, pieces: Generator[T, None, None], answer: Answer) -> None:
        self._pieces = pieces
        self._answer = answer

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._pieces)

    def close(self) -> None:
        """Stop; what was committed stays in `result`."""
        self._pieces.close()

    @property
    def result(self) -> Result | None:
        """The answer, None while it is being made."""
        return self._answer.result


class Answer:
    """What an answer has so far, shared by the iterator that makes it and whoever wants the result."""

    def __init__(self, text: TextStream | None) -> None:
        self.tokens: list[int] = []
        self.text = text
        self.result: Result | None = None
        self.commits: Generator[tuple[int, ...], None, None] | None = None
        self._pieces: list[str] = []

    def watch(self, tokens: ListLike[int]) -> int | None:
        """Take committed tokens; return how many count if they complete a stop string."""
        assert self.text is not None
        before = self.text.kept_tokens
        self._pieces.append(self.text.push(tokens))
        return self.text.kept_tokens - before if self.text.stopped else None

    def take_text(self) -> str:
        """Return the text that has settled since the last call."""
        taken = "".join(self._pieces)
        self._pieces.clear()
        return taken
