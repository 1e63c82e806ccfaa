"""The project's own prompts, which it measures itself with: 24 of 6 kinds, in `prompts.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import resources

KINDS = ("explain", "maths", "code", "story", "translation", "rewrite")


@dataclass(frozen=True)
class Prompt:
    """One user turn; `name` is unique within its kind."""

    kind: str
    name: str
    text: str

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The conversation that a chat model is given."""
        return ({"role": "user", "content": self.text},)


def load_prompts(per_kind: int | None = None) -> tuple[Prompt, ...]:
    """Return the prompts, kind by kind.

    Args:
        per_kind: how many of each kind, from its beginning; None for all.
    """
    text = resources.files("mirror.bench").joinpath("prompts.toml").read_text(encoding="utf-8")
    prompts = [Prompt(item["kind"], item["name"], item["text"].strip()) for item in tomllib.loads(text)["prompt"]]
    return tuple(prompt for kind in KINDS for prompt in [item for item in prompts if item.kind == kind][:per_kind])
