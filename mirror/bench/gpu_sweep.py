"""Mirror mode with one setting changed at a time: window, branches, their shape, tokens per pass, source.

    python -m mirror.bench.gpu_sweep BUNDLE --questions spec_bench.jsonl --draft-device cuda:0 \
        --gamma 3 --gamma 5 --fanout 8,8,8,8,8,8,8,8 --passes 1 --source draft --out docs/results/sweep-14b.json

All variants run over one target, in turns, beside plain decoding and the bundle's own settings. Passes of the target
are pinned to one width, so a narrower window does not make them cheaper. For other exit layers, run it on bundles that
`mirror recut` has cut there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from mirror.bench.gpu_clock import PassClock
from mirror.bench.gpu_devices import open_watched
from mirror.bench.gpu_rounds import Arm, Asked, compare, numbers, own_questions, row
from mirror.bench.gpu_shared import SharedDevice
from mirror.bench.provenance import gpu_name, provenance
from mirror.bench.questions import read_questions
from mirror.bundle import Manifest, read_manifest
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Lane, Mode

_SHOWN = (
    "tokens_per_s",
    "tokens_per_round",
    "reuse_rate",
    "branches_per_round",
    "median_round_ms",
    "round_after_reuse_ms",
    "rollout_wait_ms",
    "redraft_ms",
)


@dataclass(frozen=True)
class Variant:
    """One changed setting: its name and value as written, and what it means to the engine.

    Attributes:
        most: draft tokens of a window at most; None means the bundle's gamma.
    """

    what: str
    value: str
    options: EngineOptions
    most: int | None = None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target-device", default="cuda:0", show_default=True)
@click.option("--draft-device", default="cuda:0", show_default=True)
@click.option("--gamma", "gammas", multiple=True, type=int)
@click.option("--fanout", "fanouts", multiple=True, help="Branches by window position, comma-separated.")
@click.option("--passes", multiple=True, help="Tokens per pass, comma-separated.")
@click.option("--source", "sources", multiple=True, type=click.Choice([source.value for source in CandidateSource]))
@click.option("--questions", "questions_file", type=click.Path(path_type=Path), default=None)
@click.option("--per-category", default=1, show_default=True)
@click.option("--tokens", default=48, show_default=True)
@click.option("--repeats", default=1, show_default=True)
@click.option("--max-length", type=int, default=None, help="The bundle's, if not given.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    bundle: Path,
    target_device: str,
    draft_device: str,
    gammas: Sequence[int],
    fanouts: Sequence[str],
    passes: Sequence[str],
    sources: Sequence[str],
    questions_file: Path | None,
    per_category: int,
    tokens: int,
    repeats: int,
    max_length: int | None,
    out: Path,
) -> None:
    """Measure variants of BUNDLE's settings in mirror mode."""
    manifest, clock = read_manifest(bundle), PassClock()
    base = EngineOptions(max_length=max_length, pinned=True, mode=Mode.MIRROR)
    target = SharedDevice(open_watched(target_device, clock, Lane.TARGET))
    questions = own_questions(per_category) if questions_file is None else read_questions(questions_file, per_category)
    chosen = list(variants(base, gammas, fanouts, passes, sources))
    arms: list[Arm] = []
    for variant in chosen:
        engine = Engine(bundle, manifest, variant.options, target, open_watched(draft_device, clock, Lane.DRAFT))
        arms += [Arm(Mode.PLAIN, draft_device, engine)] if not arms else []
        arms.append(Arm(Mode.MIRROR, draft_device, engine, variant.most))
    compare(arms, questions, Asked(tokens, 0.0), repeats)
    rows = [
        {"what": variant.what, "value": variant.value, **_shown(row(arm, arms[0], questions))}
        for variant, arm in zip([Variant("plain", "", base), *chosen], arms, strict=True)
    ]
    for item in rows:
        click.echo(json.dumps(item))
    facts = {**provenance("mirror.bench.gpu_sweep"), "gpu": gpu_name(0), **_bundle_facts(bundle, manifest)}
    out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for arm in arms:
        arm.engine.close()


def variants(
    base: EngineOptions, gammas: Sequence[int], fanouts: Sequence[str], passes: Sequence[str], sources: Sequence[str]
) -> Iterator[Variant]:
    """Yield the bundle's own settings, then each change to them."""
    yield Variant("as the bundle says", "", base)
    for gamma in gammas:
        yield Variant("gamma", str(gamma), base, gamma)
    for fanout in fanouts:
        yield Variant("fanout", fanout, replace(base, fanout=numbers(fanout)))
    for counts in passes:
        yield Variant("tokens_per_pass", counts, replace(base, tokens_per_pass=numbers(counts)))
    for source in sources:
        yield Variant("candidates", source, replace(base, candidates=CandidateSource(source)))


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
