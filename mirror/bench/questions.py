"""Questions of a benchmark in Spec-Bench's format: JSON lines with `question_id`, `category` and `turns`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mirror.errors import RequestError

# MT-bench's kinds have ten questions each, the other categories eighty: as one they weigh as much as another.
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True)
class Question:
    """The first turn of one question; `category` groups results."""

    number: int
    category: str
    text: str


def read_questions(path: Path, per_category: int | None = None) -> tuple[Question, ...]:
    """Return questions, category by category, evenly spaced within each.

    Args:
        per_category: how many of each category; None for all.

    Raises:
        RequestError: the file isn't there, or a line is no question.
    """
    if not path.is_file():
        raise RequestError(f"no questions at {path}; give a JSONL file with question_id, category and turns")
    groups: dict[str, list[Question]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        question = _question(path, number, line)
        groups.setdefault(question.category, []).append(question)
    return tuple(question for group in groups.values() for question in _spaced(group, per_category))


def with_preface(questions: Sequence[Question], others: Sequence[Question], characters: int) -> tuple[Question, ...]:
    """Return the questions, each after so much text of other ones: the same answers to find in a long context."""
    texts = "\n\n".join(other.text for other in others)
    step = max(1, len(texts) // max(1, len(questions)))
    turned = (texts[place * step :] + "\n\n" + texts[: place * step] for place in range(len(questions)))
    return tuple(
        replace(question, text=f"{text[:characters]}\n\n{question.text}") if characters else question
        for question, text in zip(questions, turned, strict=True)
    )


def _question(path: Path, number: int, line: str) -> Question:
    try:
        item = json.loads(line)
        category = "mt_bench" if item["category"] in MT_BENCH else item["category"]
        return Question(int(item["question_id"]), category, item["turns"][0])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RequestError(
            f"{path}, line {number} is no question ({error!r}); each line needs question_id, category and turns"
        ) from error


def _spaced(group: Sequence[Question], count: int | None) -> Sequence[Question]:
    if count is None or count >= len(group):
        return group
    return [group[index * len(group) // count] for index in range(count)]
