"""A chat template as data: derived from what the template renders, and kept only where it holds.

Templates are Jinja programs, which a host in C++ or C# would need an interpreter for. Most of them put a fixed
text between two messages, which depends on their roles alone. Those texts are read off a few renderings; then the
template and the texts must agree on conversations of many shapes, with contents chosen to find out where the
template looks into them. Conversations are those that chats consist of: a system message or none, then user and
assistant in turn, the user last.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from mirror.bundle import DATE_MARK, ChatFormat
from mirror.errors import RequestError

# Its annotations don't say that further names are the template's variables.
_render: Any = render_jinja_template

START, ANSWER = "start", "answer"
ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]

_MARKS = ("First-1-mark", "Second-2-mark", "Third-3-mark")
_TURNS = 4  # of the user, in the longest conversation that is compared
_DAYS = (datetime.date(1999, 12, 31), datetime.date(2087, 5, 4))  # on both of which a format must hold
_DATE_PATTERN = re.compile(r"(%[dbBymYaAj]|[ ,./-])+")
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^']*)'|"([^"]*)["])\s*\)""")
# Put before a template, this tells it the day.
_DAY = "{% macro strftime_now(pattern) %}{{ mirror_today }}{% endmacro %}"
_PLAIN = ("a", "One line.", "Two\n\nlines, {{ braces }} & 'quotes'", "ünïcode 漢字 😀 <b>", "many words " * 500 + "end")
_PADDED = ("  spaces around \t", "\n\nlines around\n", "\u00a0odd spaces\u3000")
_LITERAL = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)["]""")


def chat_format(folder: Path) -> ChatFormat | None:
    """Return the chat template of a bundle folder as data, None where it has none or fixed texts don't tell it."""
    config = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    return derive(source, _special_tokens(config)) if isinstance(source, str) else None


def derive(source: str, special_tokens: Mapping[str, str]) -> ChatFormat | None:
    """Return a template as data, None where fixed texts between messages don't tell it.

    Args:
        source: the template.
        special_tokens: those that it may name (`bos_token`, `eos_token`, ...).
    """
    template = _Template(source, special_tokens)
    found = _joins(template)
    dates = {one or other for one, other in _DATE_CALL.findall(source)}
    if found is None or len(dates) > 1 or not all(map(_DATE_PATTERN.fullmatch, dates)):
        return None
    date = next(iter(dates), None)
    candidates = itertools.product((False, True), repeat=len(ROLES))
    trims = (tuple(role for role, cut in zip(ROLES, cuts, strict=True) if cut) for cuts in candidates)
    for trimmed in trims:
        form = ChatFormat(found, trimmed, (), empty=True, date=date)
        if _hold(template, form, (*_PLAIN, *_PADDED)):
            return _with_limits(template, form, source)
    return None


def render(form: ChatFormat, messages: Sequence[Message], today: str = "") -> str:
    """Return messages as prompt text by a chat format; every host does the same.

    Args:
        today: the date as the format's pattern writes it.

    Raises:
        RequestError: the format doesn't cover them.
    """
    if not messages:
        raise RequestError("the list of messages is empty; pass at least one with a role and a content")
    text, before = "", START
    for message in messages:
        role, content = message["role"], message["content"]
        content = content.strip() if role in form.trimmed else content
        _check_content(form, content)
        text += _join(form, before, role, today) + content
        before = role
    return text + _join(form, before, ANSWER, today)


def _check_content(form: ChatFormat, content: str) -> None:
    odd = next((text for text in form.refused if text in content), None)
    if odd is not None:
        raise RequestError(
            f"a message holds {odd!r}, which the model's chat template treats in a way of its own; render the template "
            "and pass the prompt as text"
        )
    if not form.empty and not content.strip():
        raise RequestError("a message is empty, and the model's chat template has its own way with that; leave it out")


