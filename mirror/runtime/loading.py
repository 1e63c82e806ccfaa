"""From a bundle and two devices to a target and a draft, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirror.bundle import Decoding, Manifest, Segment
from mirror.errors import BundleError, RequestError
from mirror.runtime.draft import Draft
from mirror.runtime.generation import RoundShape
from mirror.runtime.model_draft import DraftSegments, DraftShape, ModelDraft, rollout_capacity
from mirror.runtime.ngram_draft import NgramDraft
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Ints, Mode
from mirror.runtime.target import Target, TargetSegments
from mirror.runtime.threads import physical_cores, split_threads
from mirror.targets.base import Device


@dataclass(frozen=True)
class Plan:
    """The sizes that an engine runs at, after the bundle's and the user's choices are joined.

    Attributes:
        fanout: int64 [gamma + 1], branches that may leave after each window position.
        target_threads, draft_threads: CPU threads of each.
    """

    max_length: int
    gamma: int
    fanout: Ints
    target_threads: int
    draft_threads: int
    options: EngineOptions

    @property
    def branches(self) -> int:
        """The most rows of a rollout's pass."""
        return int(self.fanout.sum())

    @property
    def target_capacity(self) -> int:
        """Slots of the target's caches: a whole window fits after the last token but one."""
        return self.max_length + self.gamma + 1


def make_plan(manifest: Manifest, options: EngineOptions, *, shared_cpu: bool) -> Plan:
    """Join the bundle's sizes with the user's.

    Raises:
        RequestError: a size that the bundle can't serve, or a mode that needs a draft it lacks.
    """
    decoding = manifest.decoding
    if options.mode is not Mode.PLAIN and manifest.draft is None:
        raise RequestError(
            f"mode {options.mode.value} needs a draft and this bundle has none; "
            "use mode plain, or export it with --draft"
        )
    gamma = options.gamma or decoding.gamma
    total = options.threads or physical_cores()
    target_threads, draft_threads = split_threads(total, options.mode, shared=shared_cpu)
    return Plan(
        max_length=_max_length(manifest, options),
        gamma=gamma,
        fanout=_fanout(decoding, options, gamma),
        target_threads=target_threads,
        draft_threads=draft_threads,
        options=options,
    )


def _max_length(manifest: Manifest, options: EngineOptions) -> int:
    length = options.max_length or manifest.decoding.max_length
    if length > manifest.decoding.max_length:
        raise RequestError(
            f"max_length is {length} and the bundle was exported for {manifest.decoding.max_length}; "
            "ask for less or export it with a larger --max-length"
        )
    return length


def _fanout(decoding: Decoding, options: EngineOptions, gamma: int) -> Ints:
    kappa = options.kappa or decoding.kappa
    fanout = options.fanout or (kappa,) * (gamma + 1)
    if len(fanout) != gamma + 1:
        raise RequestError(f"fanout has {len(fanout)} counts; with gamma {gamma} it must have {gamma + 1}")
    if min(fanout) < 0 or max(fanout) < 1:
        raise RequestError(f"fanout is {fanout}; its counts must be 0 or more, one of them above 0")
    if max(fanout) > decoding.kappa:
        raise RequestError(
            f"kappa is {max(fanout)} and the bundle's graphs give {decoding.kappa} candidates; "
            "ask for less or re-cut the bundle with a larger --kappa"
        )
    return np.array(fanout, np.int64)


def round_shape(manifest: Manifest, plan: Plan, most: int | None = None) -> RoundShape:
    """Return what the round loop needs of a plan.

    Args:
        most: draft tokens that this answer may have in a window; None takes gamma, which is the limit.
    """
    return RoundShape(
        min(plan.gamma, most or plan.gamma), manifest.decoding.prefill_chunk, plan.options.candidates.needs_exit
    )


def load_target(folder: Path, manifest: Manifest, device: Device, plan: Plan) -> Target:
    """Load the target's segments on a device and make its caches."""
    capacity, threads = plan.target_capacity, plan.target_threads
    widths = sorted({1, plan.gamma + 1, min(manifest.decoding.prefill_chunk, capacity)})
    segments = [_segment(manifest, name) for name in ("target_prefix", "exit_head", "target_suffix")]
    prefix, exit_head, suffix = (
        device.load_segment(folder, segment, capacity=capacity, widths=widths, threads=threads) for segment in segments
    )
    caches = [device.make_cache(segment.kv, capacity) for segment in (segments[0], segments[2])]
    return Target(
        TargetSegments(prefix, exit_head, suffix, *caches),
        capacity=capacity,
        max_positions=manifest.model.max_positions,
        pinned_width=plan.gamma + 1 if plan.options.pinned else None,
    )


def load_draft(folder: Path, manifest: Manifest, device: Device, plan: Plan) -> Draft:
    """Load the draft, of whatever kind the bundle has, on a device.

    Raises:
        BundleError: the bundle has no draft of a kind that this version runs.
    """
    facts = manifest.draft
    if facts is not None and facts.kind == "ngram":
        return NgramDraft(plan.options.candidates, plan.fanout, plan.options.max_ngram_size)
    if facts is None or facts.kind != "model":
        raise BundleError(f"the bundle's draft is {facts}; this version runs drafts of kind model or ngram")
    capacity = rollout_capacity(plan.max_length, plan.gamma, plan.branches)
    trunk, branch = _segment(manifest, "draft_trunk"), _segment(manifest, "draft")
    shape = DraftShape(
        capacity=capacity,
        max_positions=manifest.model.max_positions,
        vocab_size=facts.vocab_size,
        target_vocab_size=manifest.model.vocab_size,
        prefill_chunk=manifest.decoding.prefill_chunk,
    )
    threads = plan.draft_threads
    segments = DraftSegments(
        device.load_segment(folder, trunk, capacity=capacity, widths=[plan.gamma + 1], threads=threads),
        device.load_segment(folder, branch, capacity=capacity, widths=sorted({1, plan.branches}), threads=threads),
        device.make_cache(branch.kv, capacity),
    )
    return ModelDraft(segments, shape, plan.options.candidates, plan.fanout)


def _segment(manifest: Manifest, name: str) -> Segment:
    segment = manifest.segments.get(name)
    if segment is None:
        raise BundleError(f"the bundle has no {name}; export it again")
    return segment
