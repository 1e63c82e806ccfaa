"""One answer, or a conversation, on the terminal: streams text, reports, and obeys Ctrl-C.

Text goes to stdout as its tokens commit; notices and statistics go to stderr.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from mirror.console import print_error, print_json, print_notice, print_statistics
from mirror.errors import MirrorError

if TYPE_CHECKING:
    from mirror.runtime.engine import Engine, Result

EXIT_INTERRUPTED = 130
CHAT_HELP = "Ctrl-C cancels the answer; /reset forgets the conversation; /exit or Ctrl-D leaves"
UNTUNED_TIP = (
    "draft and target share one device, where drafting may cost more than it saves; `mirror tune BUNDLE` measures it "
    "and keeps the fastest mode, --mode plain leaves the draft out"
)


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is generated, with the names of `Engine.generate`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]
    num_assistant_tokens: int | None = None


@dataclass(frozen=True)
class OutputOptions:
    """What is shown besides the text.

    `untuned`: whether the mode was chosen without a measurement, so that a tip may follow the statistics.
    """

    as_json: bool
    statistics: bool
    trace: Path | None
    untuned: bool = False


def answer(engine: Engine, prompt: str, options: AnswerOptions, output: OutputOptions, *, chat_template: bool) -> int:
    """Generate one answer, print it, and return the exit code."""
    with cancel_on_interrupt(engine) as interrupt:
        result = engine.generate(
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            stop=options.stop,
            num_assistant_tokens=options.num_assistant_tokens,
            streamer=interrupt.silent if output.as_json else interrupt.write,
            apply_chat_template=chat_template,
        )
    if output.as_json:
        print_json(result.to_json())
    else:
        interrupt.write_rest(result.text or "")
    report(result, output)
    return EXIT_INTERRUPTED if result.finish_reason.value == "cancelled" else 0


def converse(engine: Engine, first: str | None, options: AnswerOptions, output: OutputOptions) -> int:
    """Answer turn by turn until the user leaves; the KV cache stays between turns. Return the exit code."""
    conversation = engine.conversation()
    print_chat_help()
    for line in read_turns(first):
        if line == "/reset":
            conversation = engine.conversation()
            print_notice("the conversation starts anew")
            continue
        with reported_errors(), cancel_on_interrupt(engine) as interrupt:
            result = conversation.say(
                line,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
                repetition_penalty=options.repetition_penalty,
                seed=options.seed,
                stop=options.stop,
                num_assistant_tokens=options.num_assistant_tokens,
                streamer=interrupt.write,
            )
            interrupt.write_rest(result.text or "")
            report(result, output)
    return 0


def read_turns(first: str | None) -> Iterator[str]:
    """Yield what the user says, line by line, until `/exit` or the end of input."""
    if first is not None:
        yield first
    while (line := read_line()) is not None and line != "/exit":
        if line:
            yield line


def read_line() -> str | None:
    """Return the next line without its surrounding space, None at the end of input."""
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        click.echo(err=True)
        print_chat_help()
        return ""


def print_chat_help() -> None:
    """Say how to leave, to a person only."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() history and line editing)
        print_notice(CHAT_HELP)


class Interrupt:
    """Whether Ctrl-C came. Its streamers end the answer then, and keep count of what was written."""

    def __init__(self) -> None:
        self.came = False
        self._written = 0

    def write(self, text: str) -> bool:
        """Put a piece of the answer on stdout at once."""
        click.echo(text, nl=False)
        self._written += len(text)
        return self.came

    def write_rest(self, text: str) -> None:
        """Put on stdout what the whole answer has beyond the pieces, and a last newline."""
        click.echo(text[self._written :], nl=not text.endswith("\n"))

    def silent(self, text: str) -> bool:
        """Keep a piece for the result."""
        return self.came


def report(result: Result, output: OutputOptions) -> None:
    """Print what follows the text: events, statistics and the trace."""
    for event in result.events:
        print_notice(event.message)
    if output.statistics:
        print_statistics(result.statistics, result.finish_reason.value)
        if output.untuned and len(set(result.devices.values())) == 1:
            print_notice(UNTUNED_TIP)
    if output.trace is not None:
        output.trace.write_text(json.dumps(result.trace()), encoding="utf-8")


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print an error of one turn and let the conversation go on."""
    try:
        yield
    except MirrorError as error:
        print_error(error)


@contextlib.contextmanager
def cancel_on_interrupt(engine: Engine) -> Iterator[Interrupt]:
    """Let Ctrl-C end the answer after the round under way; a second one interrupts at once."""
    interrupt = Interrupt()

    def cancel(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        # Both: a cancel before the first round would be forgotten, and a streamer is called only with text.
        interrupt.came = True
        engine.cancel()

    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
