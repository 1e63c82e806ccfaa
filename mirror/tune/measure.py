"""Runs of a bundle on this box: what passes cost, what was offered, how fast a choice really is."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirror.bench.prompts import load_prompts
from mirror.bundle import Manifest, read_manifest
from mirror.errors import RequestError
from mirror.prompt_files import read_prompt_file
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.engine import Engine, Result
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.targets import free_memory, open_device
from mirror.targets.base import Device
from mirror.tune.choices import Choice, Places
from mirror.tune.costs import PassCosts, pass_costs
from mirror.tune.observe import Notes, observed
from mirror.tune.outcomes import Sample

Prompt = str | tuple[int, ...]
_FEW = 2  # prompts that are enough for the time of a pass


@dataclass(frozen=True)
class Workload:
    """What is run: prompts, and the most tokens of an answer.

    Attributes:
        threads: CPU threads in all; None takes the engine's own choice.
        pinned: whether every pass runs at one width, plain ones too.
    """

    prompts: tuple[Prompt, ...]
    tokens: int
    threads: int | None = None
    pinned: bool = False


@dataclass(frozen=True)
class Probe:
    """What one engine told: answers with their candidates, and the time of passes in both modes."""

    samples: tuple[Sample, ...]
    mirror: PassCosts
    serial: PassCosts | None


@dataclass(frozen=True)
class Speed:
    """How fast a choice was in one turn over all prompts, and what it said."""

    tokens_per_s: float
    texts: tuple[tuple[int, ...], ...]


def sample_prompts(folder: Path, manifest: Manifest, count: int, file: Path | None = None) -> tuple[Prompt, ...]:
    """Return prompts of a file, evenly spaced, or the project's own, of all kinds.

    A bundle that has no tokenizer gets random tokens.

    Raises:
        RequestError: there is a file, and it can't be read, or the bundle has no tokenizer for it.
    """
    if (folder / "tokenizer.json").is_file():
        texts = read_prompt_file(file) if file is not None else [prompt.text for prompt in load_prompts()]
        return tuple(texts[:: max(1, len(texts) // count)][:count])
    if file is not None:
        raise RequestError(f"{folder} has no tokenizer.json, so it can't read {file}; leave the prompts out")
    drawn = np.random.default_rng(0).integers(0, manifest.model.vocab_size, (count, 8))
    return tuple(tuple(row) for row in drawn.tolist())


def open_engine(folder: Path, choice: Choice, work: Workload, wrap: Callable[[Device], Device] | None = None) -> Engine:
    """Load a bundle as a choice says.

    Args:
        wrap: is given every device; its result runs the segments.

    Raises:
        DeviceError: a device isn't there, can't take a segment, or has too little memory.
    """
    gc.collect()  # an engine closed before may still hold its sessions, in a cycle; this one needs the room
    plain = choice.mode is Mode.PLAIN
    options = EngineOptions(
        mode=choice.mode,
        threads=work.threads,
        gamma=choice.gamma or None,
        fanout=choice.fanout or None,
        tokens_per_pass=choice.tokens_per_pass,
        proposal_tokens_per_pass=choice.proposal_tokens_per_pass or None,
        candidates=choice.source,
        pinned=work.pinned,
    )
    places = choice.places
    names = [places.target, places.suffix or places.target]
    opened = {name: open_device(name) for name in dict.fromkeys(names)}
    # A device of its own, also where it has the target's name: on a GPU it computes on its own stream.
    beside = opened[places.target] if plain else open_device(places.draft, background=True)
    target, suffix, draft = (wrap(device) if wrap else device for device in (*(opened[name] for name in names), beside))
    manifest = read_manifest(folder)
    return Engine(folder, manifest, options, target, draft, suffix_device=suffix, free_memory=free_memory)


def probe(folder: Path, choice: Choice, work: Workload, *, narrower: Sequence[int] = (), serial: bool = True) -> Probe:
    """Answer the prompts in mirror mode, and a few again with narrower windows, and in serial mode.

    Args:
        choice: a mirror one, as wide as is wanted.
        narrower: windows whose passes are timed too.
    """
    notes = Notes()
    with open_engine(folder, choice, work, lambda device: observed(device, notes)) as engine:
        answer(engine, work.prompts[0], work.tokens)  # warms up
        notes.clear()
        results, samples = [], []
        for prompt in work.prompts:
            notes.candidates.clear()
            results.append(answer(engine, prompt, work.tokens))
            samples.append(_sample(results[-1], notes))
        for most in narrower:
            results += [answer(engine, prompt, work.tokens, most=most) for prompt in work.prompts[:_FEW]]
        beside = pass_costs(_in_rounds(notes, choice.gamma), _host_ms(results))
        if not serial:
            return Probe(tuple(samples), beside, None)
        notes.clear()
        results = [answer(engine, prompt, work.tokens, Mode.SERIAL) for prompt in work.prompts[:_FEW]]
        for most in narrower:
            results += [answer(engine, prompt, work.tokens, Mode.SERIAL, most) for prompt in work.prompts[:_FEW]]
        apart = pass_costs(_in_rounds(notes, choice.gamma), _host_ms(results))
    return Probe(tuple(samples), beside, apart)


def accepted_counts(folder: Path, choice: Choice, work: Workload) -> list[int]:
    """Return how many draft tokens stood in each full window of a choice's rounds."""
    with open_engine(folder, choice, work) as engine:
        results = [answer(engine, prompt, work.tokens) for prompt in work.prompts]
    rounds = [item for result in results for item in result.rounds if item.proposed == choice.gamma]
    return [item.accepted for item in rounds]


