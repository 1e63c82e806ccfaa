"""Chat templates as data: derived, held against the real renderings, and given up where they don't hold."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from mirror.bundle import ChatFormat
from mirror.errors import RequestError
from mirror.export.chat_format import chat_format, derive, render
from mirror.runtime.chat_template import ChatTemplate
from tests.vectors.generate import FOLDER, SPECIAL_TOKENS, TEMPLATES, chat_formats

DATED = "%d %b %Y"
CHATML = TEMPLATES["default-system"]


def derived(source: str) -> ChatFormat:
    form = derive(source, SPECIAL_TOKENS)
    assert form is not None
    return form


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_vectors_are_what_the_runtime_renders(name: str) -> None:
    template, covered = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS), 0
    for case in json.loads((FOLDER / "chat.json").read_text(encoding="utf-8")):
        if case["bundle"] == f"chat-{name}" and case["text"] is not None:
            # The runtime renders the day it is, the vectors one that they name.
            day = datetime.date(*case["today"]).strftime(DATED) if case["today"] else ""
            today = datetime.datetime.now().strftime(DATED)
            assert template.render(case["messages"]) == (case["text"].replace(day, today) if day else case["text"])
            covered += 1
    assert covered >= 3


def test_every_template_of_the_vectors_is_told_by_texts() -> None:
    assert chat_formats().keys() == TEMPLATES.keys()


def test_a_default_system_message_stands_before_the_user() -> None:
    form = derived(CHATML)
    assert form.joins["start"]["user"] == "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n"
    assert form.joins["start"]["system"] == "<|im_start|>system\n"
    assert (form.trimmed, form.refused, form.empty) == ((), (), True)


def test_what_a_template_looks_for_is_refused() -> None:
    assert derived(TEMPLATES["thoughts"]).refused == ("</think>",)
    loud = CHATML.replace("m['content']", "(m['content'] | upper if '/loud' in m['content'] else m['content'])")
    assert derived(loud).refused == ("/loud",)


def test_limits_of_contents() -> None:
    assert derived(TEMPLATES["headers"]).trimmed == ("system", "user", "assistant")
    assert "system" not in derived(TEMPLATES["no-system"]).joins
    assert not derived(TEMPLATES["filled"]).empty


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%H:%M') }}" + CHATML,
        "{{ strftime_now('%d') }} {{ strftime_now('%Y') }}" + CHATML,
        "{{ strftime_now('%d %b %Y')[:2] }}" + CHATML,
        "{% if strftime_now('%Y') > '2000' %}new{% endif %}" + CHATML,
        CHATML.replace("m['content']", "m['content'] | upper"),
        CHATML.replace("'<|im_end|>\n'", "loop.index | string"),
        "{{ messages | length }}" + CHATML,
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{{ m['content'] }}{% if loop.index > 5 %}!{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content[:40] }}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace('&', '&amp;') }}{% endfor %}",
    ],
)
def test_a_template_that_texts_dont_tell_is_given_up(source: str) -> None:
    assert derive(source, {}) is None


def test_the_date_is_filled_in_by_hosts() -> None:
    template = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    form = derived(template)
    assert form.date == "%d %b %Y"
    messages = [{"role": "user", "content": "What is {{date}}?"}]
    today = datetime.datetime.now().strftime(form.date)
    assert render(form, messages, today) == ChatTemplate(template).render(messages)


def test_what_is_not_covered_is_refused() -> None:
    form = derived(TEMPLATES["thoughts"])
    user = {"role": "user", "content": "x"}
    with pytest.raises(RequestError, match="no user after user"):
        render(form, [user, user])
    with pytest.raises(RequestError, match="no tool after start"):
        render(form, [{"role": "tool", "content": "x"}])
    with pytest.raises(RequestError, match="'</think>', which the model's chat template treats"):
        render(form, [user, {"role": "assistant", "content": "a</think>b"}, user])
    with pytest.raises(RequestError, match="list of messages is empty"):
        render(form, [])


def test_a_folder_is_read(tmp_path: Path) -> None:
    assert chat_format(tmp_path) is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<b>"}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES["headers"]}))
    form = chat_format(tmp_path)
    assert form is not None
    assert form.joins["start"]["user"].startswith("<b><|head|>user")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    other = chat_format(tmp_path)
    assert other is not None
    assert "Help." in other.joins["start"]["user"]