def _join(form: ChatFormat, before: str, after: str, today: str) -> str:
    text = form.joins.get(before, {}).get(after)
    if text is None:
        raise RequestError(
            f"the bundle's chat format has no {after} after {before}; its messages are an optional system, then user "
            "and assistant in turn, the user last"
        )
    return text if form.date is None else text.replace(DATE_MARK, today)


class _Template:
    """The real thing: transformers' rendering of a template, on a day of our choice.

    Attributes:
        today: what stands for the date.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = _DAY + source if _DATE_CALL.search(source) else source
        self._special_tokens = special_tokens
        self.today = DATE_MARK

    def render(self, messages: Sequence[Message]) -> str | None:
        """Return the prompt text, None where the template refuses the messages."""
        try:
            rendered, _ = _render(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._source,
                add_generation_prompt=True,
                mirror_today=self.today,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError):
            return None
        text: str = rendered[0]
        return text


def _joins(template: _Template) -> dict[str, dict[str, str]] | None:
    """Return the texts between marked messages; a system message only where the template takes one."""
    turns = _between(template, ("user", "assistant", "user"))
    if turns is None:
        return None
    joins = {
        START: {"user": turns[0]},
        "user": {"assistant": turns[1], ANSWER: turns[3]},
        "assistant": {"user": turns[2]},
    }
    system = _between(template, ("system", "user"))
    if system is not None:
        joins[START]["system"] = system[0]
        joins["system"] = {"user": system[1]}
    return joins


def _between(template: _Template, roles: Sequence[str]) -> list[str] | None:
    """Return what stands before, between and after the contents of messages of these roles."""
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=False)]
    rendered = template.render(messages)
    if rendered is None:
        return None
    parts = []
    for message in messages:
        before, mark, rendered = rendered.partition(message["content"])
        if not mark:
            return None
        parts.append(before)
    return [*parts, rendered]


def _conversations(form: ChatFormat, contents: Sequence[str]) -> Iterator[list[Message]]:
    """Yield conversations of every shape, each content once in every place."""
    for system, turns in itertools.product((False, True), range(1, _TURNS + 1)):
        if system and "system" not in form.joins:
            continue
        roles = [*(("system",) if system else ()), *(("user", "assistant") * turns)[:-1]]
        for shift in range(len(contents)):
            yield [{"role": role, "content": contents[(shift + n) % len(contents)]} for n, role in enumerate(roles)]


def _hold(template: _Template, form: ChatFormat, contents: Sequence[str]) -> bool:
    """Return whether template and format agree on all conversations of some contents, whatever the day."""
    for day in _DAYS[: 1 if form.date is None else None]:
        template.today = day.strftime(form.date or "")
        if not all(_agree(template, form, item) for item in _conversations(form, contents)):
            return False
    return True


def _agree(template: _Template, form: ChatFormat, messages: Sequence[Message]) -> bool:
    return template.render(messages) == render(form, messages, template.today)


def _with_limits(template: _Template, form: ChatFormat, source: str) -> ChatFormat:
    """Return the format with what it doesn't cover: texts that the template itself names, and empty contents."""
    places = ("{}", "before {}", "{} after", "before {} after")
    refused = [
        text
        for text in _literals(source)
        if not all(_covers(template, form, place.replace("{}", text)) for place in places)
    ]
    empty = all(_covers(template, form, text) for text in ("", " \n"))
    return dataclasses.replace(form, refused=tuple(refused), empty=empty)


def _covers(template: _Template, form: ChatFormat, content: str) -> bool:
    """Return whether a content may stand in any one place."""
    return _hold(template, form, (content, *("plain",) * (2 * _TURNS)))


def _literals(source: str) -> list[str]:
    """Return the strings that a template names, without the white space around them, each once."""
    found = (one or other for one, other in _LITERAL.findall(source))
    unescaped = (text.replace("\\n", "\n").strip() for text in found)
    return list(dict.fromkeys(text for text in unescaped if text))


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _special_tokens(config: Mapping[str, Any]) -> Mapping[str, str]:
    texts = {name: item.get("content") if isinstance(item, Mapping) else item for name, item in config.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}
