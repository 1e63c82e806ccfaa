"""How the command line speaks: data on stdout, everything else on stderr.

Errors are one `error:` line and, where the message ends with what to do, one `hint:` line. Nothing
here knows what an engine or an export is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from mirror.errors import MirrorError


def print_error(error: BaseException) -> None:
    """Print an error and its hint: what follows the last semicolon of a message says what to do."""
    found, separator, remedy = str(error).rpartition("; ")
    if not isinstance(error, MirrorError):
        found, separator = f"{type(error).__name__}: {error}", "; "
        remedy = "mirror did not expect this; run again with --debug and report the traceback"
    click.echo(f"error: {found if separator else remedy}", err=True)
    if separator:
        click.echo(f"hint: {remedy}", err=True)


def print_notice(text: str) -> None:
    """Print something that the user should know and need not act on."""
    click.echo(f"notice: {text}", err=True)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(to_json(value), ensure_ascii=False, indent=2))


def to_json(value: Any) -> Any:
    """Return records, enums, paths and numpy numbers as JSON values, with their field names as keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    number = getattr(value, "item", None)  # numpy's way from a scalar to Python
    return number() if callable(number) else value


def print_statistics(statistics: Any, finish_reason: str) -> None:
    """Print the statistics block on stderr: every figure by its own name, but for steps that weren't taken."""
    lines = [("finish_reason", finish_reason), *_figures(to_json(statistics))]
    width = max(len(name) for name, _ in lines)
    click.echo("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in lines), err=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under column heads on stdout, plain where stdout is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, highlight=False)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width; what reads it wants whole rows.
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)


def size(count: int) -> str:
    """Return a number of bytes as people read it, in powers of 1000."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def quiet_libraries(*, bars: bool) -> None:
    """Keep libraries that an export loads from talking over its progress; call before they are imported.

    Args:
        bars: whether their own bars stay, as for downloads from a hub.
    """
    # ONNX Runtime's quantizer configures the root logger at INFO on import, unless it is configured.
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    # Graphs are traced and cut without their weights, of which onnx_ir warns weight by weight.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    if not bars:
        os.environ.setdefault("TQDM_DISABLE", "1")


class ExportProgress:
    """Bars on stderr for the stages of an export, one below the other."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=Console(stderr=True))
        self._current: TaskID | None = None

    def __enter__(self) -> ExportProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._complete()
        self._bars.stop()

    def start(self, stage: str, total: int | None) -> None:
        """Begin a bar; the stage before it is done."""
        self._complete()
        self._current = self._bars.add_task(stage, total=total)

    def advance(self, amount: int) -> None:
        """Move the current bar on by so many bytes."""
        if self._current is not None:
            self._bars.advance(self._current, amount)

    def _complete(self) -> None:
        if self._current is not None:
            self._bars.update(self._current, total=1, completed=1)


def _figures(statistics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in statistics.items():
        if isinstance(value, Mapping):
            yield from _figures(value)
        elif value is not None and not (name.endswith("_ms") and value == 0):
            yield name, _figure(name, value)


def _figure(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if name.endswith("_rate") or name == "draft_hidden":
        return f"{value:.1%}"
    if name.endswith("_ms"):
        return f"{value:.2f}"
    return f"{value:.3f}" if name.endswith("_s") and not name.endswith("_per_s") else f"{value:.2f}"
