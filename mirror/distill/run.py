"""`mirror distill`: a target in, a folder with a trained draft and exit heads out.

    OUT/
      distill.json                  what was made for which target, by which recipe, with which results
      exit_head_15.safetensors ..   one adapter for each exit layer
      draft/config.json             the draft, without the embedding and LM head that it shares
      draft/model.safetensors
      vocabulary.safetensors        the target's tokens, the most frequent in its answers first
      README.md  training.svg       the model card and its curves
      log.jsonl                     every 20th step's losses, every measurement

While it trains, `OUT/training/` holds the checkpoint. `distill.json` is written last: a folder that
has one is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file, save_file

from mirror.distill.card import write_card
from mirror.distill.data import Corpus, DataOptions, Ints, coverage_of, held_out, make_corpus, ranking
from mirror.distill.heads import ExitHead, exit_head_file, grown, load_exit_head, save_exit_head
from mirror.distill.plot import write_plot
from mirror.distill.progress import DistillProgress, SilentProgress
from mirror.distill.student import (
    Student,
    StudentOptions,
    load_student,
    make_student,
    norm_eps,
    save_student,
    spread_layers,
    student_of,
    take_up,
)
from mirror.distill.target import Target, load_target, target_fingerprint
from mirror.distill.train import LOG_FILE, Pupils, Trainer, TrainOptions, TrainReport
from mirror.errors import DraftError, ExportError

FORMAT = 2
FACTS_FILE = "distill.json"
DRAFT_FOLDER = "draft"
CARD_FILE = "README.md"
PLOT_FILE = "training.svg"
VOCABULARY_FILE = "vocabulary.safetensors"
_VOCABULARY_STEP = 4096  # sizes of a trimmed vocabulary that are considered
_TRAINING = "training"


@dataclass(frozen=True)
class DistillOptions:
    """What is trained and from what.

    `exit_layers`: None for half and two thirds of the target's. `draft_layers`: which of the target's layers the draft
    starts as; None for those of `start`, else four of them, () for no draft. `draft_model`: a small model with the
    target's tokenizer to start from instead. `streams`: speculative streams of the draft. `feature_layer`: the exit
    layer whose state feeds the draft; None for none. `adapter_sizes`: the inner width of the exit heads, one for all
    or one for each. `start`: a finished training for the same target to go on from; its exit heads may grow, its draft
    by inner channels and by layers, of which it may also leave some out. `draft_intermediate`: inner channels of the
    draft's feed-forward parts, at least the target's; None for those. `frozen_exit_heads`: take the exit heads of
    `start` over as they are, at no cost. `vocabulary_coverage`: the share of held-out answer tokens that the suggested
    trimmed vocabulary has to hold. `int8`: store matrices as 8-bit integers. `device`: None for CUDA where there is
    one. `cache`: where corpora are kept; None for a folder beside the output.
    """

    exit_layers: tuple[int, ...] | None = None
    draft_layers: tuple[int, ...] | None = None
    draft_model: Path | None = None
    streams: int = 3
    feature_layer: int | None = None
    adapter_sizes: tuple[int, ...] = (1536,)
    start: Path | None = None
    draft_intermediate: int | None = None
    frozen_exit_heads: bool = False
    vocabulary_coverage: float = 0.99
    int8: bool = True
    held_out_share: float = 0.004
    device: str | None = None
    cache: Path | None = None
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)


@dataclass(frozen=True)
class DistillReport:
    """What was made: the folder, whether training reached its end, and the last held-out figures."""

    folder: Path
    finished: bool
    figures: dict[str, float]


def distill(
    target: str, output: Path, options: DistillOptions, progress: DistillProgress | None = None
) -> DistillReport:
    """Train a draft and exit heads for a target, or go on with a training that was stopped.

    Args:
        target: a Hugging Face folder, a hub id or a GGUF file, as `mirror export` takes.
        output: the folder to make.
        options: what to train and from what.
        progress: told about every stage.

    Raises:
        ExportError: the target or the prompts can't be used.
        DraftError: the folder holds a finished training, or one of another recipe.
    """
    progress = progress or SilentProgress()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_target(target, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    recipe = _recipe(loaded, options)
    _check_output(output, recipe)
    corpus = make_corpus(loaded, options.data, options.cache or output.with_name(output.name + ".corpus"), progress)
    pupils = _pupils(loaded, options, recipe)
    split = held_out(corpus, options.held_out_share, options.data.seed)
    trainer = Trainer(loaded, pupils, corpus, split, options.train, output / _TRAINING)
    report = trainer.run(progress)
    if report.finished:
        _write(_Made(loaded, pupils, corpus, split, options, recipe, report), output)
    return DistillReport(output, report.finished, dict(report.figures))


def load_pupils(folder: Path, target: Target) -> Pupils:
    """Return the draft and exit heads of a finished training, for the target that they were made for.

    Raises:
        DraftError: the folder is incomplete, or was made for another target or tokenizer.
    """
    facts = read_facts(folder)
    check_made_for(folder, facts, target_fingerprint(target.checkpoint))
    heads = {
        layer: load_exit_head(folder, layer, facts["norm_eps"]).to(target.device) for layer in facts["exit_layers"]
    }
    draft = facts["draft"]
    student = None if draft is None else load_student(folder / DRAFT_FOLDER, target)
    return Pupils(student, heads, None if draft is None else draft["feature_layer"])


def load_ranking(folder: Path) -> list[int]:
    """Return the target's tokens by falling frequency, as a finished training ranked them.

    Raises:
        DraftError: the folder has no ranking.
    """
    path = folder / VOCABULARY_FILE
    if not path.is_file():
        raise DraftError(f"{folder} has no {VOCABULARY_FILE}; train again")
    ids: list[int] = load_file(path)["ids"].tolist()
    return ids


def set_defaults(folder: Path, defaults: dict[str, Any]) -> None:
    """Write into `distill.json` what an export should do when it is told nothing."""
    _write_facts(read_facts(folder) | {"defaults": defaults}, folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """Return `distill.json` of a folder.

    Raises:
        DraftError: it is missing, unreadable or of another version.
    """
    path = folder / FACTS_FILE
    if not path.is_file():
        raise DraftError(f"{folder} has no {FACTS_FILE}: it is no finished training; make one with `mirror distill`")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DraftError(f"{path} is not readable JSON ({error}); train again") from error
    if facts.get("format") != FORMAT:
        raise DraftError(f"{path} has format {facts.get('format')!r}, expected {FORMAT}; train again")
    return facts


def check_made_for(folder: Path, facts: dict[str, Any], target: dict[str, str]) -> None:
    """Refuse a draft or exit heads that were made for another target.

    Raises:
        DraftError: target or tokenizer have another fingerprint.
    """
    for name, what in (("fingerprint", "target"), ("tokenizer_fingerprint", "tokenizer")):
        made, given = facts["target"][name], target[name]
        if made != given:
            raise DraftError(
                f"{folder} was made for another {what} ({facts['target']['name']}, {made[:12]}) than this one "
                f"({given[:12]}); train for this target with `mirror distill`"
            )


def _recipe(target: Target, options: DistillOptions) -> dict[str, Any]:
    """Return the settled choices as JSON values: what two runs must share to be one training."""
    total = int(target.config.num_hidden_layers)
    exits, sizes = _exit_heads(options, total)
    layers = _draft_layers(options, total)
    fed = options.feature_layer
    asked = [*exits, *(() if fed is None else (fed,))]
    wrong = [layer for layer in asked if not 0 < layer < total]
    wrong += [layer for layer in layers or () if not 0 <= layer < total]
    if wrong:
        raise ExportError(
            f"the target has {total} layers and no layer {wrong[0]} to exit after or to draft with; choose others"
        )
    train = dataclasses.asdict(options.train)
    for name in ("stop_after_s", "checkpoint_every_s", "cache_bytes"):
        del train[name]
    data = dataclasses.asdict(options.data)
    data |= {name: [path.name for path in getattr(options.data, name)] for name in ("files", "texts")}
    return {
        "exit_layers": list(exits),
        "adapter_sizes": list(sizes),
        "frozen_exit_heads": options.frozen_exit_heads,
        "draft_layers": None if layers is None else list(layers),
        "draft_model": None if options.draft_model is None else options.draft_model.name,
        "draft_intermediate": options.draft_intermediate,
        "streams": options.streams,
        "feature_layer": fed,
        "start": None if options.start is None else read_facts(options.start)["recipe"],
        "held_out_share": options.held_out_share,
        "int8": options.int8,
        "data": data,
        "train": train,
    }


def _exit_heads(options: DistillOptions, total: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the exit layers and the inner width of each one's head."""
    if options.frozen_exit_heads:
        return _frozen_heads(options)
    exits = options.exit_layers if options.exit_layers is not None else (total // 2, total * 2 // 3)
    sizes = options.adapter_sizes
    if len(sizes) not in (1, len(exits)):
        raise ExportError(f"there are {len(sizes)} adapter sizes for {len(exits)} exit layers; give one, or one each")
    return exits, sizes * (len(exits) if len(sizes) == 1 else 1)


def _frozen_heads(options: DistillOptions) -> tuple[Sequence[int], Sequence[int]]:
    if options.start is None:
        raise DraftError("frozen exit heads come from a finished training; name it with --start")
    facts = read_facts(options.start)
    had = dict(zip(facts["exit_layers"], facts["recipe"]["adapter_sizes"], strict=True))
    exits = list(had) if options.exit_layers is None else list(options.exit_layers)
    if missing := [layer for layer in exits if layer not in had]:
        raise DraftError(
            f"{options.start} has exit heads for layers {', '.join(map(str, had))}, not for layer {missing[0]}; "
            "leave out --exit-layers or --frozen-exit-heads"
        )
    return exits, [had[layer] for layer in exits]


def _draft_layers(options: DistillOptions, total: int) -> tuple[int, ...] | None:
    """Return the target's layers that the draft starts as, () for no draft, None for a given model."""
    if options.draft_model is not None:
        if options.draft_layers or options.start:
            raise DraftError("a draft starts from a model, from layers or from a training; give only one of them")
        if options.draft_intermediate is not None:
            raise DraftError("a given draft model keeps its shape; leave out --draft-intermediate")
        return None
    if options.draft_layers is not None:
        return options.draft_layers
    had = None if options.start is None else read_facts(options.start)["draft"]
    return spread_layers(total, min(4, total)) if had is None or had["layers"] is None else tuple(had["layers"])


def _check_output(output: Path, recipe: dict[str, Any]) -> None:
    if (output / FACTS_FILE).exists():
        raise DraftError(f"{output} holds a finished training; choose another folder, or remove it")
    path = output / _TRAINING / "recipe.json"
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != recipe:
            raise DraftError(
                f"{output} holds a training of another recipe; repeat its options, or choose another folder"
            )
        return
    if output.exists() and any(output.iterdir()):
        raise DraftError(f"{output} is not empty and holds no training; choose another folder")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")


def _pupils(target: Target, options: DistillOptions, recipe: dict[str, Any]) -> Pupils:
    torch.manual_seed(options.train.seed)
    hidden = int(target.head.weight.shape[1])
    sizes = dict(zip(recipe["exit_layers"], recipe["adapter_sizes"], strict=True))
    if options.frozen_exit_heads:
        sizes = {}
    heads = {layer: ExitHead(hidden, size, norm_eps(target)) for layer, size in sizes.items()}
    student = _student(target, options, recipe)
    if options.start is not None:
        heads = _take_up(target, options.start, student, heads, recipe)
    return Pupils(student, {layer: head.to(target.device) for layer, head in heads.items()}, recipe["feature_layer"])


def _student(target: Target, options: DistillOptions, recipe: dict[str, Any]) -> Student | None:
    fed = options.feature_layer is not None
    chosen = StudentOptions(options.streams, fed, norm_eps(target), options.draft_intermediate)
    if options.draft_model is not None:
        return student_of(options.draft_model, target, chosen)
    return make_student(target, recipe["draft_layers"], chosen) if recipe["draft_layers"] else None


def _take_up(
    target: Target, start: Path, student: Student | None, heads: dict[int, ExitHead], recipe: dict[str, Any]
) -> dict[int, ExitHead]:
    """Give the draft the weights of a finished training; return the exit heads with theirs, where it has them."""
    facts = read_facts(start)
    check_made_for(start, facts, target_fingerprint(target.checkpoint))
    had = facts["draft"]
    if student is not None and had is not None and had["layers"] is not None:
        take_up(student, start / DRAFT_FOLDER, (had["layers"], recipe["draft_layers"]))
    return {
        layer: grown(load_exit_head(start, layer, facts["norm_eps"]), head.gate.weight.shape[0])
        if layer in facts["exit_layers"]
        else head
        for layer, head in heads.items()
    }


@dataclass(frozen=True)
class _Made:
    """A finished training, to be written down; `split` holds the texts learnt from and those kept."""

    target: Target
    pupils: Pupils
    corpus: Corpus
    split: tuple[list[int], list[int]]
    options: DistillOptions
    recipe: dict[str, Any]
    report: TrainReport


def _write(made: _Made, output: Path) -> None:
    ranked = ranking(made.corpus, made.target.vocab_size)
    facts = _facts(made) | {"vocabulary": _vocabulary(made, ranked)}
    for layer, head in made.pupils.heads.items():
        save_exit_head(head, output, layer, int8=made.options.int8)
    if made.options.frozen_exit_heads and made.options.start is not None:
        for layer in made.recipe["exit_layers"]:
            shutil.copyfile(made.options.start / exit_head_file(layer), output / exit_head_file(layer))
    if made.pupils.student is not None:
        save_student(made.pupils.student, output / DRAFT_FOLDER, int8=made.options.int8)
    save_file({"ids": ranked.astype("int32")}, output / VOCABULARY_FILE)
    shutil.copyfile(output / _TRAINING / LOG_FILE, output / LOG_FILE)
    write_plot(output / LOG_FILE, output / PLOT_FILE)
    write_card(facts, output / CARD_FILE)
    _write_facts(facts, output)
    shutil.rmtree(output / _TRAINING)


def _write_facts(facts: dict[str, Any], output: Path) -> None:
    partial = output / (FACTS_FILE + ".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output / FACTS_FILE)


def _vocabulary(made: _Made, ranked: Ints) -> int | None:
    """Return how many tokens a trimmed vocabulary should have, by what held-out answers need; None for all."""
    sizes = range(_VOCABULARY_STEP, len(ranked) * 3 // 4 + 1, _VOCABULARY_STEP)
    covered = coverage_of(ranked, made.corpus, made.split[1] or made.split[0], sizes)
    return next((size for size in sizes if covered[size] >= made.options.vocabulary_coverage), None)


def _facts(made: _Made) -> dict[str, Any]:
    target, recipe, student = made.target, made.recipe, made.pupils.student
    draft = None
    if student is not None:
        draft = {
            "layers": recipe["draft_layers"],
            "parameters": student.size,
            "streams": student.stream_count,
            "feature_layer": made.pupils.feature_layer,
        }
    corpus = made.corpus
    return {
        "format": FORMAT,
        "target": {"name": Path(target.checkpoint.name).name, **target_fingerprint(target.checkpoint)},
        "norm_eps": norm_eps(target),
        "exit_layers": recipe["exit_layers"],
        "exit_head_files": [exit_head_file(layer) for layer in recipe["exit_layers"]],
        "draft": draft,
        "vocabulary": None,
        "defaults": {},
        "recipe": recipe,
        "corpus": {"texts": len(corpus), "tokens": len(corpus.tokens), "answer_tokens": corpus.answer_tokens},
        "results": {"steps": made.report.steps, "held_out": dict(made.report.figures)},
    }
