"""A target's step and a draft's rollout: each alone, then both at once. How much of the rollout is hidden?

    python -m mirror.bench.gpu_overlap BUNDLE --draft-device cuda:0 --draft-device openvino:CPU --out overlap.json

The step is prefix, exit head and suffix over a whole window, to logits on the host; the rollout is the draft's pass
over the window and every pass over all branches, to tokens on the host, with no outcome to cut it short. Hidden is
the part of the rollout's own time by which it does not lengthen the step. Both ends are waited for, so the host's
clock tells their length; that they ran at the same time is read from the devices.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np

from mirror.bench.gpu_budget import common, length, merge
from mirror.bench.gpu_clock import PassClock, Ran
from mirror.bench.gpu_devices import open_watched
from mirror.bench.gpu_shared import SharedDevice
from mirror.bench.provenance import gpu_name, provenance
from mirror.bench.settings import read_settings
from mirror.bundle import Manifest, read_manifest
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.loading import Plan, load_draft, load_target, make_plan
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Candidates, Ints, Lane, Mode
from mirror.runtime.target import Target
from mirror.runtime.worker import DraftSeat
from mirror.targets.base import Device

_WARM, _REPEATS = 6, 30
_WATCHED = 10  # more of both, noted by the devices' clocks
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class OverlapTimes:
    """Medians, in ms.

    Attributes:
        step_ms, rollout_ms: each alone.
        step_beside_ms: the step with the rollout beside it.
        both_ms: from the beginning of both to the end of the later one.
        hidden: 1 - (both - step) / rollout.
        device_overlap: the share of the draft's device's work during which the target's device worked too.
    """

    branches: int
    context: int
    step_ms: float
    rollout_ms: float
    step_beside_ms: float
    both_ms: float
    hidden: float
    device_overlap: float


class Overlap:
    """One target and one draft after the same context, without a round loop around them."""

    def __init__(self, target: Target, seat: DraftSeat, plan: Plan, context: Ints, window: Ints, chunk: int) -> None:
        """Take what is loaded, read the context with both, and keep the exit's candidates of the window.

        Args:
            context: int64 [n], ending in the window's first token.
            chunk: the most rows of a prefill pass.
        """
        self._target, self._seat, self._plan = target, seat, plan
        self._context, self._window = context, window
        past = 0
        while past < context.size - 1:
            rows, _ = target.prefill(context[past : context.size - 1], past, chunk)
            past += rows
        seat.finish(seat.start(lambda draft: draft.read(context)))
        kept = target.run_exit_head(target.run_prefix(window, context.size - 1)).read()
        logprobs = None if kept.logprobs is None else kept.logprobs.copy()
        self._candidates = Candidates(kept.ids.copy(), logprobs)

    def close(self) -> None:
        """End the draft's thread."""
        self._seat.close()

    def step(self, meeting: Meeting) -> None:
        """Run the target's step, offering the exit's candidates on the way if they are wanted."""
        state = self._target.run_prefix(self._window, self._context.size - 1)
        if not self._plan.source.needs_exit:
            self._target.run_suffix(state).wait()
            return
        candidates = self._target.run_exit_head(state)
        ahead = self._target.run_suffix(state) if candidates.pending else None
        meeting.offer(candidates.read())
        (ahead or self._target.run_suffix(state)).wait()

    def rollout(self, draft: Draft, meeting: Meeting) -> float:
        """Run the whole rollout; return when it ended."""
        draft.roll_out(self._context, self._window, self._plan.gamma, meeting, None)
        return time.perf_counter()

    def rollout_alone(self) -> None:
        """Run the rollout with the exit's candidates at hand."""
        meeting = Meeting()
        meeting.offer(self._candidates)
        self._seat.finish(self._seat.start(lambda draft: self.rollout(draft, meeting)))

    def both(self) -> tuple[float, float]:
        """Run both at once; return how long the step took, and both, in ms."""
        meeting, start_s = Meeting(), time.perf_counter()
        job = self._seat.start(lambda draft: self.rollout(draft, meeting))
        self.step(meeting)
        step_end_s = time.perf_counter()
        end_s = max(self._seat.finish(job), step_end_s)
        return 1e3 * (step_end_s - start_s), 1e3 * (end_s - start_s)

    def measure(self, clock: PassClock) -> OverlapTimes:
        """Return the times of each alone and of both, in turns."""
        alone, rollouts, beside, both = [], [], [], []
        for turn in range(_WARM + _REPEATS):
            step_ms = _ms(lambda: self.step(Meeting()))
            rollout_ms = _ms(self.rollout_alone)
            beside_ms, both_ms = self.both()
            if turn >= _WARM:
                alone.append(step_ms)
                rollouts.append(rollout_ms)
                beside.append(beside_ms)
                both.append(both_ms)
        clock.start()
        for _ in range(_WATCHED):
            self.both()
        shared = device_overlap(clock.take())
        step, rollout, together = (statistics.median(times) for times in (alone, rollouts, both))
        return OverlapTimes(
            self._plan.branches,
            self._context.size - 1,
            step,
            rollout,
            statistics.median(beside),
            together,
            1 - (together - step) / rollout,
            shared,
        )


