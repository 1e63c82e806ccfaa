"""From a bundle and two devices to a target and a draft, ready to run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mirror.bundle import (
    INT8_SEGMENTS,
    KEY_BLOCK,
    NOISE_POSITIONS,
    ROLLOUT_SLOTS,
    VOCABULARY_FILE,
    DraftFacts,
    Manifest,
    Segment,
)
from mirror.errors import BundleError, RequestError
from mirror.runtime.candidates import CandidateSource, source_of
from mirror.runtime.draft import Draft
from mirror.runtime.features import FeatureStore
from mirror.runtime.generation import RoundShape
from mirror.runtime.lookahead import branch_passes, branches_at, rollout_capacity
from mirror.runtime.memory import SegmentMemory, segment_memory
from mirror.runtime.model_draft import DraftSegments, DraftShape, ModelDraft, SampledSegment
from mirror.runtime.ngram_draft import NgramDraft
from mirror.runtime.noise_table import NoiseTable
from mirror.runtime.options import EngineOptions
from mirror.runtime.recent_draft import RecentDraft
from mirror.runtime.records import Ints, Mode
from mirror.runtime.target import Target, TargetSegments
from mirror.runtime.threads import physical_cores, split_threads
from mirror.targets.base import Device, LoadRequest, PassShape


@dataclass(frozen=True)
class Plan:
    """The sizes that an engine runs at, after the bundle's and the user's choices are joined.

    Attributes:
        fanout: int64 [gamma + 1], branches that may leave after each window position.
        tokens_per_pass: tokens that each of a rollout's passes gives a branch.
        branches_per_pass: branches that take part in each of them; empty for all.
        proposal_tokens_per_pass: tokens that each pass of a proposal gives.
        adapt_branches: whether rollouts may take fewer branches where they end late.
        draft_context: tokens of a context's end that the draft reads at most; `max_length` if all.
        target_threads, draft_threads: CPU threads of each.
    """

    mode: Mode
    source: CandidateSource
    max_length: int
    gamma: int
    fanout: Ints
    tokens_per_pass: tuple[int, ...]
    branches_per_pass: tuple[int, ...]
    proposal_tokens_per_pass: tuple[int, ...]
    draft_context: int
    adapt_branches: bool
    target_threads: int
    draft_threads: int
    options: EngineOptions

    @property
    def branches(self) -> int:
        """The most rows of a rollout's pass."""
        return int(self.fanout.sum())

    @property
    def draft_capacity(self) -> int:
        """Slots of the draft's cache, in whole blocks of keys as this package's own kernels lay them out."""
        return -(-(self.draft_context + self.rollout_slots) // KEY_BLOCK) * KEY_BLOCK

    @property
    def rollout_slots(self) -> int:
        """Slots of it that no context takes."""
        sizes = self.gamma, self.branches, self.tokens_per_pass, self.branches_per_pass
        return rollout_capacity(0, *sizes, most_given=max(self.proposal_tokens_per_pass))

    @property
    def target_capacity(self) -> int:
        """Slots of the target's caches: a whole window fits after the last token but one."""
        return self.max_length + self.gamma + 1


def make_plan(manifest: Manifest, options: EngineOptions, *, shared_cpu: bool) -> Plan:
    """Join the bundle's sizes with the user's.

    Raises:
        RequestError: a size that the bundle can't serve, or a mode that needs a draft it lacks.
    """
    decoding, settings = manifest.decoding, manifest.settings
    mode = options.mode or Mode(settings.mode or Mode.MIRROR)
    if mode is not Mode.PLAIN and manifest.draft is None:
        raise RequestError(
            f"mode {mode.value} needs a draft and this bundle has none; use mode plain, or export it with --draft"
        )
    gamma = options.gamma or settings.gamma or decoding.gamma
    tokens_per_pass = _tokens_per_pass(manifest, options)
    max_length = _max_length(manifest, options)
    total = options.threads or physical_cores()
    target_threads, draft_threads = split_threads(total, mode, shared=shared_cpu)
    plan = Plan(
        mode=mode,
        source=options.candidates or source_of(settings.candidates, manifest.draft.kind if manifest.draft else None),
        max_length=max_length,
        gamma=gamma,
        fanout=_fanout(manifest, options, gamma),
        tokens_per_pass=tokens_per_pass,
        branches_per_pass=_branches_per_pass(manifest, options),
        proposal_tokens_per_pass=_proposal_tokens_per_pass(manifest, options, tokens_per_pass),
        draft_context=_draft_context(manifest, options, max_length),
        adapt_branches=_adapts(manifest, options),
        target_threads=target_threads,
        draft_threads=draft_threads,
        options=options,
    )
    if mode is not Mode.PLAIN and manifest.draft is not None and manifest.draft.kind == "model":
        _check_rollout(plan)
    return plan


def _check_rollout(plan: Plan) -> None:
    rows = plan.rollout_slots
    if rows > ROLLOUT_SLOTS:
        raise RequestError(
            f"a rollout of {plan.branches} branches by {plan.gamma} tokens takes {rows} rows, and a draft's graphs "
            f"have room for {ROLLOUT_SLOTS}; lower the fan-out or gamma, or give more tokens per pass"
        )


def _max_length(manifest: Manifest, options: EngineOptions) -> int:
    length = options.max_length or manifest.decoding.max_length
    if length > manifest.decoding.max_length:
        raise RequestError(
            f"max_length is {length} and the bundle was exported for {manifest.decoding.max_length}; "
            "ask for less or export it with a larger --max-length"
        )
    return length


def _fanout(manifest: Manifest, options: EngineOptions, gamma: int) -> Ints:
    decoding, tuned = manifest.decoding, manifest.settings.fanout
    fanout = options.fanout
    if fanout is None and options.kappa is None and tuned is not None and len(tuned) == gamma + 1:
        fanout = tuned
    fanout = fanout or (options.kappa or decoding.kappa,) * (gamma + 1)
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


def _tokens_per_pass(manifest: Manifest, options: EngineOptions) -> tuple[int, ...]:
    tokens = options.tokens_per_pass or manifest.settings.tokens_per_pass or (1,)
    return _checked_tokens(manifest, "tokens_per_pass", tokens)


def _proposal_tokens_per_pass(manifest: Manifest, options: EngineOptions, rollout: tuple[int, ...]) -> tuple[int, ...]:
    # A user's own passes are for proposals too, where the bundle's would otherwise serve half of what was asked.
    tuned = manifest.settings.proposal_tokens_per_pass if options.tokens_per_pass is None else None
    tokens = options.proposal_tokens_per_pass or tuned or rollout
    return _checked_tokens(manifest, "proposal_tokens_per_pass", tokens)


def _checked_tokens(manifest: Manifest, name: str, tokens: tuple[int, ...]) -> tuple[int, ...]:
    streams = manifest.draft.streams if manifest.draft is not None else 0
    if min(tokens) < 1 or max(tokens) > 1 + streams:
        raise RequestError(
            f"{name} is {tokens}; the draft has {streams} streams, so its counts must be 1 to {1 + streams}"
        )
    return tokens


def _adapts(manifest: Manifest, options: EngineOptions) -> bool:
    # What the user counts out is done so.
    counted = options.fanout or options.kappa or options.branches_per_pass or manifest.settings.branches_per_pass
    return bool(manifest.settings.adapt_branches) and not counted


def _branches_per_pass(manifest: Manifest, options: EngineOptions) -> tuple[int, ...]:
    # The bundle's limits belong to the bundle's passes.
    tuned = manifest.settings.branches_per_pass if options.tokens_per_pass is None else None
    limits = options.branches_per_pass or tuned or ()
    if limits and (min(limits) < 1 or list(limits) != sorted(limits, reverse=True)):
        raise RequestError(f"branches_per_pass is {limits}; its counts must be 1 or more and never rise")
    return limits


def _draft_context(manifest: Manifest, options: EngineOptions, max_length: int) -> int:
    draft, asked = manifest.draft, options.draft_context or manifest.settings.draft_context
    if asked is not None and (draft is None or draft.kind != "model" or draft.feature_layer is not None):
        raise RequestError(
            f"draft_context is {asked}, and this bundle has no draft that reads a context by itself: "
            "it is fed by the target's states, looks its tokens up, or isn't there; leave draft_context out"
        )
    return min(asked or max_length, max_length)


def round_shape(manifest: Manifest, plan: Plan, most: int | None = None) -> RoundShape:
    """Return what the round loop needs of a plan.

    Args:
        most: draft tokens that this answer may have in a window; None takes gamma, which is the limit.
    """
    return RoundShape(
        gamma=min(plan.gamma, most or plan.gamma),
        prefill_chunk=manifest.decoding.prefill_chunk,
        wants_exit=plan.source.needs_exit,
        wants_states=manifest.draft is not None and manifest.draft.feature_layer is not None,
    )


@dataclass(frozen=True)
class Placement:
    """The device of each part; prefix and exit head are `target`'s."""

    target: Device
    suffix: Device
    draft: Device

    @property
    def segments(self) -> Mapping[str, Device]:
        """The device of every segment, by the segment's name."""
        target = {"target_prefix": self.target, "exit_head": self.target, "target_suffix": self.suffix}
        return {**target, **dict.fromkeys(("draft_trunk", "draft", "draft_sampled"), self.draft)}


def memory_needs(
    folder: Path, manifest: Manifest, placement: Placement, plan: Plan
) -> Mapping[str, Sequence[SegmentMemory]]:
    """Return what each device, by its name, is to hold: every segment's weights and cache."""
    needs: dict[str, list[SegmentMemory]] = {}
    target = dict.fromkeys(("target_prefix", "exit_head", "target_suffix"), _target_shapes(manifest, plan))
    shapes = target | _draft_passes(plan, placement.draft)
    for name, device in placement.segments.items():
        segment, drafts = _placed(manifest, name, device), device is placement.draft and name.startswith("draft")
        if segment is None or (drafts and plan.mode is Mode.PLAIN):
            continue
        if name == "draft_sampled" and not _samples(manifest, plan, device):
            continue
        # The draft's graphs share one cache.
        capacity = (
            0 if name in ("draft_trunk", "draft_sampled") else plan.draft_capacity if drafts else plan.target_capacity
        )
        held = partial(device.weight_bytes, segment, shapes=shapes[name])
        needs.setdefault(device.name, []).append(segment_memory(folder, segment, device.form, capacity, held))
    return needs


def _draft_passes(plan: Plan, device: Device) -> dict[str, list[PassShape]]:
    """Return the passes that the draft's segments are loaded for on a device, by the segment's name."""
    window, steps = [PassShape(plan.gamma + 1)], draft_shapes(plan, device.padded_width)
    return {"draft_trunk": window, "draft": steps, "draft_sampled": [*window, *steps]}


def _target_shapes(manifest: Manifest, plan: Plan) -> list[PassShape]:
    """Return the passes of a target: one row, a window, and a prompt's."""
    chunk = min(manifest.decoding.prefill_chunk, plan.target_capacity)
    return [PassShape(1), PassShape(plan.gamma + 1), PassShape(chunk, 1)]


def load_target(
    folder: Path, manifest: Manifest, device: Device, plan: Plan, suffix_device: Device | None = None
) -> Target:
    """Load the target's segments and make its caches: all on `device`, or the suffix on another."""
    capacity, threads = plan.target_capacity, plan.target_threads
    other = suffix_device or device
    names, shapes = ("target_prefix", "exit_head", "target_suffix"), _target_shapes(manifest, plan)
    places = (device, device, other)
    segments = [(_segment(manifest, name, place), place) for name, place in zip(names, places, strict=True)]
    prefix, exit_head, suffix = (
        place.load_segment(LoadRequest(folder, segment, shapes, capacity, threads)) for segment, place in segments
    )
    prefix_cache, suffix_cache = (
        place.make_cache(segment.kv, capacity) for segment, place in (segments[0], segments[2])
    )
    return Target(
        TargetSegments(prefix, exit_head, suffix, prefix_cache, suffix_cache, apart=other.name != device.name),
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
        return NgramDraft(plan.source, plan.fanout, plan.options.max_ngram_size)
    if facts is None or facts.kind != "model":
        raise BundleError(f"the bundle's draft is {facts}; this version runs drafts of kind model or ngram")
    capacity = plan.draft_capacity
    trunk, branch = _segment(manifest, "draft_trunk", device), _segment(manifest, "draft", device)
    threads, passes = plan.draft_threads, _draft_passes(plan, device)
    spare = threads < plan.target_threads
    steps = passes["draft"]
    segments = DraftSegments(
        device.load_segment(LoadRequest(folder, trunk, passes["draft_trunk"], capacity, threads, steps, spare)),
        device.load_segment(LoadRequest(folder, branch, steps, capacity, threads, spare=spare)),
        device.make_cache(branch.kv, capacity),
        _sampled(folder, manifest, device, plan, passes["draft_sampled"]),
    )
    shape = DraftShape(
        capacity=capacity,
        max_positions=manifest.model.max_positions,
        vocab_size=facts.vocab_size,
        target_vocab_size=manifest.model.vocab_size,
        prefill_chunk=manifest.decoding.prefill_chunk,
        tokens_per_pass=plan.tokens_per_pass,
        branches_per_pass=plan.branches_per_pass,
        proposal_tokens_per_pass=plan.proposal_tokens_per_pass,
        # Where passes have fixed widths, fewer branches are padding.
        adapts=plan.adapt_branches and segments.branch.widths is None,
    )
    draft = ModelDraft(segments, shape, plan.source, plan.fanout, _features(manifest, facts, device, plan))
    return draft if plan.draft_context == plan.max_length else RecentDraft(draft, plan.draft_context)


def _samples(manifest: Manifest, plan: Plan, device: Device) -> bool:
    """Return whether a draft adds noise on its device: passes are only launched there, and the bundle has a graph."""
    segment = manifest.segments.get("draft_sampled")
    fits = 2 * plan.gamma + 2 <= NOISE_POSITIONS  # a window and a rollout from its end
    return segment is not None and device.form in segment.graphs and device.launches and fits


def _sampled(
    folder: Path, manifest: Manifest, device: Device, plan: Plan, shapes: Sequence[PassShape]
) -> SampledSegment | None:
    """Load the graph that adds noise to the draft's scores, where it is of use."""
    if not _samples(manifest, plan, device):
        return None
    request = LoadRequest(folder, manifest.segments["draft_sampled"], shapes, plan.draft_capacity, plan.draft_threads)
    tokens: Ints = np.load(folder / VOCABULARY_FILE, allow_pickle=False)
    return SampledSegment(
        device.load_segment(request), NoiseTable(device.make_table(NOISE_POSITIONS, tokens.size), tokens)
    )


def draft_shapes(plan: Plan, padded_width: int) -> list[PassShape]:
    """Return the passes of a rollout and of a proposal, ascending: all branches', and one branch's.

    Args:
        padded_width: leave out one branch's where another pass's program of at most this width, padded, serves it.
    """
    whole, single = set[PassShape](), set[PassShape]()
    for number, item in enumerate(branch_passes(plan.tokens_per_pass, plan.gamma)):
        count = branches_at(number, plan.branches, plan.branches_per_pass)
        whole.add(PassShape(count * item.rows, count * item.gives))
        single.add(PassShape(item.rows, item.gives))
    single |= {PassShape(item.rows, item.gives) for item in branch_passes(plan.proposal_tokens_per_pass, plan.gamma)}
    kept = whole | single
    for shape in sorted(single - whole):
        if _is_covered(shape, kept - {shape}, padded_width):
            kept.remove(shape)
    return sorted(kept)


def _is_covered(narrow: PassShape, shapes: Collection[PassShape], padded_width: int) -> bool:
    """Return whether the least width that holds a pass gives the logits that it wants, and costs no more."""
    width = min((shape.width for shape in shapes if shape.width >= narrow.width), default=padded_width + 1)
    enough = any(shape.width == width and shape.rows >= narrow.rows for shape in shapes)
    return enough and width <= padded_width


def _features(manifest: Manifest, facts: DraftFacts, device: Device, plan: Plan) -> FeatureStore | None:
    """Return where a draft keeps the exit states that feed it, None for a draft of tokens alone."""
    if facts.feature_layer is None:
        return None
    if facts.feature_layer != manifest.decoding.exit_layer:
        raise BundleError(
            f"the draft is fed by the state after layer {facts.feature_layer} and the target is cut after layer "
            f"{manifest.decoding.exit_layer}; export the bundle again"
        )
    graphs = _segment(manifest, "draft", device).graphs
    spec = next(spec for spec in graphs[device.form].inputs if spec.name == "features")
    if spec.dtype == "bfloat16":
        raise RequestError("a draft fed by features runs in fp32 or fp16, this bundle is in bf16; export it in fp16")
    return FeatureStore(plan.target_capacity, int(spec.shape[2]), spec.dtype)


def _placed(manifest: Manifest, name: str, device: Device) -> Segment | None:
    """Return a segment as a device runs it, under its usual name; None where the bundle has none."""
    integers = manifest.segments.get(INT8_SEGMENTS.get(name, ""))
    return replace(integers, name=name) if integers and device.int8_drafts else manifest.segments.get(name)


def _segment(manifest: Manifest, name: str, device: Device) -> Segment:
    segment = _placed(manifest, name, device)
    if segment is None:
        raise BundleError(f"the bundle has no {name}; export it again")
    return segment
