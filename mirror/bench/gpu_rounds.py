"""Modes beside each other over one target, on a benchmark's questions, with what the devices did and when.

    python -m mirror.bench.gpu_rounds BUNDLE --questions spec_bench.jsonl --per-category 4 \
        --draft-device cuda:0 --draft-device openvino:CPU --out docs/results/rounds-14b.json

The target is loaded once; each draft device has an engine over it. All arms (plain; serial and mirror with each draft
device) answer a question before the next one comes. Texts are compared before any speed is printed. A category's speed
is its tokens over its rounds' time, so the prompt's pass is left out; ratios are to plain, category by category, and
the mean is over categories. Without `--questions` the project's own prompts serve.

Afterwards each arm answers a few questions with the devices' own clocks running (not counted in any speed): where a
round's time goes, and traces that `mirror.bench.timeline` draws.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from mirror.bench.gpu_budget import Interval, by_devices, length, merge, where_time_goes
from mirror.bench.gpu_clock import PassClock, Ran
from mirror.bench.gpu_devices import open_watched
from mirror.bench.gpu_shared import SharedDevice
from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import gpu_name, provenance
from mirror.bench.questions import Question, read_questions, with_preface
from mirror.bench.settings import read_settings
from mirror.bundle import Manifest, read_manifest
from mirror.runtime.engine import Engine
from mirror.runtime.loading import Placement, memory_needs
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Lane, Mode, Round
from mirror.runtime.result import Result
from mirror.runtime.statistics import PromptFacts, summarise
from mirror.runtime.trace import chrome_trace
from mirror.targets import free_memory, parse_device_name
from mirror.targets.base import Device

TERMS = ("round_ms", "prefix_ms", "exit_head_ms", "suffix_ms", "trunk_ms", "rollout_ms", "propose_ms")
WAITS = ("candidate_wait_ms", "rollout_wait_ms", "redraft_ms", "host_ms")
RATES = ("tokens_per_round", "acceptance_rate", "reuse_rate", "branches_per_round")
_WATCHED_QUESTIONS = 3
_PROFILED_TOKENS = 24
_WARM_TOKENS = 24


@dataclass(frozen=True)
class Asked:
    """What every answer of a run has in common."""

    tokens: int
    temperature: float


@dataclass
class Arm:
    """One mode with one draft device: an engine and what it answered, question by question, turn by turn.

    Attributes:
        most: draft tokens of a window at most; None means the engine's gamma.
    """

    mode: Mode
    draft_device: str
    engine: Engine
    most: int | None = None
    answers: list[list[Result]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Mode and draft device in one word."""
        return self.mode.value if self.mode is Mode.PLAIN else f"{self.mode.value} + {self.draft_device}"

    @property
    def rounds(self) -> list[Round]:
        """The rounds of all answers."""
        return [item for turns in self.answers for result in turns for item in result.rounds]

    def answer(self, question: Question, asked: Asked) -> Result:
        """Answer a question; nothing is noted."""
        return self.engine.generate(
            question.text,
            max_new_tokens=asked.tokens,
            temperature=asked.temperature,
            seed=1,
            mode=self.mode,
            num_assistant_tokens=self.most,
        )

    def round_ms(self, *, reused: bool) -> float | None:
        """Return the median time of rounds whose window was ready when they began, or of those that redrafted."""
        times = [
            1e3 * (item.end_s - item.start_s)
            for turns in self.answers
            for result in turns
            for before, item in pairwise(result.rounds)
            if before.reused is reused
        ]
        return statistics.median(times) if times else None


def tokens_per_s(rounds: Iterable[Round]) -> float:
    """Return committed tokens over the time of their rounds."""
    listed = list(rounds)
    return sum(item.committed for item in listed) / sum(item.end_s - item.start_s for item in listed)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target-device", default="cuda:0", show_default=True)
