"""What is asked of the target: prompts from files, and prompts that the target makes up itself.

A target that was tuned on chats writes a user's turn when it is given an open one (Magpie,
arXiv 2406.08464): questions of its own training's kind, in any number. Passages it writes about
given topics become tasks on long texts: summaries, translations, questions with passages.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror.errors import ExportError
from mirror.prompt_files import read_prompt_file

_SENTINEL = "\u2063mirror\u2063"


@dataclass(frozen=True)
class Prompt:
    """One thing to ask; `kind` names where it came from."""

    kind: str
    text: str


class ChatFormat:
    """The target's chat template around one user turn, as token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = self._surroundings()

    def prompt(self, text: str) -> tuple[int, ...]:
        """Return the ids of a conversation of one user turn, open for the answer."""
        return self._ids(self._before + text.strip() + self._after)

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return what `prompt` does for every text; many at once go faster."""
        if not texts:
            return []
        whole = [self._before + text.strip() + self._after for text in texts]
        ids = self._tokenizer(whole, add_special_tokens=not self._tokenizer.chat_template).input_ids
        return [tuple(each) for each in ids]

    def open_turn(self, opening: str = "") -> tuple[int, ...]:
        """Return the ids that lead to a user's turn, for the target to write one from its opening words on."""
        return self._ids(self._before + opening)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=not self._tokenizer.chat_template).input_ids)

    def _surroundings(self) -> tuple[str, str]:
        if not self._tokenizer.chat_template:
            return "", "\n"
        messages = [{"role": "user", "content": _SENTINEL}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(_SENTINEL)
        if not found:
            raise ExportError("the target's chat template drops the user's message; training needs one that keeps it")
        return before, after


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a JSONL file; see `read_prompt_file`."""
    return [Prompt(path.stem, text) for text in read_prompt_file(path)]


OPENINGS = (
    "Who played", "Who wrote", "Who was the", "Who is the", "Who sings", "Who invented", "When did", "When was",
    "When is", "Where was", "Where is", "Where did", "Where does", "What is the", "What was the", "What are the",
    "What does", "What year did", "What kind of", "How many", "How did", "How long", "How does", "Which", "Why do",
    "Why did", "In what", "The", "Name the", "Explain", "Describe", "Write a", "Compose", "Imagine", "Pretend",
    "Compare", "Given", "If", "Suppose", "Can you", "Discuss", "Create a", "Develop a", "Draft", "Evaluate", "Extract",
    "A store", "There are",
)  # fmt: skip


def given_passages(prompts: Iterable[Prompt], least_words: int = 40) -> list[str]:
    """Return the passages that given prompts are about: the longest line of each that has one of so many words."""
    found = (max(prompt.text.split("\n"), key=len) for prompt in prompts)
    bare = (re.sub(r"^[A-Z][A-Za-z ]{2,20}: *", "", line).strip() for line in found)
    return list(dict.fromkeys(line for line in bare if len(line.split()) >= least_words))


def given_tasks(passages: Sequence[str], questions: Sequence[str], count: int, seed: int) -> list[Prompt]:
    """Return so many tasks on given passages: summaries and questions by turns, on one to three passages each."""
    source = random.Random(f"given {seed}")
    tasks = []
    for number in range(count if passages else 0):
        texts = source.sample(passages, min(len(passages), source.choice((1, 1, 2, 3))))
        if number % 2 == 0:
            tasks.append(Prompt("summarise", f"{source.choice(_SUMMARISE)} {chr(10).join(texts)}"))
            continue
        asked = _question(source.choice(texts), questions or ("What is this about?",), source)
        tasks.append(Prompt("answer", "\n".join([*texts, asked])))
    return tasks


def topics(prompts: Iterable[Prompt], count: int, seed: int) -> list[str]:
    """Return pairs of content words out of prompts, to write passages about."""
    words = sorted({word for prompt in prompts for word in re.findall(r"\b[a-z]{6,12}\b", prompt.text)})
    if not words:
        return []
    source = random.Random(f"topics {seed}")
    return [" and ".join(source.sample(words, min(2, len(words)))) for _ in range(count)]


def passage_requests(about: Sequence[str]) -> list[Prompt]:
    """Return prompts that make the target write passages to build tasks on, by turns of three kinds."""
    forms = (
        ("german", "Schreibe einen deutschen Satz aus einer Nachricht über: {}. Antworte nur auf Deutsch."),
        ("article", "Write a detailed news report of several paragraphs about {}, with names, places and quotes."),
        ("passage", "Write a factual encyclopedia paragraph about {}."),
    )
    return [Prompt(forms[i % 3][0], forms[i % 3][1].format(topic)) for i, topic in enumerate(about)]


def passage_tasks(passages: Sequence[Prompt], questions: Sequence[str], seed: int) -> list[Prompt]:
    """Return tasks on passages that the target wrote: translate, summarise, answer from passages."""
    source = random.Random(f"tasks {seed}")
    by_kind: dict[str, list[str]] = {"german": [], "article": [], "passage": []}
    for passage in passages:
        by_kind[passage.kind].append(passage.text)
    tasks = [Prompt("translate", f"{source.choice(_TRANSLATE)} {text}") for text in by_kind["german"]]
    tasks += [
        Prompt("summarise", f"{source.choice(_SUMMARISE)} {text}") for text in _longer(by_kind["article"], source)
    ]
    if questions:
        for text in by_kind["passage"]:
            parts = [text, *source.choices(by_kind["passage"], k=source.randint(1, 4))]
            source.shuffle(parts)
            tasks.append(Prompt("answer", "\n".join([*parts, _question(text, questions, source)])))
    return tasks


_TRANSLATE = (
    "Translate German to English:",
    "Translate from German into English:",
    "Translate this German text to English:",
)
_SUMMARISE = ("Summarize:", "Summarize the following article:", "Give a short summary of this text:")


def _longer(articles: list[str], source: random.Random) -> list[str]:
    """Return the articles, every other one followed by one or two more: long prompts occur too."""
    return ["\n".join([text, *source.choices(articles, k=i % 3)]) for i, text in enumerate(articles)]


def _question(passage: str, questions: Sequence[str], source: random.Random) -> str:
    subject = passage.split(".")[0].strip()[:80]
    return source.choice(
        (source.choice(questions), f"What do the texts say about this: {subject}?", f"Describe {subject}.")
    )
