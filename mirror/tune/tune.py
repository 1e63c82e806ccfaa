"""`mirror tune`: measure a box, predict every choice, run the best few, and write the fastest into the bundle.

Nothing is chosen that wasn't run: predictions only say what to try. Where neither serial nor mirror beat
plain in every turn, plain is chosen.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mirror.bundle import MANIFEST_NAME, Manifest, Settings, check_files, read_manifest, write_manifest
from mirror.errors import DeviceError, RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.records import Mode
from mirror.targets import list_devices
from mirror.tune.choices import (
    Choice,
    Knowledge,
    Places,
    Prediction,
    best_of_each,
    more_and_fewer_branches,
    predict_mirror,
    predict_serial,
)
from mirror.tune.costs import PassCosts
from mirror.tune.measure import Probe, Speed, Workload, accepted_counts, probe, sample_prompts, speed, widest
from mirror.tune.outcomes import Sample, Shares, accepted_shares, foresee, rank_tokens, shares_of_counts

Say = Callable[[str], None]
# A gain that a machine's drift could feign is none.
LEAST_GAIN = 1.02


@dataclass(frozen=True)
class TuneOptions:
    """What may be tried, and how long; None leaves the choice to what is there.

    Attributes:
        target_devices, draft_devices: devices to try.
        suffix_device: where the suffix runs, if not with the target.
        exit_layers: layers to cut at, beside the present one.
        prompts, tokens: how many prompts, and how many tokens of each answer.
        turns: how often the best choices are run, one after the other.
        tries: how many mirror choices are run.
        pinned: whether every pass runs at one width; what is tuned so should be run so.
        prompt_file: what to answer instead of the project's own prompts; see `read_prompt_file`.
    """

    target_devices: tuple[str, ...] | None = None
    draft_devices: tuple[str, ...] | None = None
    suffix_device: str | None = None
    exit_layers: tuple[int, ...] | None = None
    prompts: int = 6
    tokens: int = 64
    turns: int = 3
    tries: int = 3
    threads: int | None = None
    pinned: bool = False
    prompt_file: Path | None = None


@dataclass(frozen=True)
class Row:
    """One choice of the table.

    Attributes:
        predicted: None for a choice that nothing was predicted of.
        tokens_per_s: the median over turns.
        ratios: speed over the best plain speed, by turn.
        same_text: whether every answer was plain's.
    """

    choice: Choice
    predicted: Prediction | None
    tokens_per_s: float
    ratios: tuple[float, ...]
    same_text: bool

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells, from the mode on."""
        choice, told, places = self.choice, self.predicted, self.choice.places
        plain, mirror = choice.mode is Mode.PLAIN, choice.mode is Mode.MIRROR
        return (
            choice.mode.value,
            places.target if plain else str(places),
            "" if plain else str(choice.exit_layer),
            "" if plain else str(choice.gamma),
            choice.source.value if mirror else "",
            ",".join(map(str, choice.fanout)) if mirror else "",
            "" if plain else _passes(choice),
            f"{told.shares.committed:.2f}" if told else "",
            f"{told.shares.prepared:.0%}" if told and mirror else "",
            f"{told.tokens_per_s:.1f}" if told else "",
            f"{self.tokens_per_s:.1f}",
            f"{self.ratio:.2f} ({min(self.ratios):.2f})",
            "same" if self.same_text else "other",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        told = self.predicted
        return {
            **{name: value for name, value in dataclasses.asdict(self.choice.settings()).items() if value is not None},
            "exit_layer": self.choice.exit_layer,
            "predicted_tokens_per_s": None if told is None else told.tokens_per_s,
            "predicted_tokens_per_round": None if told is None else told.shares.committed,
            "predicted_prepared": None if told is None else told.shares.prepared,
            "tokens_per_s": self.tokens_per_s,
            "times_plain": list(self.ratios),
            "same_text": self.same_text,
        }

    @property
    def pays(self) -> bool:
        """Whether it was faster than plain in every turn, and not by a hair."""
        return min(self.ratios) > 1.0 and self.ratio >= LEAST_GAIN


@dataclass(frozen=True)
class TuneReport:
    """What was run, what was chosen, and why in a sentence."""

    rows: tuple[Row, ...]
    chosen: Row
    reason: str
    settings: Settings

    columns: ClassVar[tuple[str, ...]] = (
        "", "mode", "devices", "exit", "gamma", "candidates", "branches", "tokens/pass", "tokens/round", "prepared",
        "predicted", "tokens/s", "times plain", "text",
    )  # fmt: skip

    def cells(self) -> list[tuple[str, ...]]:
        """Return the table's rows; `predicted` is in tokens/s, `times plain` the median and the worst turn."""
        return [("*" if row is self.chosen else "", *row.cells()) for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "reason": self.reason,
            "settings": dataclasses.asdict(self.settings),
            "rows": [{**row.to_json(), "chosen": row is self.chosen} for row in self.rows],
        }


def tune_bundle(bundle: Path, options: TuneOptions, say: Say, *, write: bool = True) -> TuneReport:
    """Find the fastest way to run a bundle here, and write it into its settings.

    Args:
        say: is told what is being done, a line at a time.
        write: whether the bundle is changed: its settings, and its cut where another exit layer won.

    Raises:
        BundleError: the bundle is not whole.
        DeviceError: no device of those asked for can run it.
        RequestError: an exit layer that the bundle can't be cut at, or prompts that can't be read.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    prompts = sample_prompts(bundle, manifest, options.prompts, options.prompt_file)
    work = Workload(prompts, options.tokens, options.threads, options.pinned)
    targets, drafts = _devices(options)
    with _cuts(bundle, manifest, _exit_layers(manifest, options, say), say) as folders:
        known: list[Knowledge] = []
        if manifest.draft is not None and manifest.draft.kind == "model":
            known = list(_explore(folders, manifest, targets, drafts, options, work, say))
        mirror = [item for part in known for item in predict_mirror(part, manifest.decoding.kappa)]
        serial = [item for part in known for item in predict_serial(part)]
        predictions = [*best_of_each(mirror, options.tries), *best_of_each(serial, 1)]
        tried = [item.choice for item in predictions] or _unpredicted(manifest, targets, drafts, options)
        plain = [
            Choice(Mode.PLAIN, Places(target, target, options.suffix_device), manifest.decoding.exit_layer)
            for target in targets
        ]
        rows = _race(folders, [*plain, *tried], mirror + serial, work, options.turns, say)
    report = _decide(rows)
    if write:
        _write(bundle, manifest, report)
    return report


# --- what to try ----------------------------------------------------------------------------------


def _devices(options: TuneOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the devices to try for target and draft.

    Unless asked for others: the first NVIDIA GPU or the CPU for the target, and for the draft that GPU, a quarter of
    it, and all that isn't one.
    """
    present = {device.name for device in list_devices() if device.available}
    targets = options.target_devices or (("cuda:0",) if "cuda:0" in present else ("cpu",))
    likely = [name for name in ("cpu", "openvino:CPU", "openvino:NPU", "qnn:htp", "openvino:GPU") if name in present]
    shared = [name for target in targets if target.startswith("cuda") for name in (target, f"{target}:0.25")]
    drafts = options.draft_devices or tuple(dict.fromkeys([*likely, *shared]))
    return targets, drafts


def _exit_layers(manifest: Manifest, options: TuneOptions, say: Say) -> tuple[int, ...]:
    """Return the layers to cut at, the present one first."""
    decoding, draft = manifest.decoding, manifest.draft
    wanted = options.exit_layers or decoding.trained_exits
    wrong = [layer for layer in wanted if not 1 <= layer < manifest.model.layers]
    if wrong:
        raise RequestError(
            f"exit layer {wrong[0]} is asked for; this target can be cut at 1..{manifest.model.layers - 1}"
        )
    layers = tuple(dict.fromkeys([decoding.exit_layer, *wanted]))
    if draft is None or draft.kind != "model" or len(layers) == 1:
        return layers[:1]
    if draft.feature_layer is not None:
        say(f"exit layer {draft.feature_layer} stays: its state feeds the draft")
        return layers[:1]
    if importlib.util.find_spec("onnx_ir") is None:
        say('exit layer stays: cutting anew needs pip install "mirror-sd[export]"')
        return layers[:1]
    return layers


@contextmanager
def _cuts(bundle: Path, manifest: Manifest, layers: Sequence[int], say: Say) -> Iterator[Mapping[int, Path]]:
    """Yield a folder for each exit layer: the bundle's own, and passing ones beside it that share its weights."""
    folders = {layers[0]: bundle}
    if len(layers) == 1:
        yield folders
        return
    from mirror.export.recut import recut_bundle

    scratch = Path(tempfile.mkdtemp(prefix=f".{bundle.name}.tune-", dir=bundle.absolute().parent))
    try:
        for layer in layers[1:]:
            say(f"cutting after layer {layer} of {manifest.model.layers}")
            folders[layer] = scratch / str(layer)
            recut_bundle(bundle, exit_layer=str(layer), output=folders[layer])
        yield folders
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpredicted(
    manifest: Manifest, targets: Sequence[str], drafts: Sequence[str], options: TuneOptions
) -> list[Choice]:
    """Return what is run where nothing can be predicted: an n-gram draft in both modes, or nothing."""
    if manifest.draft is None or manifest.draft.kind == "model":
        return []
    whole = [widest(manifest, Places(target, "cpu", options.suffix_device)) for target in targets]
    return [*whole, *(dataclasses.replace(choice, mode=Mode.SERIAL, fanout=()) for choice in whole)]


def _passes(choice: Choice) -> str:
    """Return tokens per pass, and after a stroke those of proposals where they are others."""
    parts = [choice.tokens_per_pass, choice.proposal_tokens_per_pass]
    return " / ".join(",".join(map(str, part)) for part in parts if part)


# --- measuring ------------------------------------------------------------------------------------


def _explore(
    folders: Mapping[int, Path],
    manifest: Manifest,
    targets: Sequence[str],
    drafts: Sequence[str],
    options: TuneOptions,
    work: Workload,
    say: Say,
) -> Iterator[Knowledge]:
    """Yield what is measured for every pair of devices and every exit layer."""
    first = next(iter(folders))
    gamma = manifest.decoding.gamma
    stands: Mapping[tuple[int, ...], Sequence[Shares]] = {}
    cuts: dict[int, tuple[float, tuple[Sample, ...]]] = {}
    for target in targets:
        for draft in drafts:
            choice = widest(manifest, Places(target, draft, options.suffix_device))
            say(f"measuring {choice.places}")
            try:
                found = probe(folders[first], choice, work, narrower=sorted({1, max(gamma // 2, 1)} - {gamma}))
            except DeviceError as error:
                say(f"left out: {error}")
                continue
            if not cuts:
                cuts = _explore_cuts(folders, choice, found, work, say)
                stands = _stands(folders[first], choice, manifest, cuts[first][1], work, say)
            for layer, (share, samples) in cuts.items():
                yield _knowledge(choice.places, layer, found, share, samples, stands, manifest.decoding.kappa)


def _explore_cuts(
    folders: Mapping[int, Path], choice: Choice, found: Probe, work: Workload, say: Say
) -> dict[int, tuple[float, tuple[Sample, ...]]]:
    """Return, for each exit layer, the prefix's share of the target's time, and the answers with its candidates."""
    cuts = {choice.exit_layer: (_prefix_share(found.mirror, choice.gamma), found.samples)}
    for layer, folder in folders.items():
        if layer not in cuts:
            say(f"measuring the exit after layer {layer}")
            lean = dataclasses.replace(choice, exit_layer=layer, fanout=(1,) * (choice.gamma + 1))
            other = probe(folder, lean, work, serial=False)
            cuts[layer] = (_prefix_share(other.mirror, choice.gamma), other.samples)
    return cuts


def _prefix_share(costs: PassCosts, gamma: int) -> float:
    return costs.ms("target_prefix", gamma + 1) / costs.target_ms(gamma + 1)


def _stands(
    folder: Path, choice: Choice, manifest: Manifest, samples: Sequence[Sample], work: Workload, say: Say
) -> dict[tuple[int, ...], list[Shares]]:
    """Return how often draft tokens stand, for each window up to the widest, by tokens per pass."""
    right = [rank_tokens(sample, CandidateSource.DRAFT).right for sample in samples]
    gammas = range(1, choice.gamma + 1)
    stands: dict[tuple[int, ...], list[Shares]] = {(1,): [accepted_shares(right, gamma) for gamma in gammas]}
    streams = manifest.draft.streams if manifest.draft is not None else 0
    schedules: set[tuple[int, ...]] = {(most,) for most in {2, 1 + streams} & set(range(2, 2 + streams))}
    if streams and choice.gamma > 3:
        schedules.add((1, 1, 1, 1 + streams))  # the first tokens, which most windows end at, one by one
    if manifest.settings.tokens_per_pass is not None:
        schedules.add(manifest.settings.tokens_per_pass)
    for passes in sorted(schedules - set(stands)):
        say(f"measuring {', '.join(map(str, passes))} tokens per pass")
        serial = dataclasses.replace(choice, mode=Mode.SERIAL, fanout=(), tokens_per_pass=passes)
        counts = accepted_counts(folder, serial, work)
        if counts:
            stands[passes] = [shares_of_counts(counts, gamma) for gamma in gammas]
    return stands


def _knowledge(
    places: Places,
    layer: int,
    found: Probe,
    share: float,
    samples: Sequence[Sample],
    stands: Mapping[tuple[int, ...], Sequence[Shares]],
    kappa: int,
) -> Knowledge:
    assert found.serial is not None
    foresight = {source: foresee(samples, source, kappa) for source in CandidateSource}
    return Knowledge(places, layer, found.mirror.cut_at(share), found.serial.cut_at(share), foresight, stands)


def _race(
    folders: Mapping[int, Path],
    choices: Sequence[Choice],
    predictions: Sequence[Prediction],
    work: Workload,
    turns: int,
    say: Say,
) -> list[Row]:
    """Run every choice in turns, and what lies beside the fastest mirror one; return the rows, plain ones first.

    Args:
        predictions: of all that may be chosen.
    """
    speeds: dict[Choice, list[Speed]] = {}

    def run(some: Sequence[Choice]) -> None:
        for choice in some:
            try:
                speeds.setdefault(choice, []).append(speed(folders[choice.exit_layer], choice, work))
            except DeviceError as error:
                say(f"left out: {choice.mode.value} on {choice.places}: {error}")
                del speeds[choice]

    say(f"running {len(choices)} choices, turn 1 of {turns}")
    run(choices)
    # What branches cost is foreseen the worst: passes were timed one by one, and follow each other in a rollout.
    tried = set(choices)
    while beside := [choice for choice in _beside_fastest(speeds, predictions) if choice not in tried]:
        say(f"running {' and '.join(str(choice.branches) for choice in beside)} branches, turn 1 of {turns}")
        run(beside)
        tried.update(beside)
    for turn in range(1, turns):
        say(f"running {len(speeds)} choices, turn {turn + 1} of {turns}")
        run(list(speeds))
    done = {choice: found for choice, found in speeds.items() if len(found) == turns}
    plain = [found for choice, found in done.items() if choice.mode is Mode.PLAIN]
    if not plain:
        raise DeviceError("no device could run the target in plain mode; the notes above say why")
    best = [max(found[turn].tokens_per_s for found in plain) for turn in range(turns)]
    told = {item.choice: item for item in predictions}
    return [_row(choice, told.get(choice), found, best, plain[0]) for choice, found in done.items()]


def _beside_fastest(speeds: Mapping[Choice, Sequence[Speed]], predictions: Sequence[Prediction]) -> list[Choice]:
    """Return the choices with fewer and with more branches than the fastest mirror one of the first turn."""
    mirror = [choice for choice in speeds if choice.mode is Mode.MIRROR]
    if not mirror:
        return []
    fastest = max(mirror, key=lambda choice: speeds[choice][0].tokens_per_s)
    return [item.choice for item in more_and_fewer_branches(fastest, predictions)]


def _row(
    choice: Choice,
    predicted: Prediction | None,
    found: Sequence[Speed],
    plain_tokens_per_s: Sequence[float],
    reference: Sequence[Speed],
) -> Row:
    return Row(
        choice,
        predicted,
        statistics.median(item.tokens_per_s for item in found),
        tuple(item.tokens_per_s / plain for item, plain in zip(found, plain_tokens_per_s, strict=True)),
        all(item.texts == reference[0].texts for item in found),
    )


# --- deciding -------------------------------------------------------------------------------------


def _decide(rows: Sequence[Row]) -> TuneReport:
    """Return the report: the fastest that pays, else the fastest plain."""
    paying = [row for row in rows if row.choice.mode is not Mode.PLAIN and row.pays]
    if paying:
        chosen = max(paying, key=lambda row: row.ratio)
        reason = f"{chosen.choice.mode.value} on {chosen.choice.places}: {chosen.ratio:.2f} times plain"
    else:
        chosen = max((row for row in rows if row.choice.mode is Mode.PLAIN), key=lambda row: row.tokens_per_s)
        others = [row for row in rows if row.choice.mode is not Mode.PLAIN]
        best = max(others, key=lambda row: row.ratio, default=None)
        told = f"; the best other choice, {best.choice.mode.value}, made {best.ratio:.2f} of its speed" if best else ""
        reason = f"plain on {chosen.choice.places.target}: drafting does not pay on this box{told}"
    return TuneReport(tuple(rows), chosen, reason, chosen.choice.settings())


def _write(bundle: Path, manifest: Manifest, report: TuneReport) -> None:
    """Put the settings into the bundle, and cut it anew where another layer won."""
    layer = report.chosen.choice.exit_layer
    if layer != manifest.decoding.exit_layer:
        from mirror.export.recut import recut_bundle

        manifest = recut_bundle(bundle, exit_layer=str(layer))
    # Written beside it and renamed: a half-written one never exists.
    with tempfile.TemporaryDirectory(prefix=f".{bundle.name}.tune-", dir=bundle.absolute().parent) as scratch:
        settings = dataclasses.replace(report.settings, draft_context=manifest.settings.draft_context)
        write_manifest(Path(scratch), dataclasses.replace(manifest, settings=settings))
        os.replace(Path(scratch) / MANIFEST_NAME, bundle / MANIFEST_NAME)
