"""What drawing a token costs: `python -m mirror.bench.choices BUNDLE --out FILE`.

Rows are those that a bundle's target gives in its own answers at temperature 1, widened to a larger vocabulary by
logits of their own below the likeliest thousand. Every row is drawn from by numpy and by the package's library in turn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import click
import numpy as np

import mirror
from mirror.bench.provenance import provenance
from mirror.runtime.engine import chooser_for
from mirror.runtime.records import Floats
from mirror.runtime.sampling import Sampler, SamplingParams

PROMPTS = ("Why is the sky blue?", "Write a short poem about rivers.", "How do I bake bread at home?")
LAWS: dict[str, dict[str, float]] = {
    "temperature alone": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 20, top-p 0.95": {"top_k": 20, "top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "repetition penalty 1.1": {"repetition_penalty": 1.1},
}
_KEPT = 1000  # of a row's likeliest, not repeated when it is widened


def collect_rows(bundle: Path, tokens: int) -> list[Floats]:
    """Return the rows that answers were drawn from."""
    rows: list[Floats] = []
    choose = Sampler.choose

    def noted(sampler: Sampler, logits: Floats, position: int) -> int:
        rows.append(logits.copy())
        return choose(sampler, logits, position)

    with mock.patch.object(Sampler, "choose", noted), mirror.load(bundle, mode="plain") as engine:
        for seed, prompt in enumerate(PROMPTS):
            engine.generate(prompt, max_new_tokens=tokens, temperature=1.0, seed=seed)
    return rows


def widened(row: Floats, vocabulary: int, seed: int) -> Floats:
    """Return a row with so many logits, the further ones drawn from its own."""
    if vocabulary <= row.size:
        return row[:vocabulary].copy()
    common = np.sort(row)[:-_KEPT]
    return np.concatenate([row, np.random.default_rng(seed).choice(common, vocabulary - row.size)])


def time_law(rows: Sequence[Floats], law: dict[str, float]) -> dict[str, list[float]]:
    """Return the median and the 90th percentile of a choice in ms, by numpy and by the library.

    Raises:
        RuntimeError: they chose different tokens.
    """
    params = SamplingParams(1.0, seed=7, **law)  # type: ignore[arg-type]
    context = np.arange(0, rows[0].size, 97)
    samplers = {
        "numpy": Sampler(params, rows[0].size, context),
        "library": Sampler(params, rows[0].size, context, chooser_for(params)),
    }
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for position, row in enumerate(rows):
        chosen = set()
        for name, sampler in samplers.items():
            start_s = time.perf_counter()
            chosen.add(sampler.choose(row, position))
            times[name].append(1e3 * (time.perf_counter() - start_s))
        if len(chosen) > 1:
            raise RuntimeError(f"row {position} gave tokens {sorted(chosen)}")
    return {name: [round(float(np.quantile(found, share)), 3) for share in (0.5, 0.9)] for name, found in times.items()}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--vocabulary", "vocabularies", multiple=True, type=int, default=[49152, 151936], show_default=True)
@click.option("--tokens", default=100, show_default=True, help="Of each of three answers.")
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(bundle: Path, vocabularies: Sequence[int], tokens: int, out: Path | None) -> None:
    """Time draws from rows of BUNDLE's target."""
    rows, results = collect_rows(bundle, tokens), []
    for vocabulary in vocabularies:
        wide = [widened(row, vocabulary, seed) for seed, row in enumerate(rows)]
        for name, law in LAWS.items():
            results.append({"vocabulary": vocabulary, "law": name, "ms": time_law(wide, law)})
            click.echo(json.dumps(results[-1]))
    if out is not None:
        facts = {"bundle": bundle.name, "rows": len(rows), "results": results}
        out.write_text(json.dumps({**provenance("mirror.bench.choices"), **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
