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
        "Made by `mirror distill` for one target, and refused with any other:",
        "",
        f"- target `{facts['target']['fingerprint']}`",
        f"- tokenizer `{facts['target']['tokenizer_fingerprint']}`",
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
        json.dumps(_own_recipe(facts["recipe"]), indent=1),
        "```",
        "",
        f"## Held-out texts, after {facts['results']['steps']:,} steps",
        "",
        "| what | value |",
        "|---|--:|",
        *(f"| {name} | {value:,.3f} |" for name, value in sorted(facts["results"]["held_out"].items())),
    ]


def _own_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without those of the trainings before it, which would be most of the card."""
    return recipe | {"start": "a finished training; its recipe is in distill.json"} if recipe["start"] else recipe


def _parts(facts: dict[str, Any]) -> list[str]:
    recipe, draft = facts["recipe"], facts["draft"]
    taken = ", taken over from the training that this one started from" if recipe.get("frozen_exit_heads") else ""
    heads = ", ".join(
        f"{layer} ({size} channels)" for layer, size in zip(facts["exit_layers"], recipe["adapter_sizes"], strict=True)
    )
    lines = [
        f"- Exit heads after layers {heads}: a gated adapter each,",
        f"  in front of the target's own final norm and LM head{taken}.",
    ]
    if draft is not None:
        lines += [f"- A draft of {draft['parameters'] / 1e6:.1f}M parameters, which started as {_beginning(recipe)}"]
        wider = recipe.get("draft_intermediate")
        lines += [f"  Its feed-forward parts have {wider} inner channels."] if wider else []
        lines += [f"  Speculative streams: {draft['streams']}. Fed by exit layer: {draft['feature_layer'] or 'none'}."]
    lines += ["- Matrices are stored as 8-bit integers with a scale for each row."] if recipe["int8"] else []
    return lines


def _beginning(recipe: dict[str, Any]) -> str:
    if recipe["draft_layers"] is None:
        return f"{recipe['draft_model']}\n  and keeps its embedding and LM head."
    starts = ", ".join(str(layer) for layer in recipe["draft_layers"])
    return f"the target's layers\n  {starts}. Embedding and LM head are the target's, and not stored."


def _data(facts: dict[str, Any]) -> list[str]:
    corpus, data = facts["corpus"], facts["recipe"]["data"]
    kept = data.get("texts") or []
    return [
        f"{corpus['texts']:,} texts with {corpus['answer_tokens']:,} answer tokens, all written by the target",
        f"itself, to prompts of {', '.join(data['files']) or 'no file'},",
        f"to {data['own_prompts'] + data['opened_prompts']:,} user turns of its own, to tasks on {data['passages']:,}",
        f"passages of its own and to {data['given_tasks']:,} tasks on passages of those prompts"
        + (f"; {len(kept)} of its corpora from before ({', '.join(kept)}) are counted in." if kept else "."),
    ]