def speed(folder: Path, choice: Choice, work: Workload) -> Speed:
    """Load a choice, warm it up, and return how fast it answers."""
    with open_engine(folder, choice, work) as engine:
        answer(engine, work.prompts[0], work.tokens)
        results = [answer(engine, prompt, work.tokens) for prompt in work.prompts]
    rounds = [item for result in results for item in result.rounds]
    seconds = sum(item.end_s - item.start_s for item in rounds)
    committed = sum(item.committed for item in rounds)
    return Speed(committed / seconds if seconds else 0.0, tuple(result.tokens for result in results))


def answer(engine: Engine, prompt: Prompt, tokens: int, mode: Mode | None = None, most: int | None = None) -> Result:
    """Answer one prompt, greedily."""
    if isinstance(prompt, str):
        return engine.generate(prompt, max_new_tokens=tokens, mode=mode, num_assistant_tokens=most)
    return engine.generate_tokens(prompt, max_new_tokens=tokens, mode=mode, num_assistant_tokens=most)


def _sample(result: Result, notes: Notes) -> Sample:
    """Return an answer with what was offered for its tokens: all but the first, which the prompt's pass gave."""
    tokens = np.array(result.tokens[1 : 1 + _rolled(result)], np.int64)
    places = range(result.prompt_tokens, result.prompt_tokens + tokens.size)
    top = max((row.size for known in notes.candidates.values() for row in known.values()), default=1)
    return Sample(tokens, notes.table("draft_trunk", places, top), notes.table("exit_head", places, top))


def _rolled(result: Result) -> int:
    """Return how many tokens after the first came out of rounds with a rollout: the last are too near the end for one.

    What is noted for later places came from windows that went wrong before them.
    """
    count = 0
    for item in result.rounds:
        if all(span.name != "trunk" for span in item.spans):
            break
        count += item.accepted + 1
    return count


def _in_rounds(notes: Notes, gamma: int) -> dict[tuple[str, int], list[float]]:
    """Return the durations without those of passes over a prompt."""
    target = ("target_prefix", "target_suffix", "exit_head", "draft_trunk")
    return {key: times for key, times in notes.seconds.items() if key[0] not in target or key[1] <= gamma + 1}


def _host_ms(results: Sequence[Result]) -> float:
    return statistics.fmean(result.statistics.host_ms for result in results)


def widest(manifest: Manifest, places: Places, tokens_per_pass: tuple[int, ...] = (1,)) -> Choice:
    """Return the mirror choice with all that a bundle's graphs offer."""
    decoding = manifest.decoding
    fanout = (decoding.kappa,) * (decoding.gamma + 1)
    return Choice(
        Mode.MIRROR, places, decoding.exit_layer, decoding.gamma, CandidateSource.BOTH, fanout, tokens_per_pass
    )
