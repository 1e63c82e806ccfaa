"""The training loop: one pass of the target teaches the draft and every exit head at once.

Everything that a resumed run needs is in one checkpoint file, replaced whole; the order of the data
is a pure function of the seed and the step. So a run that was killed ends like one that wasn't, up to
the device's own nondeterminism.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirror.distill.data import Batch, Corpus, batches, to_device
from mirror.distill.heads import ExitHead
from mirror.distill.layout import ChainOptions, Layout
from mirror.distill.losses import LossWeights, Pupil, Taught, teach
from mirror.distill.progress import DistillProgress
from mirror.distill.reading import read_draft
from mirror.distill.rounds import tokens_per_round, windows_of
from mirror.distill.student import Student
from mirror.distill.target import Head, Target, compile_layers
from mirror.distill.teacher import Lesson, Teacher
from mirror.errors import DraftError

CHECKPOINT_FILE = "training.pt"
LOG_FILE = "log.jsonl"
CHAINS = "streams"  # the name of the rows behind a text among the pupils
_STREAMS = "streams.weight"  # the draft's parameter that is an embedding
_MOST_COPIES = 6  # rows without a feature that a chain of training has at most


class Optimizer(StrEnum):
    """What turns gradients into steps: AdamW for all, or Muon (Jordan 2024) for matrices and AdamW for the rest."""

    ADAMW = "adamw"
    MUON = "muon"


@dataclass(frozen=True)
class TrainOptions:
    """How long and how hard to train.

    `steps`: optimiser steps. `tokens_per_batch`: tokens of a step, padding and prompts included. From
    `focus_after` (a share of the steps) on, the draft's cross-entropy is focused (see `LossWeights`) and
    KL counts `late_kl`. `stream_every`: positions from one place with streams to the next, `stream_weight`: what
    a stream's loss counts beside the draft's own. `budget_s`: end after so many seconds of training, the
    schedule following the clock, if that comes before `steps`. `stop_after_s`: leave with a checkpoint after so
    many seconds, to be resumed. `cache_bytes`: device memory for what the target said in the first epoch. `optimizer`:
    Muon takes the same learning rates, since its steps are scaled to the size of AdamW's.
    """

    steps: int = 2000
    tokens_per_batch: int = 32768
    draft_lr: float = 1.5e-3
    head_lr: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    kl: float = 1.0
    ce: float = 0.5
    focus: float = 0.5
    focus_after: float = 0.6
    late_kl: float = 0.5
    measure_every: int = 400
    checkpoint_every_s: float = 120.0
    budget_s: float | None = None
    stop_after_s: float = math.inf
    cache_bytes: int = 40 * 2**30
    stream_every: int = 4
    stream_weight: float = 0.25
    compiled: bool = False
    optimizer: Optimizer = Optimizer.ADAMW
    seed: int = 0


@dataclass(frozen=True)
class Pupils:
    """What is trained: a draft or none, and exit heads by layer; the layer that feeds the draft, None for none."""

    student: Student | None
    heads: Mapping[int, ExitHead]
    feature_layer: int | None = None

    def own(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        found = {} if self.student is None else {f"draft.{name}": value for name, value in self.student.own.items()}
        for layer, head in self.heads.items():
            found |= {f"exit_{layer}.{name}": value for name, value in head.named_parameters()}
        return found


@dataclass(frozen=True)
class TrainReport:
    """What a training ended with: steps done, whether all of them, and the last measured figures."""

    steps: int
    finished: bool
    figures: Mapping[str, float]


class Trainer:
    """Trains pupils on a corpus; all mutation of a training is here and in the pupils."""

    def __init__(
        self,
        target: Target,
        pupils: Pupils,
        corpus: Corpus,
        split: tuple[Sequence[int], Sequence[int]],
        options: TrainOptions,
        folder: Path,
    ) -> None:
        self._target, self._pupils, self._corpus = target, pupils, corpus
        self._learn, self._keep = split
        self._options, self._folder = options, folder
        self._teacher = Teacher(target, corpus, tuple(pupils.heads), options.cache_bytes, pupils.feature_layer)
        if options.compiled:
            compile_layers(target.model, target.config)
            if pupils.student is not None:
                compile_layers(pupils.student.model, pupils.student.model.config)
        self._step = 0
        self._spent_s = 0.0
        self._answer_tokens = 0
        self._figures: dict[str, float] = {}
        self._optimizers = _optimizers(pupils, options, target.device)

    def run(self, progress: DistillProgress) -> TrainReport:
        """Train until the last step, or until time is up; resume from the folder's checkpoint where there is one.

        Raises:
            DraftError: the checkpoint there is of other pupils.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        if self._options.compiled:
            self._warm_up()
        progress.start("training", self._options.steps)
        progress.advance(self._step)
        before_s, began = self._spent_s, time.perf_counter()
        saved = began
        for batch in self._batches():
            now = time.perf_counter()
            self._spent_s = before_s + now - began
            if self._done() >= 1 or now - began > self._options.stop_after_s:
                break
            self._learn_batch(batch)
            progress.advance(1)
            if self._step % self._options.measure_every == 0:
                progress.report(self._measure())
            if now - saved > self._options.checkpoint_every_s:
                self._save()
                saved = now
        finished = self._done() >= 1
        if finished:
            progress.report(self._measure())
        self._save()
        return TrainReport(self._step, finished, dict(self._figures))

    def _warm_up(self) -> None:
        """Let the layers compile on sizes that are no constant of any model, which torch would take for one."""
        rows, length = 37, 96
        learned = torch.arange(rows * length).view(rows, length)[:, 9:-1].flatten()
        ids = torch.zeros(rows, length, dtype=torch.int64)
        batch = Batch(np.arange(rows), ids, learned, (len(learned) // rows,) * rows)
        self._target.states(ids.to(self._target.device), ())
        if self._pupils.student is None:
            return
        features = None
        if self._pupils.feature_layer is not None:
            features = torch.zeros(rows, length, self._target.head.weight.shape[1], device=self._target.device)
        chosen = chain_options(self._pupils, self._options, 0)
        with _mixed(self._target):
            read = read_draft(self._pupils.student, batch, features, chosen, self._target.device)
        torch.autograd.backward([read.own.sum() * 0])
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _done(self) -> float:
        """Return the share of the training that is over, by steps or by the clock."""
        budget_s = self._options.budget_s
        return max(self._step / self._options.steps, 0.0 if budget_s is None else self._spent_s / budget_s)

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches from the current step on, epoch after epoch."""
        seen, epoch = 0, 0
        while True:
            for batch in batches(self._corpus, self._learn, self._options.tokens_per_batch, self._options.seed + epoch):
                seen += 1
                if seen > self._step:
                    yield batch
            epoch += 1

    def _learn_batch(self, batch: Batch) -> None:
        options = self._options
        factor = _schedule(self._step, self._done(), options)
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * factor
        taught = self._teach(batch)
        nn.utils.clip_grad_norm_(self._pupils.own().values(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._forget_gradients()
        self._step += 1
        self._answer_tokens += len(batch.learned)
        if self._step % 20 == 0:
            self._log({"step": self._step, "lr_factor": factor, **taught})

    def _teach(self, batch: Batch) -> dict[str, float]:
        """Add one batch's gradients to the pupils; return losses and agreement every 20th step, else nothing."""
        logged = (self._step + 1) % 20 == 0
        lesson = self._teacher.lesson(batch)
        chosen = chain_options(self._pupils, self._options, self._step)
        with _mixed(self._target):
            states, layout = self._pupil_states(batch, lesson, chosen)
        leaves = {name: value.detach() for name, value in states.items()}
        taught = self._taught(leaves, lesson, layout, counted=logged)
        count = len(batch.learned)
        # Summed losses, divided here: every position of a batch counts the same.
        gradients = [(taught[name].gradient / count).to(leaf.dtype) for name, leaf in leaves.items() if name != CHAINS]
        if layout is not None:
            share = _row_weights(layout, chosen, self._options, self._target.device) * chosen.length / len(layout.where)
            gradients.append((taught[CHAINS].gradient * share[:, None]).to(leaves[CHAINS].dtype))
        torch.autograd.backward(list(states.values()), gradients)
        return _shares(taught, leaves) if logged else {}

    def _taught(
        self, leaves: Mapping[str, Tensor], lesson: Lesson, layout: Layout | None, *, counted: bool
    ) -> dict[str, Taught]:
        """Return what every pupil learns; the chains' rows follow the others in the result."""
        options, head = self._options, self._target.head
        names = [name for name in leaves if name != CHAINS]
        pupils = [Pupil(leaves[name], self._head(name), self._weights(name)) for name in names]
        found = dict(zip(names, teach(pupils, lesson.final, head, options.compiled, counted), strict=True))
        if layout is not None:
            where = to_device(torch.from_numpy(layout.lesson), self._target.device)
            chains = Pupil(leaves[CHAINS], self._head(CHAINS), self._weights(CHAINS))
            (found[CHAINS],) = teach([chains], lesson.final[where], head, options.compiled, counted)
        return found

    def _head(self, name: str) -> Head:
        student = self._pupils.student
        return student.head if student is not None and name in ("draft", CHAINS) else self._target.head

    def _pupil_states(
        self, batch: Batch, lesson: Lesson, chosen: ChainOptions
    ) -> tuple[dict[str, Tensor], Layout | None]:
        """Return the normalised states `[n, hidden]` of every pupil at the learned positions; chains come last."""
        states = {
            f"exit_{layer}": self._target.final_norm(head(lesson.exits[layer]))
            for layer, head in self._pupils.heads.items()
        }
        if self._pupils.student is None:
            return states, None
        read = read_draft(self._pupils.student, batch, lesson.features, chosen, self._target.device)
        states["draft"] = read.own
        if read.layout is None or not len(read.layout.where):
            return states, None
        states[CHAINS] = read.chains
        return states, read.layout

    def _weights(self, name: str) -> LossWeights:
        options = self._options
        if name in ("draft", CHAINS) and self._done() >= options.focus_after:
            return LossWeights(options.late_kl, 1.0, options.focus)
        return LossWeights(options.kl, options.ce)

    def _measure(self) -> dict[str, float]:
        """Measure the pupils on held-out texts and log it."""
        totals: dict[str, float] = {}
        agreed: list[list[bool]] = []
        count = 0
        for batch in batches(self._corpus, self._keep, self._options.tokens_per_batch, 0):
            count += self._measure_batch(batch, totals, agreed)
        figures = {name: value / max(count, 1) for name, value in totals.items()}
        if agreed:
            figures["tokens_per_round"] = tokens_per_round(windows_of(text, 7) for text in agreed)
        figures["answer_tokens_per_s"] = self._answer_tokens / max(self._spent_s, 1e-9)
        self._figures = figures
        self._log({"step": self._step, "held_out": figures, "answer_tokens": self._answer_tokens})
        return figures

    @torch.no_grad()
    def _measure_batch(self, batch: Batch, totals: dict[str, float], agreed: list[list[bool]]) -> int:
        lesson = self._teacher.lesson(batch)
        chosen = chain_options(self._pupils, self._options, 0)
        with _mixed(self._target):
            states, layout = self._pupil_states(batch, lesson, chosen)
        taught = self._taught(states, lesson, layout, counted=True)
        for name, part in taught.items():
            share = len(batch.learned) / len(states[name])  # chains have fewer rows: their mean is what counts
            for figure, value in (("loss", part.loss), ("top1", part.agreed), ("top8", part.covered)):
                totals[f"{name}_{figure}"] = totals.get(f"{name}_{figure}", 0.0) + float(value) * share
        if "draft" in states:
            agreed.extend(self._agreement(states["draft"], batch))
        return len(batch.learned)

    def _agreement(self, states: Tensor, batch: Batch) -> list[list[bool]]:
        """Return for each text at which of its answer's positions the draft's likeliest token is the text's next."""
        following = batch.input_ids.flatten()[batch.learned + 1]
        head = self._head("draft")
        chosen = torch.cat([head(part).argmax(-1) for part in torch.split(states, 8192)]).cpu()
        parts = iter((chosen == following).tolist())
        return [[next(parts) for _ in range(count)] for count in batch.counts]

    def _log(self, record: Mapping[str, Any]) -> None:
        with (self._folder / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def _save(self) -> None:
        state = {
            "step": self._step,
            "spent_s": self._spent_s,
            "answer_tokens": self._answer_tokens,
            "figures": self._figures,
            "own": {name: value.detach() for name, value in self._pupils.own().items()},
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        partial = self._folder / (CHECKPOINT_FILE + ".partial")
        torch.save(state, partial)
        os.replace(partial, self._folder / CHECKPOINT_FILE)

    def _restore(self) -> None:
        path = self._folder / CHECKPOINT_FILE
        if not path.is_file():
            return
        state = torch.load(path, map_location=self._target.device, weights_only=True)
        own = self._pupils.own()
        if state["own"].keys() != own.keys() or any(state["own"][name].shape != own[name].shape for name in own):
            raise DraftError(
                f"{path} is a checkpoint of another draft or other exit heads; choose another folder or delete it"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state["own"][name])
        for optimizer, stored in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self._step, self._answer_tokens = int(state["step"]), int(state["answer_tokens"])
        self._spent_s, self._figures = float(state["spent_s"]), dict(state["figures"])
        _cut_log(self._folder / LOG_FILE, self._step)


def _optimizers(pupils: Pupils, options: TrainOptions, device: torch.device) -> list[torch.optim.Optimizer]:
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in pupils.own().items():
        peak = options.draft_lr if name.startswith("draft.") else options.head_lr
        decay = options.weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [parameter], "lr": peak, "peak": peak, "weight_decay": decay}
        # Rows of an embedding are vectors, not a map: Muon would make them orthogonal.
        is_matrix = parameter.ndim == 2 and not name.endswith(_STREAMS)
        (matrices if is_matrix and options.optimizer is Optimizer.MUON else others).append(group)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(_merged(matrices), adjust_lr_fn="match_rms_adamw"))
    if others:
        found.append(torch.optim.AdamW(_merged(others), betas=(0.9, 0.95), fused=device.type == "cuda"))
    return found


def _merged(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: dict[tuple[float, float], dict[str, Any]] = {}
    for group in groups:
        key = (group["peak"], group["weight_decay"])
        merged.setdefault(key, {**group, "params": []})["params"] += group["params"]
    return list(merged.values())


def _schedule(step: int, done: float, options: TrainOptions) -> float:
    """Return the learning rate's factor: a linear warm-up, then a cosine down to 2%."""
    warm = min(1.0, (step + 1) / max(1, options.warmup_steps))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _mixed(target: Target) -> torch.autocast:
    """Return the context in which float32 pupils compute in the target's precision."""
    return torch.autocast(target.device.type, dtype=target.dtype, enabled=target.dtype != torch.float32)


def chain_options(pupils: Pupils, options: TrainOptions, step: int) -> ChainOptions:
    """Return the chains of a step, at other places than the last step's.

    For a draft with features they begin with as many rows without one as a branch may have by then.
    """
    source = np.random.default_rng((options.seed, step))
    streams = 0 if pupils.student is None else pupils.student.stream_count
    copies = int(source.integers(1, _MOST_COPIES + 1)) if pupils.feature_layer is not None else 0
    every = max(options.stream_every, copies + streams) if copies else options.stream_every
    return ChainOptions(streams, copies, every, int(source.integers(0, every)))


def _row_weights(layout: Layout, chosen: ChainOptions, options: TrainOptions, device: torch.device) -> Tensor:
    """Return what each chain row's loss counts, float32 `[m]`."""
    weights = np.where(layout.step < chosen.copies, 1.0, options.stream_weight).astype(np.float32)
    return to_device(torch.from_numpy(weights), device)


def _shares(taught: Mapping[str, Taught], states: Mapping[str, Tensor]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, part in taught.items():
        count = len(states[name])
        figures[f"{name}_loss"] = float(part.loss) / count
        figures[f"{name}_top1"] = float(part.agreed) / count
        figures[f"{name}_top8"] = float(part.covered) / count
    return figures


def _cut_log(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
