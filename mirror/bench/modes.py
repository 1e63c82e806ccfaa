"""The modes of one bundle beside each other: same text, speed, and where a round's time goes.

    python -m mirror.bench.modes BUNDLE --draft-device openvino:CPU --out docs/results/modes-cpu.json

Every arm (a mode on its devices) is an engine of its own, loaded once. After a warm-up the arms take
turns, prompt by prompt. Texts are compared before any speed is printed; speeds are ratios to the
plain arm of the same turn, so that a machine that drifts does so for all.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import mirror
from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import provenance
from mirror.runtime.engine import Engine
from mirror.runtime.result import Result

TERMS = (
    "round_ms",
    "prefix_ms",
    "exit_head_ms",
    "suffix_ms",
    "trunk_ms",
    "rollout_ms",
    "propose_ms",
    "candidate_wait_ms",
    "rollout_wait_ms",
    "redraft_ms",
    "host_ms",
)
RATES = ("tokens_per_round", "acceptance_rate", "reuse_rate", "draft_hidden")


@dataclass(frozen=True)
class Arm:
    """One mode on its devices."""

    mode: str
    target_device: str
    draft_device: str

    @property
    def name(self) -> str:
        """Mode and devices in one word."""
        if self.mode == "plain":
            return f"plain {self.target_device}"
        return f"{self.mode} {self.target_device} + {self.draft_device}"


@dataclass
class Record:
    """What an arm did: results by prompt and turn."""

    arm: Arm
    results: list[list[Result]] = field(default_factory=list)

    def speeds(self, turn: int) -> float:
        """Return the decode speed of one turn, tokens/s over all its prompts."""
        tokens = sum(result.statistics.generated_tokens - 1 for result in self.results[turn])
        seconds = sum(
            (result.statistics.generated_tokens - 1) / (result.statistics.decode_tokens_per_s or 1.0)
            for result in self.results[turn]
        )
        return tokens / seconds

    def mean(self, name: str) -> float | None:
        """Return the mean of a statistic over all results that have it."""
        values = [getattr(result.statistics, name) for turn in self.results for result in turn]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--modes", default="plain,serial,mirror", help="Modes, comma-separated; plain is the reference.")
@click.option("--target-device", default="cpu")
@click.option("--draft-device", "draft_devices", multiple=True, default=["cpu"])
@click.option("--threads", type=int, default=None)
@click.option("--candidates", default="both")
@click.option("--gamma", type=int, default=None)
@click.option("--kappa", type=int, default=None)
@click.option("--pinned", is_flag=True)
@click.option("--temperature", type=float, default=0.0)
@click.option("--prompts", "prompt_count", type=int, default=6)
@click.option("--tokens", type=int, default=64)
@click.option("--repeats", type=int, default=5)
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(
    bundle: Path,
    modes: str,
    target_device: str,
    draft_devices: Sequence[str],
    threads: int | None,
    candidates: str,
    gamma: int | None,
    kappa: int | None,
    pinned: bool,
    temperature: float,
    prompt_count: int,
    tokens: int,
    repeats: int,
    out: Path | None,
) -> None:
    """Measure the modes of BUNDLE."""
    arms = list(_arms(modes.split(","), target_device, draft_devices))
    engines: list[tuple[Record, Engine]] = []
    for arm in arms:
        engine = mirror.load(
            bundle,
            mode=arm.mode,
            target_device=arm.target_device,
            draft_device=arm.draft_device,
            threads=threads,
            candidates=candidates,
            gamma=gamma,
            kappa=kappa,
            pinned=pinned,
        )
        engines.append((Record(arm), engine))
    prompts = [prompt.text for prompt in load_prompts()]
    chosen = prompts[:: max(1, len(prompts) // prompt_count)][:prompt_count]
    for turn in range(repeats + 1):
        for record, engine in engines:
            record.results.append([])
            for prompt in chosen:
                result = engine.generate(prompt, max_new_tokens=tokens, temperature=temperature, seed=1)
                record.results[-1].append(result)
        click.echo(f"turn {turn} of {repeats}{' (warm-up)' if turn == 0 else ''}", err=True)
    records = [record for record, _ in engines]
    for _, engine in engines:
        engine.close()
    for record in records:
        del record.results[0]
    summary = _summary(records)
    _print(summary)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({**provenance("mirror.bench.modes"), "bundle": bundle.name, "arms": summary}, indent=1) + "\n"
        )


def _arms(modes: Sequence[str], target_device: str, draft_devices: Sequence[str]) -> Iterator[Arm]:
    for mode in modes:
        for draft_device in draft_devices[:1] if mode == "plain" else draft_devices:
            yield Arm(mode, target_device, draft_device)


def _summary(records: list[Record]) -> list[dict[str, object]]:
    reference = records[0]
    rows: list[dict[str, object]] = []
    for record in records:
        turns = range(len(record.results))
        ratios = sorted(record.speeds(turn) / reference.speeds(turn) for turn in turns)
        row: dict[str, object] = {
            "arm": record.arm.name,
            "same_text": _same_text(record, reference),
            "events": sorted({event.message for turn in record.results for result in turn for event in result.events}),
            "decode_tokens_per_s": statistics.median(record.speeds(turn) for turn in turns),
            "ratio_to_plain": {"median": statistics.median(ratios), "p10": ratios[0], "p90": ratios[-1]},
            "ttft_s": record.mean("ttft_s"),
        }
        row.update({name: record.mean(name) for name in (*RATES, *TERMS)})
        rows.append(row)
    return rows


def _same_text(record: Record, reference: Record) -> bool:
    first = [result.tokens for result in reference.results[0]]
    return all([result.tokens for result in turn] == first for turn in record.results)


def _print(rows: list[dict[str, object]]) -> None:
    columns = ("arm", "same_text", "decode_tokens_per_s", "ratio_to_plain", *RATES, *TERMS)
    table = Table(show_lines=False)
    table.add_column("")
    for row in rows:
        table.add_column(str(row["arm"]), justify="right")
    for name in columns[1:]:
        table.add_row(name, *(_cell(row[name]) for row in rows))
    Console().print(table)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['p10']:.2f}-{value['p90']:.2f})"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
