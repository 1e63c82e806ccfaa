"""`mirror export`: a checkpoint -> a bundle, written beside its final place and renamed when it is whole."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from transformers import PretrainedConfig

from mirror.bundle import (
    DRAFT_CONTEXT,
    ROLLOUT_SLOTS,
    SCHEMA_VERSION,
    Decoding,
    DraftFacts,
    FileFacts,
    Manifest,
    ModelFacts,
    Producer,
    Settings,
    Tokens,
    file_sha256,
    write_manifest,
)
from mirror.errors import ExportError
from mirror.export.bind import Binder, Precision, suits_integers
from mirror.export.chat_format import chat_format
from mirror.export.checkpoint import Checkpoint, eos_ids, open_checkpoint, tokenizer_fingerprint
from mirror.export.cut import exit_layer_of
from mirror.export.distilled import Defaults, open_distilled
from mirror.export.draft import DraftChoice, check_same_tokens, parse_draft, take_layers, with_layers
from mirror.export.normalize import normalize
from mirror.export.progress import Progress, Silent
from mirror.export.recut import INT8_SOURCE, write_segments
from mirror.export.selfcheck import CheckReport, check
from mirror.export.trace import Aliases, Traced, remembering, trace
from mirror.export.vocabulary import TrimmedSource, Vocabulary, only_trimmed
from mirror.export.weights import DRAFT_SCOPE, WeightFile, WeightSource
from mirror.version import __version__

POSITION_SLACK = 256  # rotary tables reach past max_length, for windows and padding rows at its end
WEIGHT_FILE = "weights/mirror.bin"
_TORCH_TYPES = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


@dataclass(frozen=True)
class ExportOptions:
    """What `mirror export` can be told.

    Attributes:
        exit_layer: a number of layers or a fraction of them; None takes the trained draft's, else half.
        kappa: None takes what the trained draft's fan-out needs, else 8.
        draft_vocabulary: tokens that the draft's and the exit's heads know; None takes the trained draft's
            suggestion, 0 means all.
        int8_draft: whether a draft gets graphs of its own for ONNX Runtime's CPU, with products of 8-bit integers;
            None means one that `mirror distill` made. The more layers, the more of its guesses that changes.
    """

    exit_layer: str | None = None
    gamma: int = 7
    kappa: int | None = None
    max_length: int = 2048
    precision: str = "fp32"
    draft: str | None = "ngram"
    draft_vocabulary: int | None = None
    prefill_chunk: int = 128
    int8_draft: bool | None = None
    force: bool = False
    allow_failed_check: bool = False


@dataclass(frozen=True)
class ExportReport:
    """What came out: the manifest and the self-check."""

    manifest: Manifest
    check: CheckReport


def export_bundle(model: str, output: Path, options: ExportOptions, progress: Progress | None = None) -> ExportReport:
    """Export a checkpoint to a bundle folder.

    Args:
        model: a Hugging Face folder, a hub id, or a GGUF file.
        output: the bundle folder; must not exist unless `options.force`.

    Raises:
        ExportError: the checkpoint, the options or the disk don't allow it; nothing is left behind.
        SelfCheckError: the graphs don't compute what the checkpoint does.
    """
    progress = progress or Silent()
    _check_output(output, options.force)
    checkpoint = open_checkpoint(model)
    job = _Job(checkpoint, options, progress)
    _check_room(checkpoint, job.precision, output)
    with _temporary_sibling(output) as folder:
        report = job.run(folder)
        _move_into_place(folder, output)
    return report


class _Job:
    """One export: the checked options and the steps over one folder."""

    def __init__(self, checkpoint: Checkpoint, options: ExportOptions, progress: Progress) -> None:
        config = checkpoint.config
        self.checkpoint, self.options, self.progress = checkpoint, options, progress
        self._trace = remembering(trace)
        self.precision = _precision(options.precision)
        self.draft: DraftChoice = parse_draft(options.draft, config.num_hidden_layers)
        self.distilled = open_distilled(self.draft.model) if self.draft.model else None
        self.defaults = self.distilled.defaults if self.distilled is not None else Defaults()
        self.exit_layer = self._exit_layer()
        self.vocabulary = self._vocabulary()
        self.kappa = options.kappa or max(self.defaults.kappa or 8, *(self.defaults.fanout or (0,)))
        other = self.draft.model if self.distilled is None else None
        self.draft_checkpoint = open_checkpoint(other, DRAFT_SCOPE) if other else None
        _positive("gamma", options.gamma, 64)
        _positive("kappa", self.kappa, 64)
        limit = int(getattr(config, "max_position_embeddings", 0) or 2**20)
        self.max_length = min(options.max_length, limit)
        _positive("max-length", self.max_length, 2**20)

    def run(self, folder: Path) -> ExportReport:
        (folder / "weights").mkdir()
        tokenizer = self.checkpoint.write_tokenizer(folder)
        tokens = self._tokens(folder, tokenizer)
        self._check_draft(tokens)
        file = WeightFile(folder / WEIGHT_FILE, WEIGHT_FILE, self.progress.advance)
        binder = Binder(folder, self.checkpoint.weights, self.precision, file)
        self.progress.start(f"trace {self.checkpoint.architecture}", None)
        traced = self._trace(self.checkpoint.config, _TORCH_TYPES.get(self.precision.float_type, torch.float32))
        exits = self._save_target(folder, traced, binder)
        draft = self._write_draft(folder, binder)
        options = self.options
        if options.int8_draft and not (folder / INT8_SOURCE).is_file():
            raise ExportError(
                "--int8-draft needs a draft that is a model, all of whose matrices belong to linear layers; "
                f"{options.draft} isn't one; leave it out"
            )
        decoding = Decoding(self.exit_layer, options.gamma, self.kappa, self.max_length, options.prefill_chunk, exits)
        self.progress.start("cut", None)
        segments = write_segments(folder, decoding)
        facts = ModelFacts(
            architecture=self.checkpoint.architecture,
            model_type=self.checkpoint.config.model_type,
            layers=traced.layers,
            hidden_size=self.checkpoint.config.hidden_size,
            vocab_size=self.checkpoint.config.vocab_size,
            max_positions=_positions(self.checkpoint, self.max_length),
            precision=self.precision.value,
            fingerprint=self.checkpoint.fingerprint,
        )
        producer = Producer(__version__, self.checkpoint.name, " ".join(["mirror", *sys.argv[1:]]))
        files, settings = self._files(folder), self._settings(draft)
        chat = chat_format(folder)
        manifest = Manifest(SCHEMA_VERSION, producer, facts, decoding, tokens, draft, segments, files, settings, chat)
        write_manifest(folder, manifest)
        self.progress.start("self-check", None)
        report = check(folder, manifest, self.checkpoint)
        report.raise_if_failed(allowed=self.options.allow_failed_check)
        return ExportReport(manifest, report)

    def _exit_layer(self) -> int:
        """Return where to cut: as asked, where the trained draft wants it, or halfway."""
        fed = self.distilled.feature_layer if self.distilled is not None else None
        trained = fed if fed is not None else self.defaults.exit_layer
        asked = self.options.exit_layer or (str(trained) if trained is not None else "0.5")
        layer = _exit_layer(asked, self.checkpoint.config.num_hidden_layers)
        if fed is not None and layer != fed:
            raise ExportError(
                f"--exit-layer is {asked} and the draft is fed by the state after layer {fed}; leave it out, or "
                "distill a draft without features"
            )
        return layer

    def _vocabulary(self) -> Vocabulary | None:
        """Return the tokens that the draft's and the exit's heads know, None for all."""
        suggested = self.distilled.suggested_vocabulary if self.distilled is not None else None
        count = suggested if self.options.draft_vocabulary is None else self.options.draft_vocabulary
        if not count or count >= self.checkpoint.config.vocab_size:
            return None
        if self.distilled is None:
            raise ExportError(
                f"--draft-vocabulary is {count} and {self.options.draft} ranks no tokens; it needs a draft that "
                "`mirror distill` made"
            )
        return Vocabulary(self.distilled.vocabulary(count))

    def _settings(self, draft: DraftFacts | None) -> Settings:
        """Return what the trained draft's measurements suggest, as far as it fits this bundle."""
        defaults = self.defaults
        fanout = defaults.fanout if len(defaults.fanout or ()) == self.options.gamma + 1 else None
        if fanout is not None and max(fanout) > self.kappa:
            fanout = None
        streams = draft is not None and draft.streams > 0
        return Settings(
            candidates=defaults.candidates,
            fanout=fanout,
            tokens_per_pass=defaults.tokens_per_pass if streams else None,
            draft_context=DRAFT_CONTEXT if self._reads_alone(draft) else None,
            adapt_branches=True if draft is not None and draft.kind == "model" else None,
        )

    def _reads_alone(self, draft: DraftFacts | None) -> bool:
        """Whether the draft is one that `mirror distill` trained on texts, and not on the target's states as well."""
        return self.distilled is not None and draft is not None and draft.feature_layer is None

    def _tokens(self, folder: Path, tokenizer: Path | None) -> Tokens:
        config = self.checkpoint.config
        pad = config.pad_token_id if isinstance(config.pad_token_id, int) and config.pad_token_id >= 0 else None
        eos = eos_ids(self.checkpoint, folder)
        return Tokens(config.bos_token_id, eos, pad, tokenizer_fingerprint(tokenizer))

    def _check_draft(self, tokens: Tokens) -> None:
        if self.distilled is not None:
            self.distilled.check_target(self.checkpoint.name, self.checkpoint.fingerprint, tokens.tokenizer_fingerprint)
        if self.draft_checkpoint is None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            found = tokenizer_fingerprint(self.draft_checkpoint.write_tokenizer(Path(scratch)))
        check_same_tokens(self.checkpoint, self.draft_checkpoint, tokens.tokenizer_fingerprint, found)

    def _write_draft(self, folder: Path, binder: Binder) -> DraftFacts | None:
        choice, target = self.draft, self.checkpoint
        if choice == DraftChoice():
            return None
        if choice.ngram:
            return _ngram(target)
        if self.distilled is not None and not self.distilled.has_draft:
            return _ngram(target)
        config, weights = self._draft_model(binder.source)
        binder = binder.of(weights)
        layers, streams, fed = self._write_draft_source(folder / "draft.source.onnx", config, binder)
        wanted = self.options.int8_draft
        if wanted or (wanted is None and self.distilled is not None):
            self._write_draft_source(folder / INT8_SOURCE, config, binder.of_integers())
        known = config.vocab_size if self.vocabulary is None else len(self.vocabulary.ids)
        return DraftFacts("model", self._draft_name(), layers, config.vocab_size, known, streams, fed)

    def _write_draft_source(self, path: Path, config: PretrainedConfig, binder: Binder) -> tuple[int, int, int | None]:
        """Write a source graph of the draft, but none of integers where its matrices can't be such.

        Returns:
            Its layers, its streams, and the exit layer that feeds it.
        """
        self.progress.start("trace draft", None)
        traced = self._trace(config, _TORCH_TYPES.get(binder.dtype, torch.float32))
        names = take_layers(traced, self.draft.layers) if self.draft.layers else traced.parameters
        model, aliases, binder = self._normalised("draft", traced, names, binder)
        streams, fed = 0, None
        if not binder.integers or suits_integers(model.graph, aliases):
            binder.bind(model.graph, aliases)
            if self.distilled is not None:
                streams, fed = self.distilled.add_draft_inputs(model.graph, binder)
            ir.save(model, path)
        return traced.layers, streams, fed

    def _draft_name(self) -> str:
        # A folder's name, not its place: bundles travel.
        return Path(self.distilled.folder).name if self.distilled is not None else str(self.options.draft)

    def _draft_model(self, target: WeightSource) -> tuple[PretrainedConfig, WeightSource]:
        """Return the config and the tensors of a draft that is a model."""
        if self.distilled is not None:
            return self.distilled.draft_config(), self.distilled.draft_weights(target)
        if self.draft_checkpoint is not None:
            return self.draft_checkpoint.config, self.draft_checkpoint.weights
        return with_layers(self.checkpoint.config, self.draft.layers), target

    def _save_target(self, folder: Path, traced: Traced, binder: Binder) -> tuple[int, ...]:
        """Write the target's source graph; return the exit layers that got a trained head."""
        model, aliases, binder = self._normalised("target", traced, traced.parameters, binder)
        binder.bind(model.graph, aliases)
        exits: tuple[int, ...] = ()
        if self.distilled is not None:
            exits = self.distilled.add_exit_heads(model.graph, binder)
        ir.save(model, folder / "target.source.onnx")
        return exits

    def _normalised(
        self, name: str, traced: Traced, aliases: Mapping[str, Aliases], binder: Binder
    ) -> tuple[ir.Model, Mapping[str, Aliases], Binder]:
        """Return a traced graph, normalised and with a head of its own for a trimmed vocabulary, and what binds it."""
        # An attention operator wants tables as long as the slots that it looks at, rows of branches included.
        slots = ROLLOUT_SLOTS if name == "draft" else 0
        model = normalize(traced, _positions(self.checkpoint, self.max_length) + slots)
        self.progress.start(f"weights of the {name}", None)
        if self.vocabulary is not None:
            added = self.vocabulary.add_logits(model.graph, aliases)
            binder = binder.of(TrimmedSource(binder.source, self.vocabulary.ids, added))
            aliases = {**aliases, **{new: (new,) for new in added}}
            if name == "draft":
                only_trimmed(model.graph)
                ir_passes.RemoveUnusedNodesPass()(model)
            self.vocabulary.add_ids(model.graph)
        return model, aliases, binder

    def _files(self, folder: Path) -> dict[str, FileFacts]:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.progress.start("hash", sum(path.stat().st_size for path in paths))
        files = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets go of the interpreter's lock
            for path, digest in zip(paths, pool.map(file_sha256, paths), strict=True):
                size = path.stat().st_size
                files[path.relative_to(folder).as_posix()] = FileFacts(size, digest)
                self.progress.advance(size)
        return files