@click.option("--draft-device", "draft_devices", multiple=True, default=["cuda:0"], show_default=True)
@click.option("--settings", default="", help="Of the draft, such as 'candidates=draft tokens_per_pass=1'.")
@click.option("--threads", type=int, default=None, help="CPU threads in all; the target's feeder is one of them.")
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0], show_default=True)
@click.option("--questions", "questions_file", type=click.Path(path_type=Path), default=None)
@click.option("--per-category", default=4, show_default=True)
@click.option("--preface", default=0, show_default=True, help="Characters of other questions before each question.")
@click.option("--tokens", default=64, show_default=True)
@click.option("--repeats", default=1, show_default=True, help="Turns over each question.")
@click.option("--max-length", type=int, default=None, help="The bundle's, if not given.")
@click.option("--profile/--no-profile", default=False, help="Record the GPU's kernels too.")
@click.option("--traces", type=click.Path(path_type=Path), default=None, help="Folder for a trace of each arm.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    bundle: Path,
    target_device: str,
    draft_devices: Sequence[str],
    settings: str,
    threads: int | None,
    temperatures: Sequence[float],
    questions_file: Path | None,
    per_category: int,
    preface: int,
    tokens: int,
    repeats: int,
    max_length: int | None,
    profile: bool,
    traces: Path | None,
    out: Path,
) -> None:
    """Measure the modes of BUNDLE."""
    manifest, clock = read_manifest(bundle), PassClock()
    options = read_settings(
        settings, EngineOptions(max_length=max_length, threads=threads, pinned=True, mode=Mode.MIRROR)
    )
    target = SharedDevice(open_watched(target_device, clock, Lane.TARGET))
    arms, memory = load_arms(bundle, manifest, options, target, draft_devices, clock)
    questions = chosen_questions(questions_file, per_category, preface)
    facts = {
        **provenance("mirror.bench.gpu_rounds"),
        "gpu": gpu_name(0),
        "bundle": bundle.name,
        "settings": settings,
        "exit_layer": manifest.decoding.exit_layer,
        "questions": {"count": len(questions), "numbers": [question.number for question in questions]},
        "memory": memory,
    }
    rows: list[dict[str, Any]] = []
    for temperature in temperatures:
        asked = Asked(tokens, temperature)
        compare(arms, questions, asked, repeats)
        rows += [{"temperature": temperature, **row(arm, arms[0], questions)} for arm in arms]
        _say_rows(rows[-len(arms) :])
        _write(out, facts, rows)
        for arm, entry in zip(arms, rows[-len(arms) :], strict=True):
            entry |= watch(arm, questions[:_WATCHED_QUESTIONS], asked, clock, traces)
            if profile:
                entry["kernels"] = _recorded(arm, questions[0], asked)
            click.echo(json.dumps({arm.name: _rounded(entry["where_time_goes_ms"])}))
            _write(out, facts, rows)
    for arm in arms:
        arm.engine.close()


def chosen_questions(file: Path | None, per_category: int, preface: int) -> tuple[Question, ...]:
    """Return questions of a file, or the project's own, each after so many characters of others."""
    asked_of = own_questions if file is None else partial(read_questions, file)
    return with_preface(asked_of(per_category), asked_of(None), preface)


def own_questions(per_kind: int | None) -> tuple[Question, ...]:
    """Return the project's own prompts as questions."""
    return tuple(Question(number, item.kind, item.text) for number, item in enumerate(load_prompts(per_kind)))


def load_arms(
    bundle: Path,
    manifest: Manifest,
    options: EngineOptions,
    target: Device,
    draft_devices: Sequence[str],
    clock: PassClock,
) -> tuple[list[Arm], list[dict[str, Any]]]:
    """Return the arms over one target, plain first, and what each engine's loading took of its devices' memory."""
    arms: list[Arm] = []
    memory = []
    for name in draft_devices:
        draft = open_watched(name, clock, Lane.DRAFT)
        before = free_memory(target.name).bytes
        engine = Engine(bundle, manifest, options, target, draft)
        needs = memory_needs(bundle, manifest, Placement(target, target, draft), engine.plan)
        arms += [Arm(Mode.PLAIN, name, engine)] if not arms else []
        # In turns with the target a draft has the whole of a GPU.
        whole = str(parse_device_name(name)) if name.startswith("cuda") else name
        in_turns = engine
        if whole != name:
            in_turns = Engine(bundle, manifest, options, target, open_watched(whole, clock, Lane.DRAFT))
        arms += [Arm(Mode.SERIAL, name, in_turns), Arm(Mode.MIRROR, name, engine)]
        memory.append(
            {
                "draft_device": name,
                "target_device_free_bytes": {"before": before, "after": free_memory(target.name).bytes},
                "foreseen_bytes": {
                    device: {item.name: {"weights": item.weight_bytes, "cache": item.cache_bytes} for item in items}
                    for device, items in needs.items()
                },
            }
        )
    return arms, memory


def compare(arms: Sequence[Arm], questions: Sequence[Question], asked: Asked, repeats: int) -> None:
    """Let every arm answer every question, in turns; answers before these are forgotten."""
    for arm in arms:
        arm.answers = [[] for _ in questions]
        for _ in range(2):  # plans, recordings, compiled shapes
            arm.answer(questions[0], Asked(_WARM_TOKENS, asked.temperature))
    for turn in range(repeats):
        for number, question in enumerate(questions):
            for arm in arms:
                arm.answers[number].append(arm.answer(question, asked))
        click.echo(f"turn {turn + 1} of {repeats}", err=True)


