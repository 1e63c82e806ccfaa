"""Prompts in files: JSON Lines, as instruction data and question sets come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mirror.errors import RequestError

_FIELDS = ("prompt", "instruction", "question")
_WANTED = "give a JSONL file with a prompt, instruction or question on every line"


def read_prompt_file(path: Path) -> list[str]:
    """Return the prompts of a file: each line's `prompt`, `instruction` or `question`, with its `input` if it has one.

    Raises:
        RequestError: the file isn't there or is no text, has no line, or a line is none (named by number).
    """
    if not path.is_file():
        raise RequestError(f"no prompts at {path}; {_WANTED}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); {_WANTED}") from error
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise RequestError(f"{path} is empty; {_WANTED}")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    record = _record(path, number, line)
    field = next((name for name in _FIELDS if isinstance(record.get(name), str)), None)
    if field is None:
        raise RequestError(
            f"{path}:{number} has none of the fields {', '.join(_FIELDS)}; give one of them on every line"
        )
    given = record.get("input") or next((item.get("input") for item in record.get("instances", [])), "")
    return f"{record[field]}\n{given}" if given else str(record[field])


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{number} is no JSON ({error.msg}); {_WANTED}") from error
    if not isinstance(record, dict):
        raise RequestError(f"{path}:{number} is no JSON object; {_WANTED}")
    return record
