"""Modes beside each other on a GPU, in one engine, with what the GPU itself did and when.

    python -m mirror.bench.gpu_rounds BUNDLE --draft-device cuda:0 --out docs/results/rounds-14b.json

One engine per draft device holds the target once; its modes take turns, prompt by prompt. Texts are compared
before any speed is printed. What overlapped is read from the GPU's own record of its kernels (CUPTI, through
torch's profiler), stream by stream, in rounds that are not timed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

import mirror
from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import gpu_name, provenance
from mirror.runtime.engine import Engine
from mirror.runtime.result import Result

MODES = ("plain", "serial", "mirror")
TERMS = ("round_ms", "prefix_ms", "exit_head_ms", "suffix_ms", "trunk_ms", "rollout_ms", "propose_ms")
WAITS = ("candidate_wait_ms", "rollout_wait_ms", "redraft_ms", "host_ms")
RATES = ("tokens_per_round", "acceptance_rate", "reuse_rate", "draft_hidden", "decode_tokens_per_s")

Interval = tuple[float, float]


@dataclass
class Arm:
    """What one mode did: results by turn."""

    mode: str
    turns: list[list[Result]] = field(default_factory=list)

    def speed(self, turn: int) -> float:
        """Return tokens/s of one turn, over the rounds of all its prompts."""
        rounds = [item for result in self.turns[turn] for item in result.rounds]
        return sum(item.committed for item in rounds) / sum(item.end_s - item.start_s for item in rounds)

    def mean(self, name: str) -> float | None:
        """Return the mean of a statistic over the results that have it."""
        found = [getattr(result.statistics, name) for turn in self.turns for result in turn]
        known = [value for value in found if value is not None]
        return statistics.fmean(known) if known else None

    def round_ms(self, *, reused: bool) -> float | None:
        """Return the median time of rounds that began with a window that was ready, or of the others."""
        times = []
        for result in (result for turn in self.turns for result in turn):
            for before, item in zip(result.rounds, result.rounds[1:], strict=False):
                if (before.reused is True) is reused:
                    times.append(1e3 * (item.end_s - item.start_s))
        return statistics.median(times) if times else None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target-device", default="cuda:0", show_default=True)
@click.option("--draft-device", "draft_devices", multiple=True, default=["cuda:0"], show_default=True)
@click.option("--candidates", default=None)
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0], show_default=True)
@click.option("--prompts", "prompt_count", default=6, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--profile/--no-profile", default=True, show_default=True, help="Record the GPU's kernels too.")
@click.option("--traces", type=click.Path(path_type=Path), default=None, help="Folder for a trace of each mode.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    bundle: Path,
    target_device: str,
    draft_devices: Sequence[str],
    candidates: str | None,
    temperatures: Sequence[float],
    prompt_count: int,
    tokens: int,
    repeats: int,
    profile: bool,
    traces: Path | None,
    out: Path,
) -> None:
    """Measure the modes of BUNDLE."""
    prompts = [prompt.text for prompt in load_prompts()]
    chosen = prompts[:: max(1, len(prompts) // prompt_count)][:prompt_count]
    facts = {**provenance("mirror.bench.gpu_rounds"), "gpu": gpu_name(0), "bundle": bundle.name}
    rows: list[dict[str, Any]] = []
    for draft_device in draft_devices:
        with mirror.load(
            bundle,
            mode="mirror",
            pinned=True,
            target_device=target_device,
            draft_device=draft_device,
            candidates=candidates,
        ) as engine:
            for temperature in temperatures:
                where = {"draft_device": draft_device, "temperature": temperature}
                arms = _turns(engine, chosen, tokens, repeats, temperature)
                for arm in arms:
                    rows.append({**where, **_row(arm, arms[0])})
                    click.echo(json.dumps(_rounded(rows[-1])))
                    if traces is not None and not temperature:
                        _write_trace(traces, f"{arm.mode}-{draft_device.replace(':', '')}", arm.turns[-1][0])
                _write(out, facts, rows)
                for arm, row in zip(arms, rows[-len(arms) :], strict=True):
                    if profile:
                        row["kernels"] = _recorded(engine, chosen[0], tokens, temperature, arm.mode)
                        click.echo(json.dumps({arm.mode: _rounded(row["kernels"])}))
                _write(out, facts, rows)


def _write(out: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _write_trace(folder: Path, name: str, result: Result) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result.trace()), encoding="utf-8")


def _turns(engine: Engine, prompts: Sequence[str], tokens: int, repeats: int, temperature: float) -> list[Arm]:
    """Return the modes' results; the first turn warms up and is left out."""
    arms = [Arm(mode) for mode in MODES]
    for turn in range(repeats + 1):
        for arm in arms:
            arm.turns.append([_answer(engine, prompt, tokens, temperature, arm.mode) for prompt in prompts])
        click.echo(f"turn {turn} of {repeats}{' (warm-up)' if turn == 0 else ''}", err=True)
    for arm in arms:
        del arm.turns[0]
    return arms


