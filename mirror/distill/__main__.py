"""`python -m mirror.distill TARGET -o OUT`: the training command by itself."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click

from mirror.errors import MirrorError


class LineProgress:
    """A progress that prints a line on stderr for every stage and every report."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._stage, self._total, self._done = "", 0, 0

    def start(self, stage: str, total: int | None) -> None:
        """Name the stage."""
        self._stage, self._total, self._done = stage, total or 0, 0
        self._print(f"{stage}: {total if total is not None else '?'}")

    def advance(self, amount: int) -> None:
        """Count."""
        self._done += amount

    def report(self, figures: Mapping[str, float]) -> None:
        """Print the figures."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._print(f"{self._stage} {self._done}/{self._total}  {text}")

    def _print(self, text: str) -> None:
        click.echo(f"{time.perf_counter() - self._began:7.1f}s  {text}", err=True)


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise click.BadParameter(f"{text} is not a list of numbers; write 15,20") from error


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("target")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="The folder to make."
)
@click.option("--prompts", type=click.Path(path_type=Path), multiple=True, help="A JSONL file of prompts; repeatable.")
@click.option("--texts", type=click.Path(path_type=Path), multiple=True, help="A corpus kept from before; repeatable.")
@click.option("--own-prompts", default=0, help="User turns that the target writes itself.")
@click.option("--opened-prompts", default=0, help="User turns that it writes from given first words on.")
@click.option("--given-tasks", default=0, help="Summaries and questions on passages found in the prompts.")
@click.option("--ask-prompts/--no-ask-prompts", default=True, help="Ask the prompts too, not only build tasks on them.")
@click.option("--passages", default=0, help="Passages that the target writes, for tasks on long texts.")
@click.option("--greedy-answers", default=1.0, help="Greedy answers to each prompt; 0.5 is one to every other.")
@click.option("--sampled-answers", default=0.5, help="Sampled answers to each prompt.")
@click.option("--max-answer-tokens", default=192, help="Longest answer.")
@click.option("--exit-layers", callback=_numbers, help="Layers to exit after; half and two thirds by default.")
@click.option(
    "--draft-layers",
    callback=_numbers,
    help="Target layers that the draft starts as; four by default, or those of --start.",
)
@click.option(
    "--draft-intermediate", default=None, type=int, help="Inner channels of the draft, if more than the target's."
)
@click.option("--draft-model", type=click.Path(path_type=Path), help="A small model that the draft starts as instead.")
@click.option("--streams", default=3, help="Speculative streams: tokens beside its own that a pass can emit.")
@click.option("--feature-layer", default=None, type=int, help="Feed the draft with the state after this layer.")
@click.option("--adapter-size", "adapter_sizes", callback=_numbers, default="1536", help="Inner width of exit heads.")
@click.option("--start", type=click.Path(path_type=Path), help="A finished training to go on from.")
@click.option("--frozen-exit-heads", is_flag=True, help="Take the exit heads of --start over as they are.")
@click.option("--storage", type=click.Choice(["int8", "float16"]), default="int8", help="How matrices are stored.")
@click.option("--steps", default=2000, help="Optimiser steps.")
@click.option("--budget-s", default=None, type=float, help="End after so many seconds of training, if before --steps.")
@click.option("--tokens-per-batch", default=32768, help="Tokens of a step, prompts and padding included.")
@click.option("--draft-lr", default=1.5e-3, help="Peak learning rate of the draft.")
@click.option("--head-lr", default=1.5e-3, help="Peak learning rate of the exit heads.")
@click.option("--optimizer", type=click.Choice(["adamw", "muon"]), default="adamw", help="Muon: for matrices alone.")
@click.option("--warmup-steps", default=100, help="Steps in which the learning rate rises.")
@click.option("--stream-every", default=4, help="Positions from one place that streams learn at to the next.")
@click.option("--stream-weight", default=0.25, help="What a stream's loss counts.")
@click.option("--measure-every", default=400, help="Steps between two measurements on held-out texts.")
@click.option("--focus", default=0.5, help="Focus of the draft's late cross-entropy.")
@click.option("--focus-after", default=0.6, help="Share of the steps after which it begins.")
@click.option("--stop-after-s", default=math.inf, help="Stop with a checkpoint; the same command goes on.")
@click.option("--device", default=None, help="cpu or cuda; CUDA where there is one by default.")
@click.option("--cache", type=click.Path(path_type=Path), default=None, help="Where corpora are kept.")
@click.option("--compile/--no-compile", "compiled", default=None, help="Fuse the losses; on CUDA by default.")
@click.option("--seed", default=0, help="Of data and training.")
def main(
    target: str,
    output: Path,
    prompts: tuple[Path, ...],
    texts: tuple[Path, ...],
    own_prompts: int,
    opened_prompts: int,
    given_tasks: int,
    ask_prompts: bool,
    passages: int,
    greedy_answers: float,
    sampled_answers: float,
    max_answer_tokens: int,
    exit_layers: tuple[int, ...] | None,
    draft_layers: tuple[int, ...] | None,
    draft_intermediate: int | None,
    draft_model: Path | None,
    streams: int,
    feature_layer: int | None,
    adapter_sizes: tuple[int, ...],
    start: Path | None,
    frozen_exit_heads: bool,
    storage: str,
    steps: int,
    budget_s: float | None,
    tokens_per_batch: int,
    draft_lr: float,
    head_lr: float,
    optimizer: str,
    warmup_steps: int,
    stream_every: int,
    stream_weight: float,
    measure_every: int,
    focus: float,
    focus_after: float,
    stop_after_s: float,
    device: str | None,
    cache: Path | None,
    compiled: bool | None,
    seed: int,
) -> None:
    """Train a draft and exit heads for TARGET from text that it writes itself."""
    import torch

    from mirror.distill.data import DataOptions
    from mirror.distill.run import DistillOptions, distill
    from mirror.distill.train import Optimizer, TrainOptions

    data = DataOptions(
        files=prompts,
        texts=texts,
        own_prompts=own_prompts,
        opened_prompts=opened_prompts,
        given_tasks=given_tasks,
        ask_prompts=ask_prompts,
        passages=passages,
        greedy_answers=greedy_answers,
        sampled_answers=sampled_answers,
        max_answer_tokens=max_answer_tokens,
        seed=seed,
    )
    train = TrainOptions(
        steps=steps,
        budget_s=budget_s,
        tokens_per_batch=tokens_per_batch,
        draft_lr=draft_lr,
        head_lr=head_lr,
        optimizer=Optimizer(optimizer),
        warmup_steps=warmup_steps,
        stream_every=stream_every,
        stream_weight=stream_weight,
        measure_every=measure_every,
        focus=focus,
        focus_after=focus_after,
        stop_after_s=stop_after_s,
        compiled=torch.cuda.is_available() if compiled is None else compiled,
        seed=seed,
    )
    options = DistillOptions(
        exit_layers=exit_layers,
        draft_layers=draft_layers,
        draft_intermediate=draft_intermediate,
        draft_model=draft_model,
        streams=streams,
        feature_layer=feature_layer,
        adapter_sizes=adapter_sizes,
        start=start,
        frozen_exit_heads=frozen_exit_heads,
        int8=storage == "int8",
        device=device,
        cache=cache,
        data=data,
        train=train,
    )
    try:
        report = distill(target, output, options, LineProgress())
    except MirrorError as error:
        found, _, remedy = str(error).rpartition("; ")
        click.echo(f"error: {found or remedy}" + (f"\nhint: {remedy}" if found else ""), err=True)
        sys.exit(1)
    click.echo(f"{report.folder}: {'finished' if report.finished else 'stopped; repeat the command to go on'}")


if __name__ == "__main__":
    main()
