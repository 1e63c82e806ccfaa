"""A draft's settings as one line of text, for benchmarks: `candidates=draft tokens_per_pass=1 fanout=4,2,1`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click

from mirror.runtime.candidates import CandidateSource
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode


def numbers(text: str) -> tuple[int, ...]:
    """Return comma-separated numbers.

    Raises:
        click.ClickException: it is something else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.ClickException(f"{text!r} is no list of numbers; write them like 8,4,2,1") from None


_READERS: Mapping[str, Callable[[str], Any]] = {
    "mode": Mode,
    "candidates": CandidateSource,
    "gamma": int,
    "kappa": int,
    "fanout": numbers,
    "tokens_per_pass": numbers,
    "branches_per_pass": numbers,
    "proposal_tokens_per_pass": numbers,
    "draft_context": int,
}


def read_settings(text: str, base: EngineOptions) -> EngineOptions:
    """Return options with the settings of a text in place of theirs.

    Raises:
        click.ClickException: a setting is unknown, or its value can't be read.
    """
    found = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if name not in _READERS or not equals:
            raise click.ClickException(f"{part!r} is no setting; write name=value, with {', '.join(_READERS)}")
        try:
            found[name] = _READERS[name](value)
        except ValueError as error:
            raise click.ClickException(f"{part!r} can't be read: {error}") from None
    return replace(base, **found)
