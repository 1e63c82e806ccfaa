"""Chat templates: a conversation as the text that a model was trained on.

Templates come with the model, so they are untrusted: they run in Jinja's immutable sandbox, with the
helpers and whitespace rules that Hugging Face templates are written for. Knows nothing of tokens.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mirror.errors import BundleError, RequestError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may name (`bos_token`, `eos_token`, ...)."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Return the template of a bundle folder, None when the model has none.

        `chat_template.jinja` wins over the `chat_template` key of `tokenizer_config.json`.

        Raises:
            BundleError: `tokenizer_config.json` or `special_tokens_map.json` isn't a JSON object.
        """
        config = _read_config(folder / SPECIAL_TOKENS_FILE) | _read_config(folder / CONFIG_FILE)
        path = folder / TEMPLATE_FILE
        source = path.read_text(encoding="utf-8") if path.is_file() else _template_in(config)
        return None if source is None else cls(source, _special_tokens(config))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the messages as prompt text, ending where the assistant's answer begins.

        Raises:
            RequestError: a message lacks `role` or `content`, or the template refuses them.
        """
        check_messages(messages)
        try:
            return _compiled(self.source).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RequestError(
                f"the model's chat template refused the messages: {error}; change them, or pass the prompt without"
                " a chat template"
            ) from error


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Check that messages are a non-empty list of `{"role": str, "content": str}`.

    Raises:
        RequestError: names the first message that isn't.
    """
    if not messages:
        raise RequestError("the list of messages is empty; pass at least one with a role and a content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {index} is a {type(message).__name__}; pass a mapping with role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"message {index} has {key} {message.get(key)!r}; pass a string")


class GenerationBlock(jinja2.ext.Extension):
    """Accepts `{% generation %}`, which marks the assistant's text for training; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  (how Jinja declares them)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body's nodes."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters, which prompts must not have.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not readable JSON ({error}); export the bundle again") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path} holds a {type(config).__name__}, expected an object; export the bundle again")
    return config


def _template_in(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; `default` is the one for chat
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
