"""`mirror distill`: a target in, a folder with a trained draft and exit heads out.

    OUT/
      distill.json                  what was made for which target, by which recipe, with which results
      exit_head_15.safetensors ..   one adapter for each exit layer
      draft/config.json             the draft, without the embedding and LM head that it shares
      draft/model.safetensors
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mirror.distill.card import write_card
from mirror.distill.data import Corpus, DataOptions, held_out, make_corpus
from mirror.distill.heads import ExitHead, exit_head_file, load_exit_head, save_exit_head
from mirror.distill.plot import write_plot
from mirror.distill.progress import DistillProgress, SilentProgress
from mirror.distill.student import Student, load_student, make_student, save_student, spread_layers
from mirror.distill.target import Target, load_target, target_fingerprint
from mirror.distill.train import LOG_FILE, Pupils, Trainer, TrainOptions, TrainReport
from mirror.errors import DraftError, ExportError

FORMAT = 1
FACTS_FILE = "distill.json"
DRAFT_FOLDER = "draft"
CARD_FILE = "README.md"
PLOT_FILE = "training.svg"
_TRAINING = "training"


@dataclass(frozen=True)
class DistillOptions:
    """What is trained and from what.

    `exit_layers`: None for half and two thirds of the target's. `draft_layers`: which of the target's
    layers the draft starts as; None for four of them, () for no draft. `adapter_size`: the inner width
    of an exit head. `device`: None for CUDA where there is one. `cache`: where corpora are kept; None
    for a folder beside the output.
    """

    exit_layers: tuple[int, ...] | None = None
    draft_layers: tuple[int, ...] | None = None
    adapter_size: int = 1536
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
        _write(loaded, pupils, corpus, recipe, report, output)
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
    has_draft = (folder / DRAFT_FOLDER).is_dir()
    return Pupils(load_student(folder / DRAFT_FOLDER, target) if has_draft else None, heads)


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
    exits = options.exit_layers if options.exit_layers is not None else (total // 2, total * 2 // 3)
    layers = options.draft_layers if options.draft_layers is not None else spread_layers(total, min(4, total))
    wrong = [layer for layer in exits if not 0 < layer < total] + [layer for layer in layers if not 0 <= layer < total]
    if wrong:
        raise ExportError(
            f"the target has {total} layers and no layer {wrong[0]} to exit after or to draft with; choose others"
        )
    train = dataclasses.asdict(options.train)
    for name in ("stop_after_s", "checkpoint_every_s", "cache_bytes"):
        del train[name]
    data = dataclasses.asdict(options.data) | {"files": [path.name for path in options.data.files]}
    return {
        "exit_layers": list(exits),
        "draft_layers": list(layers),
        "adapter_size": options.adapter_size,
        "held_out_share": options.held_out_share,
        "data": data,
        "train": train,
    }


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
    heads = {
        layer: ExitHead(hidden, options.adapter_size, norm_eps(target)).to(target.device)
        for layer in recipe["exit_layers"]
    }
    layers = recipe["draft_layers"]
    student: Student | None = make_student(target, layers) if layers else None
    return Pupils(student, heads)


def norm_eps(target: Target) -> float:
    """Return the epsilon of the exit heads' norm: the target's own, where it has one."""
    config = target.config
    return float(getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or 1e-5)


def _write(
    target: Target, pupils: Pupils, corpus: Corpus, recipe: dict[str, Any], report: TrainReport, output: Path
) -> None:
    facts = _facts(target, pupils, corpus, recipe, report)
    for layer, head in pupils.heads.items():
        save_exit_head(head, output, layer)
    if pupils.student is not None:
        save_student(pupils.student, output / DRAFT_FOLDER)
    shutil.copyfile(output / _TRAINING / LOG_FILE, output / LOG_FILE)
    write_plot(output / LOG_FILE, output / PLOT_FILE)
    write_card(facts, output / CARD_FILE)
    partial = output / (FACTS_FILE + ".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output / FACTS_FILE)
    shutil.rmtree(output / _TRAINING)


def _facts(
    target: Target, pupils: Pupils, corpus: Corpus, recipe: dict[str, Any], report: TrainReport
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "target": {"name": Path(target.checkpoint.name).name, **target_fingerprint(target.checkpoint)},
        "exit_layers": recipe["exit_layers"],
        "exit_head_files": [exit_head_file(layer) for layer in recipe["exit_layers"]],
        "norm_eps": norm_eps(target),
        "draft_parameters": None if pupils.student is None else pupils.student.size,
        "recipe": recipe,
        "corpus": {"texts": len(corpus), "tokens": len(corpus.tokens), "answer_tokens": corpus.answer_tokens},
        "results": {"steps": report.steps, "held_out": dict(report.figures)},
    }
