"""`mirror plan` as a whole: from a bundle or shapes, a box and a curve to terms, choices and the draft's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mirror.bundle import Manifest, read_manifest
from mirror.errors import RequestError
from mirror.plan.acceptance import Curve, read_curve
from mirror.plan.box import Basis, Box, DeviceProfile, Figure, read_box
from mirror.plan.graph_count import count_draft, count_target
from mirror.plan.passes import Part, PassTime
from mirror.plan.rounds import Choice, RoundTerms, Setting, plan_round, rollout_ms
from mirror.plan.search import DRAFT_LAYERS, Limits, best_rounds, draft_sizes, exit_layers
from mirror.plan.shapes import STORAGE, read_shape
from mirror.plan.work import ModelWork
from mirror.runtime.candidates import CandidateSource, source_of

SHOWN = 8
MEASURED_KAPPA = 23  # the widest fan-out of a position in the measured curves
MOST_KAPPA = 8  # what an engine branches into at each position where nothing is said


@dataclass(frozen=True)
class PlanOptions:
    """What is planned for; None leaves it to the bundle, the box or the curve.

    Attributes:
        box: a profile's name or file.
        target_shape, draft_shape: a shape's name or a config.json, in place of what the bundle holds.
        target_precision, draft_precision: how a shape's numbers are stored.
        draft_layers: so many layers of the draft's shape.
        draft_vocabulary: tokens that a shape's head knows.
        streams: stream rows of a draft given as a shape.
        acceptance: see `read_curve`.
        context: tokens before the window.
        exit_layer, gamma, branches, tokens_per_pass, candidates: the round that is shown in terms.
    """

    box: str
    target_shape: str | None = None
    draft_shape: str | None = None
    target_precision: str = "fp16"
    draft_precision: str = "fp16"
    draft_layers: int | None = None
    draft_vocabulary: int | None = None
    streams: int | None = None
    target_device: str | None = None
    draft_device: str | None = None
    acceptance: str | None = None
    context: int = 500
    exit_layer: int | None = None
    gamma: int | None = None
    branches: int | None = None
    tokens_per_pass: tuple[int, ...] | None = None
    candidates: str | None = None


@dataclass(frozen=True)
class PlanReport:
    """What was found.

    Attributes:
        given: the round as the bundle and the options say, or the best one where they say nothing.
        best: the fastest choices.
        sizes: the best round for drafts with more or fewer layers.
        low, high: the given round's speed over plain, over the ends of both devices' ranges.
        unsure: figures of both devices that nobody measured there, as sentences.
    """

    box: Box
    setting: Setting
    given: RoundTerms
    best: tuple[RoundTerms, ...]
    sizes: tuple[RoundTerms, ...]
    low: float
    high: float
    unsure: tuple[str, ...]

    columns: ClassVar[tuple[str, ...]] = (
        "mirror/plain", "serial/plain", "candidates", "exit", "gamma", "branches", "tokens per pass",
        "round ms", "tokens", "prepared", "fits", "limit",
    )  # fmt: skip
    size_columns: ClassVar[tuple[str, ...]] = (
        "draft layers", "parameters", "gamma", "branches", "tokens per pass", "trunk and rollout ms", "fits",
        "mirror/plain", "serial/plain", "tokens to equal plain",
    )  # fmt: skip
    term_columns: ClassVar[tuple[str, ...]] = ("term", "device", "ms", "bound by")

    def term_cells(self) -> list[tuple[str, ...]]:
        """Return the given round's terms as a table's rows."""
        terms, setting = self.given, self.setting
        target, draft = setting.target.device.name, setting.draft.device.name
        rows = [_pass_cells(item, target) for item in (terms.prefix, terms.exit_head, terms.suffix) if item]
        rows += [_pass_cells(item, draft) for item in (terms.trunk, *terms.rollout)]
        waits = (
            ("target, beside the draft", terms.overlap.target_ms),
            ("draft still at work after it", terms.late_ms),
            ("drafting anew, mean", terms.redraft_ms),
            ("host", terms.host_ms),
            ("mirror round", terms.round_ms),
            ("serial round", terms.serial_ms),
            ("plain round", terms.plain_ms),
        )
        return rows + [(name, "", f"{value:.2f}", "") for name, value in waits]

    def cells(self) -> list[tuple[str, ...]]:
        """Return the best choices as a table's rows."""
        return [_choice_cells(item) for item in self.best]

    def size_cells(self) -> list[tuple[str, ...]]:
        """Return the draft's sizes as a table's rows."""
        model = self.setting.draft.model
        return [_size_cells(item, model, layers) for item, layers in zip(self.sizes, DRAFT_LAYERS, strict=True)]

    def tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """Return the terms, the choices and the draft's sizes, each as columns and rows."""
        return [
            (self.term_columns, self.term_cells()),
            (self.columns, self.cells()),
            (self.size_columns, self.size_cells()),
        ]

    def sentence(self) -> str:
        """Return what the plan says in one sentence."""
        terms = self.given
        fits = "fits into the target's time" if terms.fits else "does not fit into the target's time"
        return (
            f"the draft's rollout {fits}; mirror {terms.over_plain:.2f} of plain "
            f"({self.low:.2f} to {self.high:.2f} over the figures' ranges), serial "
            f"{terms.serial_over_plain:.2f}; limit: {terms.limit}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        setting = self.setting
        return {
            "box": self.box.name,
            "target": {"what": setting.target.model.name, "device": setting.target.device.name},
            "draft": {"what": setting.draft.model.name, "device": setting.draft.device.name},
            "acceptance": setting.curve.title,
            "context": setting.context,
            "given": _round_json(self.given),
            "over_plain_range": [self.low, self.high],
            "best": [_round_json(item) for item in self.best],
            "draft_sizes": [
                {"layers": layers, **_round_json(item)} for item, layers in zip(self.sizes, DRAFT_LAYERS, strict=True)
            ],
            "unsure": list(self.unsure),
        }


def plan_bundle(bundle: Path | None, options: PlanOptions) -> PlanReport:
    """Return the plan for a bundle, or for shapes.

    Raises:
        BundleError: the bundle can't be read.
        RequestError: neither a bundle nor a shape says what to plan, or a profile, a shape, a device or the curve
            lacks something; the message says what.
    """
    manifest = read_manifest(bundle) if bundle is not None else None
    box = read_box(options.box)
    target, draft = _target(bundle, manifest, options), _draft(bundle, manifest, box, options)
    curve = read_curve(options.acceptance, target.layers)
    setting = _setting(box, target, draft, curve, options)
    limits = _limits(manifest, target, curve, options)
    best = best_rounds(setting, limits, SHOWN)
    choice = _choice(manifest, best[0].choice, options)
    _check(choice, limits, target.layers)
    given = plan_round(setting, choice)
    ratios = [given.over_plain, *(plan_round(edge, choice).over_plain for edge in edges(setting))]
    return PlanReport(
        box=box,
        setting=setting,
        given=given,
        best=tuple(best),
        sizes=tuple(draft_sizes(setting, limits)),
        low=min(ratios),
        high=max(ratios),
        unsure=(f"acceptance is that of {curve.title}", *_unsure(box, setting)),
    )


def edges(setting: Setting) -> Iterator[Setting]:
    """Yield the setting with all of the target's figures at one end of their ranges, and all of the draft's at one."""
    for slow_target in (True, False):
        for slow_draft in (True, False):
            target = _at_edge(setting.target, slow_target)
            yield dataclasses.replace(setting, target=target, draft=_at_edge(setting.draft, slow_draft))


def _at_edge(part: Part, slow: bool) -> Part:
    box = part.box.at_edge(slow=slow)
    return dataclasses.replace(part, box=box, device=box.devices[part.device.name])


def _target(bundle: Path | None, manifest: Manifest | None, options: PlanOptions) -> ModelWork:
    if options.target_shape is not None:
        return read_shape(options.target_shape).work(STORAGE[options.target_precision])
    if bundle is None or manifest is None:
        raise RequestError("there is no target to plan for; name a BUNDLE, or pass --target-shape")
    return count_target(bundle, manifest)


def _draft(bundle: Path | None, manifest: Manifest | None, box: Box, options: PlanOptions) -> ModelWork:
    if options.draft_shape is not None:
        shape = read_shape(options.draft_shape)
        work = shape.work(STORAGE[options.draft_precision], options.draft_vocabulary)
        return work.with_layers(options.draft_layers) if options.draft_layers else work
    device = options.draft_device or box.draft
    found = count_draft(bundle, manifest, device) if bundle is not None and manifest is not None else None
    if found is None:
        raise RequestError("there is no draft model to plan for; name a BUNDLE with one, or pass --draft-shape")
    return found.with_layers(options.draft_layers) if options.draft_layers else found


def _setting(box: Box, target: ModelWork, draft: ModelWork, curve: Curve, options: PlanOptions) -> Setting:
    return Setting(
        Part(target, box.device(options.target_device or box.target), box, draft=False),
        Part(draft, box.device(options.draft_device or box.draft), box, draft=True),
        curve,
        options.context,
    )


def _limits(manifest: Manifest | None, target: ModelWork, curve: Curve, options: PlanOptions) -> Limits:
    decoding = manifest.decoding if manifest is not None and options.target_shape is None else None
    own = manifest.draft if manifest is not None and options.draft_shape is None else None
    streams = (own.streams if own is not None else options.streams) or 0
    trained = decoding.trained_exits if decoding is not None else ()
    return Limits(
        exit_layers=trained or exit_layers(target.layers, curve),
        streams=min(streams, curve.streams),
        kappa=decoding.kappa if decoding is not None else MEASURED_KAPPA,
    )


def _choice(manifest: Manifest | None, best: Choice, options: PlanOptions) -> Choice:
    """Return the round to show: what the options say, else the bundle's settings, else the best."""
    own = _bundled(manifest, options, best)
    gamma = options.gamma or own.gamma
    return Choice(
        options.exit_layer or own.exit_layer,
        gamma,
        CandidateSource(options.candidates) if options.candidates else own.source,
        options.branches or own.branches,
        options.tokens_per_pass or own.tokens_per_pass,
    )


def _bundled(manifest: Manifest | None, options: PlanOptions, best: Choice) -> Choice:
    """Return the best round with what a bundle says of itself in its place."""
    if manifest is None or options.draft_shape is not None:
        return best
    settings, decoding = manifest.settings, manifest.decoding
    gamma = settings.gamma or decoding.gamma
    return Choice(
        best.exit_layer if options.target_shape else decoding.exit_layer,
        gamma,
        source_of(settings.candidates, manifest.draft.kind if manifest.draft else None),
        sum(settings.fanout) if settings.fanout else min(decoding.kappa, MOST_KAPPA) * (gamma + 1),
        settings.tokens_per_pass or (1,),
    )


def _check(choice: Choice, limits: Limits, layers: int) -> None:
    if not 0 < choice.exit_layer < layers:
        raise RequestError(
            f"exit_layer is {choice.exit_layer}; the target has {layers} layers: cut after 1 to {layers - 1}"
        )
    most = max(choice.tokens_per_pass)
    if most > 1 + limits.streams:
        raise RequestError(
            f"tokens_per_pass has {most}, the draft's {limits.streams} streams give {1 + limits.streams} at most; ask "
            "for fewer, or pass --streams with a draft shape that is to have them"
        )


# --- words ----------------------------------------------------------------------------------------


def _unsure(box: Box, setting: Setting) -> Iterator[str]:
    for profile in dict.fromkeys((setting.target.device.name, setting.draft.device.name)):
        device = box.devices[profile]
        precisions = {part.model.precision for part in (setting.target, setting.draft) if part.device is device}
        for name, figure in _figures(device, precisions):
            if figure.basis in (Basis.ASSUMED, Basis.FITTED):
                yield f"{device.name} {name} {figure.value:g}{_range(figure)} is {figure.basis.value}: {figure.source}"


def _figures(device: DeviceProfile, precisions: set[str]) -> Iterator[tuple[str, Figure]]:
    for field in dataclasses.fields(device):
        found = getattr(device, field.name)
        if isinstance(found, Figure):
            yield field.name, found
    for kind, figures in (("gb_s_by_precision", device.gb_s_by_precision), ("tops", device.tops)):
        yield from ((f"{kind}.{name}", figure) for name, figure in figures.items() if name in precisions)


def _range(figure: Figure) -> str:
    return "" if figure.low == figure.high else f" ({figure.low:g} to {figure.high:g})"


def _pass_cells(item: PassTime, device: str) -> tuple[str, ...]:
    return item.name, device, f"{item.ms:.2f}", item.bound


def _choice_cells(terms: RoundTerms) -> tuple[str, ...]:
    choice = terms.choice
    return (
        f"{terms.over_plain:.2f}",
        f"{terms.serial_over_plain:.2f}",
        choice.source.value,
        str(choice.exit_layer) if choice.source.needs_exit else "any",
        str(choice.gamma),
        str(choice.branches),
        ",".join(map(str, choice.tokens_per_pass)),
        f"{terms.round_ms:.2f}",
        f"{terms.tokens:.2f}",
        f"{terms.prepared:.2f}",
        "yes" if terms.fits else "no",
        terms.limit,
    )


def _size_cells(terms: RoundTerms, model: ModelWork, layers: int) -> tuple[str, ...]:
    return (
        str(layers),
        f"{model.with_layers(layers).parameters / 1e6:.1f}M",
        str(terms.choice.gamma),
        str(terms.choice.branches),
        ",".join(map(str, terms.choice.tokens_per_pass)),
        f"{rollout_ms(terms):.2f}",
        "yes" if terms.fits else "no",
        f"{terms.over_plain:.2f}",
        f"{terms.serial_over_plain:.2f}",
        f"{terms.needed_tokens:.2f}",
    )


def _round_json(terms: RoundTerms) -> dict[str, Any]:
    passes: Sequence[PassTime | None] = (terms.prefix, terms.exit_head, terms.suffix, terms.trunk, *terms.rollout)
    return {
        "choice": dataclasses.asdict(terms.choice),
        "passes": [{"name": item.name, "ms": item.ms, "bound": item.bound} for item in passes if item is not None],
        "target_beside_ms": terms.overlap.target_ms,
        "late_ms": terms.late_ms,
        "redraft_ms": terms.redraft_ms,
        "host_ms": terms.host_ms,
        "round_ms": terms.round_ms,
        "serial_ms": terms.serial_ms,
        "plain_ms": terms.plain_ms,
        "tokens_per_round": terms.tokens,
        "prepared": terms.prepared,
        "fits": terms.fits,
        "mirror_over_plain": terms.over_plain,
        "serial_over_plain": terms.serial_over_plain,
        "needed_tokens": terms.needed_tokens,
        "limit": terms.limit,
    }