def device_overlap(ran: Sequence[Ran]) -> float:
    """Return the share of the draft's device's time during which the target's device was at work too."""
    lanes = {lane: merge((one.start_s, one.end_s) for one in ran if one.lane is lane) for lane in Lane}
    draft = lanes[Lane.DRAFT]
    return length(common(lanes[Lane.TARGET], draft)) / length(draft) if draft else 0.0


def load_overlap(
    folder: Path, manifest: Manifest, target: Device, draft: Device, base: EngineOptions, settings: str, context: int
) -> Overlap:
    """Load a bundle on two devices and read a context of random tokens.

    Settings are the draft's: the target's passes keep the bundle's width, as they do in answers with narrower windows.
    """
    shared = target.name == "cpu" and not draft.name.startswith("cuda")
    plan = make_plan(manifest, read_settings(settings, base), shared_cpu=shared)
    numbers = np.random.default_rng(0)
    tokens = numbers.integers(0, _known_tokens(manifest), context + 1)
    window = np.concatenate([tokens[-1:], numbers.integers(0, _known_tokens(manifest), plan.gamma)])
    seat = DraftSeat(load_draft(folder, manifest, draft, plan), _TIMEOUT_S)
    loaded = load_target(folder, manifest, target, make_plan(manifest, base, shared_cpu=shared))
    return Overlap(loaded, seat, plan, tokens, window, manifest.decoding.prefill_chunk)


def _known_tokens(manifest: Manifest) -> int:
    """Return how many tokens target and draft both have."""
    drafts = manifest.draft.vocab_size if manifest.draft is not None else manifest.model.vocab_size
    return min(drafts, manifest.model.vocab_size)


def _ms(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start_s)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target-device", default="cuda:0", show_default=True)
@click.option("--draft-device", "draft_devices", multiple=True, default=["cuda:0"], show_default=True)
@click.option("--context", "contexts", multiple=True, type=int, default=[500], show_default=True)
@click.option("--max-length", default=1024, show_default=True)
@click.option("--settings", "variants", multiple=True, default=[""], help="Such as 'candidates=draft kappa=4'.")
@click.option("--threads", type=int, default=None, help="CPU threads in all; the target's feeder is one of them.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    bundle: Path,
    target_device: str,
    draft_devices: Sequence[str],
    contexts: Sequence[int],
    max_length: int,
    variants: Sequence[str],
    threads: int | None,
    out: Path,
) -> None:
    """Measure how much of a rollout of BUNDLE's draft is hidden behind its target's step, for all of what is given."""
    manifest, clock = read_manifest(bundle), PassClock()
    target = SharedDevice(open_watched(target_device, clock, Lane.TARGET))
    facts = {**provenance("mirror.bench.gpu_overlap"), "gpu": gpu_name(0), "bundle": bundle.name}
    rows: list[dict[str, Any]] = []
    for name, settings, context in product(draft_devices, variants, contexts):
        draft = open_watched(name, clock, Lane.DRAFT)
        base = EngineOptions(mode=Mode.MIRROR, max_length=max_length, threads=threads, pinned=True)
        overlap = load_overlap(bundle, manifest, target, draft, base, settings, context)
        rows.append({"draft_device": name, "settings": settings, **vars(overlap.measure(clock))})
        overlap.close()
        click.echo(json.dumps(rows[-1]))
        out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