def _answer(engine: Engine, prompt: str, tokens: int, temperature: float, mode: str) -> Result:
    return engine.generate(prompt, max_new_tokens=tokens, temperature=temperature, seed=1, mode=mode)


def _row(arm: Arm, plain: Arm) -> dict[str, Any]:
    turns = range(len(arm.turns))
    ratios = sorted(arm.speed(turn) / plain.speed(turn) for turn in turns)
    first = [result.tokens for result in plain.turns[0]]
    return {
        "mode": arm.mode,
        "same_text": all([result.tokens for result in turn] == first for turn in arm.turns),
        "events": sorted({event.message for turn in arm.turns for result in turn for event in result.events}),
        "tokens_per_s": statistics.median(arm.speed(turn) for turn in turns),
        "over_plain": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
        "round_after_reuse_ms": arm.round_ms(reused=True),
        "round_after_redraft_ms": arm.round_ms(reused=False),
        **{name: arm.mean(name) for name in (*RATES, *TERMS, *WAITS)},
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}


# --- what the GPU did -------------------------------------------------------------------------------


def _recorded(engine: Engine, prompt: str, tokens: int, temperature: float, mode: str) -> dict[str, Any]:
    """Return how long the GPU's streams computed in a short answer, and how much of it at the same time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorder:
        result = _answer(engine, prompt, min(tokens, 24), temperature, mode)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {"rounds": len(result.rounds), **overlap(streams_of(events))}


def streams_of(events: Iterable[dict[str, Any]]) -> dict[int, list[Interval]]:
    """Return the intervals of each stream's kernels and copies, in us, from a chrome trace's events."""
    streams: dict[int, list[Interval]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start = float(event["ts"])
            streams[int(event["args"]["stream"])].append((start, start + float(event["dur"])))
    return streams


def overlap(streams: dict[int, list[Interval]]) -> dict[str, Any]:
    """Return how long the busiest stream (the target's), the others (the draft's) and both at once were busy, in ms."""
    merged = {stream: merge(intervals) for stream, intervals in streams.items()}
    if not merged:
        return {"target_busy_ms": 0.0, "draft_busy_ms": 0.0, "both_busy_ms": 0.0, "span_ms": 0.0}
    target = max(merged, key=lambda stream: length(merged[stream]))
    others = merge([part for stream, parts in merged.items() if stream != target for part in parts])
    everything = merge([part for parts in merged.values() for part in parts])
    both = length(merged[target]) + length(others) - length(everything)
    return {
        "target_busy_ms": length(merged[target]) / 1e3,
        "draft_busy_ms": length(others) / 1e3,
        "both_busy_ms": both / 1e3,
        "span_ms": (everything[-1][1] - everything[0][0]) / 1e3,
    }


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of some intervals, ascending and apart."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Return the time that intervals apart from each other cover."""
    return sum(end - start for start, end in intervals)


if __name__ == "__main__":
    main()
