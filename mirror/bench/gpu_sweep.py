"""Settings of a draft beside each other: window, branches, their shape, passes, source, mode.

    python -m mirror.bench.gpu_sweep BUNDLE --questions spec_bench.jsonl --draft-device cuda:0 --variant gamma=5 \
        --variant "candidates=draft tokens_per_pass=1 proposal_tokens_per_pass=1,2,4" --variant mode=serial \
        --out docs/results/sweep-14b.json

All variants run over one target, in turns, beside plain decoding and the bundle's own settings. Passes of the target
are pinned to one width, so a narrower window does not make them cheaper. For other exit layers, run it on bundles that
`mirror recut` has cut there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mirror.bench.gpu_clock import PassClock
from mirror.bench.gpu_devices import open_watched
from mirror.bench.gpu_rounds import Arm, Asked, chosen_questions, compare, row
from mirror.bench.gpu_shared import SharedDevice
from mirror.bench.provenance import gpu_name, provenance
from mirror.bench.settings import read_settings
from mirror.bundle import Manifest, read_manifest
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Lane, Mode

_SHOWN = (
    "prompt_tokens",
    "tokens_per_s",
    "tokens_per_round",
    "reuse_rate",
    "branches_per_round",
    "median_round_ms",
    "round_after_reuse_ms",
    "rollout_wait_ms",
    "redraft_ms",
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target-device", default="cuda:0", show_default=True)
@click.option("--draft-device", default="cuda:0", show_default=True)
@click.option("--variant", "variants", multiple=True, help="Settings, such as 'candidates=draft tokens_per_pass=1'.")
@click.option("--threads", type=int, default=None, help="CPU threads in all; the target's feeder is one of them.")
@click.option("--questions", "questions_file", type=click.Path(path_type=Path), default=None)
@click.option("--per-category", default=1, show_default=True)
@click.option("--preface", default=0, show_default=True, help="Characters of other questions before each question.")
@click.option("--tokens", default=48, show_default=True)
@click.option("--repeats", default=1, show_default=True)
@click.option("--max-length", type=int, default=None, help="The bundle's, if not given.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    bundle: Path,
    target_device: str,
    draft_device: str,
    variants: Sequence[str],
    threads: int | None,
    questions_file: Path | None,
    per_category: int,
    preface: int,
    tokens: int,
    repeats: int,
    max_length: int | None,
    out: Path,
) -> None:
    """Measure variants of BUNDLE's settings, in mirror mode where they don't say another."""
    manifest, clock = read_manifest(bundle), PassClock()
    base = EngineOptions(max_length=max_length, threads=threads, pinned=True, mode=Mode.MIRROR)
    target = SharedDevice(open_watched(target_device, clock, Lane.TARGET))
    questions = chosen_questions(questions_file, per_category, preface)
    arms: list[Arm] = []
    for text in ("", *variants):
        # The target's passes stay at the bundle's width, so a narrower window is a matter of each answer.
        settings = read_settings(text, base)
        draft = open_watched(draft_device, clock, Lane.DRAFT)
        engine = Engine(bundle, manifest, replace(settings, gamma=None), target, draft)
        arms += [Arm(Mode.PLAIN, draft_device, engine)] if not arms else []
        arms.append(Arm(settings.mode or Mode.MIRROR, draft_device, engine, settings.gamma))
    compare(arms, questions, Asked(tokens, 0.0), repeats)
    rows = [
        {"mode": arm.mode.value, "settings": text, **_shown(row(arm, arms[0], questions))}
        for text, arm in zip(("", "", *variants), arms, strict=True)
    ]
    for item in rows:
        click.echo(json.dumps(item))
    facts = {**provenance("mirror.bench.gpu_sweep"), "gpu": gpu_name(0), **_bundle_facts(bundle, manifest)}
    out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for arm in arms:
        arm.engine.close()


def _shown(found: dict[str, Any]) -> dict[str, Any]:
    """Return a row's speed over plain and the terms that a setting moves."""
    over = found["over_plain"]["mean_over_categories"]
    return {"same_text": found["same_text"], "over_plain": over, **{name: found[name] for name in _SHOWN}}


def _bundle_facts(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "bundle": bundle.name,
        "exit_layer": manifest.decoding.exit_layer,
        "layers": manifest.model.layers,
        "settings": {"fanout": manifest.settings.fanout, "tokens_per_pass": manifest.settings.tokens_per_pass},
    }


if __name__ == "__main__":
    main()
