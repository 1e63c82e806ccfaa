"""The model card that lies beside trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_card(facts: dict[str, Any], path: Path) -> None:
    """Write the card of a finished training from what `distill.json` says."""
    path.write_text("\n".join(_lines(facts)) + "\n", encoding="utf-8")


def _lines(facts: dict[str, Any]) -> list[str]:
    return [
        f"# Draft and exit heads for {facts['target']['name']}",
        "",
        "Made by `mirror distill` for one target, and refused with any other: target fingerprint",
        f"`{facts['target']['fingerprint']}`, tokenizer `{facts['target']['tokenizer_fingerprint']}`.",
        "",
        *_parts(facts),
        "",
        "The weights derive from the target's and come under its licence.",
        "",
        "## Data",
        "",
        *_data(facts),
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(facts["recipe"], indent=1),
        "```",
        "",
        f"## Held-out texts, after {facts['results']['steps']:,} steps",
        "",
        "| what | value |",
        "|---|--:|",
        *(f"| {name} | {value:,.3f} |" for name, value in sorted(facts["results"]["held_out"].items())),
    ]


def _parts(facts: dict[str, Any]) -> list[str]:
    recipe = facts["recipe"]
    layers = ", ".join(str(layer) for layer in facts["exit_layers"])
    lines = [
        f"- Exit heads after layers {layers}: a gated adapter of {recipe['adapter_size']} channels each, in front of",
        "  the target's own final norm and LM head.",
    ]
    if facts["draft_parameters"] is not None:
        starts = ", ".join(str(layer) for layer in recipe["draft_layers"])
        lines += [
            f"- A draft of {len(recipe['draft_layers'])} layers, {facts['draft_parameters'] / 1e6:.1f}M parameters,",
            f"  which started as the target's layers {starts}. Embedding and LM head are the target's, and not stored.",
        ]
    return lines


def _data(facts: dict[str, Any]) -> list[str]:
    corpus, data = facts["corpus"], facts["recipe"]["data"]
    return [
        f"{corpus['texts']:,} texts with {corpus['answer_tokens']:,} answer tokens, all written by the target",
        f"itself, to prompts of {', '.join(data['files']) or 'no file'},",
        f"to {data['own_prompts']:,} user turns of its own and to",
        f"tasks on {data['passages']:,} passages of its own.",
    ]