def row(arm: Arm, plain: Arm, questions: Sequence[Question]) -> dict[str, Any]:
    """Return what an arm did, beside the plain one."""
    ratios = _ratios(arm, plain, questions)
    by_question = sorted(
        tokens_per_s(_rounds(mine)) / tokens_per_s(_rounds(theirs))
        for mine, theirs in zip(arm.answers, plain.answers, strict=True)
        if _rounds(mine) and _rounds(theirs)
    )
    facts = summarise(PromptFacts(0, 0, 0, None, 0), arm.rounds)
    first = [turns[0].tokens for turns in plain.answers]
    return {
        "arm": arm.name,
        "same_text": all(
            result.tokens == tokens for turns, tokens in zip(arm.answers, first, strict=True) for result in turns
        ),
        "prompt_tokens": statistics.fmean(_prompts(arm)),
        "events": sorted({event.message for turns in arm.answers for result in turns for event in result.events}),
        "tokens_per_s": tokens_per_s(arm.rounds),
        "over_plain": {
            "mean_over_categories": statistics.fmean(ratios.values()),
            "by_category": ratios,
            "by_question": {"low": by_question[0], "median": statistics.median(by_question), "high": by_question[-1]},
        },
        "rounds": len(arm.rounds),
        "median_round_ms": statistics.median(1e3 * (item.end_s - item.start_s) for item in arm.rounds),
        "round_after_reuse_ms": arm.round_ms(reused=True),
        "round_after_redraft_ms": arm.round_ms(reused=False),
        **{name: getattr(facts, name) for name in (*RATES, *TERMS, *WAITS)},
    }


def _prompts(arm: Arm) -> Iterator[int]:
    return (result.statistics.prompt_tokens for turns in arm.answers for result in turns)


def _rounds(results: Iterable[Result]) -> list[Round]:
    return [item for result in results for item in result.rounds]


def _ratios(arm: Arm, plain: Arm, questions: Sequence[Question]) -> dict[str, float]:
    """Return an arm's speed over plain's, by category."""
    return {
        category: _speed(arm, questions, category) / _speed(plain, questions, category)
        for category in dict.fromkeys(question.category for question in questions)
    }


def _speed(arm: Arm, questions: Sequence[Question], category: str) -> float:
    chosen = [turns for turns, question in zip(arm.answers, questions, strict=True) if question.category == category]
    return tokens_per_s(item for turns in chosen for item in _rounds(turns))


def watch(
    arm: Arm, questions: Sequence[Question], asked: Asked, clock: PassClock, traces: Path | None
) -> dict[str, Any]:
    """Return where the time of an arm's rounds goes, by the devices' clocks; write the first answer's trace."""
    rounds: list[Round] = []
    ran: list[Ran] = []
    for question in questions:
        clock.start()
        result = arm.answer(question, asked)
        passes = clock.take()
        if traces is not None and question is questions[0]:
            _write_trace(traces, arm, asked, result, by_devices(result.rounds, passes))
        rounds += result.rounds
        ran += passes
    return {"where_time_goes_ms": where_time_goes(rounds, ran)}


def _write_trace(folder: Path, arm: Arm, asked: Asked, result: Result, rounds: Sequence[Round]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trace = chrome_trace((), rounds, result.devices)
    name = f"{arm.mode.value}-{arm.draft_device.replace(':', '')}-t{asked.temperature:g}.json"
    (folder / name).write_text(json.dumps(trace), encoding="utf-8")


def _write(out: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _say_rows(rows: Iterable[dict[str, Any]]) -> None:
    for item in rows:
        click.echo(json.dumps(_rounded(item)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 3) if isinstance(value, float) else value


# --- what the GPU did -------------------------------------------------------------------------------


def _recorded(arm: Arm, question: Question, asked: Asked) -> dict[str, Any]:
    """Return how long the GPU's streams computed in a short answer, and how much of it at the same time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorder:
        result = arm.answer(question, Asked(min(asked.tokens, _PROFILED_TOKENS), asked.temperature))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {"rounds": len(result.rounds), **overlap(streams_of(events))}


def streams_of(events: Iterable[dict[str, Any]]) -> dict[int, list[Interval]]:
    """Return the intervals of each stream's kernels and copies, in us, from a chrome trace's events."""
    streams: dict[int, list[Interval]] = defaultdict(list)
    for stream, interval in _intervals(events):
        streams[stream].append(interval)
    return streams


def _intervals(events: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Interval]]:
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start = float(event["ts"])
            yield int(event["args"]["stream"]), (start, start + float(event["dur"]))


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


if __name__ == "__main__":
    main()