def _ngram(target: Checkpoint) -> DraftFacts:
    vocab = int(target.config.vocab_size)
    return DraftFacts("ngram", "ngram", 0, vocab, vocab)


def _positions(checkpoint: Checkpoint, max_length: int) -> int:
    """Return how many positions the graphs know: their tables', or fewer where positions are learned."""
    learned = int(getattr(checkpoint.config, "max_position_embeddings", 0) or 0)
    rotary = getattr(checkpoint.config, "rope_parameters", None)
    return max_length + POSITION_SLACK if rotary or not learned else learned


def _precision(text: str) -> Precision:
    try:
        return Precision(text)
    except ValueError:
        names = ", ".join(precision.value for precision in Precision)
        raise ExportError(f"precision {text} is not known; choose one of {names}") from None


def _exit_layer(text: str, layers: int) -> int:
    try:
        return exit_layer_of(text, layers)
    except ValueError as error:
        raise ExportError(f"--exit-layer: {error}") from error


def _positive(name: str, number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise ExportError(f"--{name} is {number}; give 1..{most}")


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise ExportError(f"{output} exists; choose another folder or add --force to replace it")
    if not output.absolute().parent.is_dir():
        raise ExportError(f"{output.absolute().parent} does not exist; create it first")


def _check_room(checkpoint: Checkpoint, precision: Precision, output: Path) -> None:
    """Refuse when the converted weights can't fit on the disk."""
    paths = [checkpoint.path] if checkpoint.is_gguf else list(checkpoint.path.glob("*.safetensors"))
    stored = sum(path.stat().st_size for path in paths)
    growth = {Precision.FP32: 2.0, 8: 0.6, 4: 0.35}.get(precision.bits or precision, 0.0)
    needed = int(stored * (8 if checkpoint.is_gguf and precision is Precision.FP32 else growth))
    free = shutil.disk_usage(output.absolute().parent).free
    if needed > free:
        raise ExportError(
            f"the bundle may need {needed / 2**30:.1f} GiB at {output.absolute().parent}, which has "
            f"{free / 2**30:.1f} GiB free; make room or choose another folder"
        )


@contextmanager
def _temporary_sibling(output: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `output`, on the same file system; it is removed whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent))
    try:
        yield folder
    except OSError as error:
        raise ExportError(f"the bundle could not be written: {error}; nothing was left behind") from error
    except MemoryError as error:
        raise ExportError("not enough memory to convert the weights; nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(folder: Path, output: Path) -> None:
    folder.chmod(0o755)
    if output.exists():
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
        os.replace(folder, output)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(folder, output)
