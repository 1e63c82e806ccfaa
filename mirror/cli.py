"""The `mirror` command. Parts are imported inside the commands, so `mirror --help` loads none of them.

Exit codes: 0 done, 1 failed (`error:` and `hint:` on stderr), 2 wrong usage, 130 Ctrl-C. No traceback
without `--debug`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from mirror.answering import EXIT_INTERRUPTED, AnswerOptions, OutputOptions, answer, converse
from mirror.console import ExportProgress, print_error, print_json, print_notice, print_table, quiet_libraries, size
from mirror.errors import MirrorError, RequestError
from mirror.version import __version__

if TYPE_CHECKING:
    from mirror.default_model import DefaultOptions
    from mirror.summary import BundleSummary, Memory

Command = TypeVar("Command", bound=Callable[..., Any])


PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int8-fp16", "int4-fp16")
MODES = ("auto", "plain", "serial", "mirror")
CANDIDATE_SOURCES = ("exit", "draft", "both")
STORED = (*PRECISIONS, "int4-openvino", "w4a16")
FOLDER = click.Path(path_type=Path, file_okay=False)
DEBUG = "mirror.debug"


class MirrorGroup(click.Group):
    """A command group that turns errors into messages and exit codes.

    `distill` brings its own command, which is loaded when it is asked for.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names, sorted."""
        return sorted([*super().list_commands(ctx), "distill"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        if cmd_name != "distill":
            return super().get_command(ctx, cmd_name)
        from mirror.distill.__main__ import main as distill

        return distill

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail(ctx, None, EXIT_INTERRUPTED)
        except MirrorError as error:
            _fail(ctx, error, 1)
        except Exception as error:  # noqa: BLE001  (the last net: a message instead of a traceback)
            _fail(ctx, error, 1)


def _fail(ctx: click.Context, error: Exception | None, code: int) -> NoReturn:
    if error is not None:
        if ctx.meta.get(DEBUG):
            raise error
        print_error(error)
    ctx.exit(code)


def debug_option(command: Command) -> Command:
    """Add `--debug`: errors keep their traceback."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[DEBUG] = value or ctx.meta.get(DEBUG, False)

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error."
    )(command)


def read_counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Return the numbers of a comma-separated list, such as `8,4,2`."""
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers; write 8,4,2", ctx, param) from None


@click.group(cls=MirrorGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="mirror")
@debug_option
def main() -> None:
    """Exact speculative decoding that overlaps draft and target on the devices you own."""


@main.command()
@click.argument("model")
@click.option("-o", "--output", type=FOLDER, required=True, metavar="BUNDLE", help="The bundle folder to make.")
@click.option(
    "--exit-layer",
    help="Where to cut the target: a layer number, or a fraction below 1.  [default: the trained draft's, else 0.5]",
)
@click.option("--gamma", default=7, type=click.IntRange(min=1), help="Draft tokens judged by one verification.")
@click.option(
    "--kappa",
    type=click.IntRange(min=1),
    help="Candidates offered at each window position.  [default: what the trained draft's fan-out needs, else 8]",
)
@click.option("--max-length", default=2048, type=click.IntRange(min=2), help="Capacity of the KV cache, in tokens.")
@click.option("--precision", default="fp32", type=click.Choice(PRECISIONS), help="int8 and int4 quantize weights only.")
@click.option(
    "--draft",
    default="ngram",
    help="A folder or hub id with the target's tokenizer; layers:0,10,19,29 for some of the target's own; ngram; none.",
)
@click.option(
    "--draft-vocabulary",
    type=click.IntRange(min=0),
    help="Tokens that the heads of a trained draft and exit know, the most frequent ones; 0 for all.  "
    "[default: the trained draft's]",
)
@click.option(
    "--int8-draft/--no-int8-draft",
    default=None,
    help="Graphs of 8-bit products for a draft on `cpu`: twice as fast, and deep drafts guess worse.  "
    "[default: for drafts of mirror distill]",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@click.option(
    "--allow-failed-check", is_flag=True, help="Keep the bundle even where the self-check finds a difference."
)
@debug_option
def export(
    model: str,
    output: Path,
    exit_layer: str | None,
    gamma: int,
    kappa: int | None,
    max_length: int,
    precision: str,
    draft: str,
    draft_vocabulary: int | None,
    int8_draft: bool | None,
    force: bool,
    allow_failed_check: bool,
) -> None:
    """Turn MODEL into a bundle of ONNX graphs, split at an early exit.

    MODEL is a Hugging Face folder, a hub id, or a GGUF file.
    """
    from mirror.default_model import check_export_installed

    check_export_installed()
    quiet_libraries(bars=not Path(model).exists())
    from mirror.export.build import ExportOptions, export_bundle

    options = ExportOptions(
        exit_layer=exit_layer,
        gamma=gamma,
        kappa=kappa,
        max_length=max_length,
        precision=precision,
        draft=None if draft == "none" else draft,
        draft_vocabulary=draft_vocabulary,
        int8_draft=int8_draft,
        force=force,
        allow_failed_check=allow_failed_check,
    )
    with ExportProgress() as progress:
        report = export_bundle(model, output, options, progress)
    for finding in report.check.findings:
        print_notice(f"self-check: {finding}")
    if report.manifest.decoding.max_length < max_length:
        print_notice(
            f"capacity is {report.manifest.decoding.max_length} tokens, all that the model knows positions for"
        )
    _print_summary(output)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--verify", is_flag=True, help="Check the sha256 of every file, not only its size.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a BUNDLE holds and which devices its segments suit."""
    from mirror.bundle import check_files, read_manifest
    from mirror.summary import summarize

    check_files(bundle, read_manifest(bundle), hashes=verify)
    if as_json:
        print_json(summarize(bundle))
    else:
        _print_summary(bundle)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="The bundle to make.  [default: change BUNDLE itself]")
@click.option("--exit-layer", help="A layer number, or a fraction below 1.  [default: as it is]")
@click.option("--gamma", type=click.IntRange(min=1), help="Draft tokens of a window.  [default: as it is]")
@click.option("--kappa", type=click.IntRange(min=1), help="Candidates of a position.  [default: as it is]")
@debug_option
def recut(bundle: Path, output: Path | None, exit_layer: str | None, gamma: int | None, kappa: int | None) -> None:
    """Change the exit layer, gamma or kappa of a BUNDLE without tracing or copying weights again."""
    if exit_layer is None and gamma is None and kappa is None:
        raise click.UsageError("nothing to change: pass --exit-layer, --gamma or --kappa")
    from mirror.default_model import check_export_installed

    check_export_installed()
    from mirror.export.recut import recut_bundle

    recut_bundle(bundle, exit_layer=exit_layer, gamma=gamma, kappa=kappa, output=output)
    _print_summary(output or bundle)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--target-device", "target_devices", multiple=True, help="A device to try.  [default: `cuda:0`, else `cpu`]"
)
@click.option(
    "--draft-device",
    "draft_devices",
    multiple=True,
    help="A device to try.  [default: the CPU, NPUs, the target's GPU]",
)
@click.option("--suffix-device", help="Where the target's later layers run.  [default: with the others]")
@click.option("--exit-layers", metavar="COUNTS", callback=read_counts, help="Where to cut.  [default: trained exits]")
@click.option("--prompts", default=6, type=click.IntRange(min=1), help="How many prompts are answered.")
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Take them from a JSONL file with a prompt, instruction or question a line.  [default: the project's own]",
)
@click.option("--tokens", default=64, type=click.IntRange(min=8), help="Longest answer, in tokens.")
@click.option("--turns", default=3, type=click.IntRange(min=1), help="How often the best choices are run.")
@click.option("--tries", default=3, type=click.IntRange(min=1), help="How many mirror choices are run.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads in all.  [default: the physical cores]")
@click.option("--pinned", is_flag=True, help="Tune for `mirror run --pinned`: one width for every pass.")
@click.option("--dry-run", is_flag=True, help="Show the table and leave the bundle as it is.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def tune(
    bundle: Path,
    target_devices: tuple[str, ...],
    draft_devices: tuple[str, ...],
    suffix_device: str | None,
    exit_layers: tuple[int, ...] | None,
    prompts: int,
    prompt_file: Path | None,
    tokens: int,
    turns: int,
    tries: int,
    threads: int | None,
    pinned: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure this machine and write the fastest way to run a BUNDLE into its settings.

    What passes cost and what the draft foretells is measured; from it the speed of every window, fan-out,
    candidate source, exit layer and device is predicted, and the best few are run beside plain decoding.
    Where nothing beats plain, plain is chosen.
    """
    from mirror.tune.tune import TuneOptions, tune_bundle

    options = TuneOptions(
        target_devices or None,
        draft_devices or None,
        suffix_device,
        exit_layers,
        prompts,
        tokens,
        turns,
        tries,
        threads,
        pinned,
        prompt_file,
    )
    report = tune_bundle(bundle, options, print_notice, write=not dry_run)
    if as_json:
        print_json(report.to_json())
        return
    print_table(report.columns, report.cells())
    print_notice(report.reason + (" (not written: --dry-run)" if dry_run else f"; written to {bundle}"))


@main.command()
@click.argument("bundle", type=FOLDER, required=False)
@click.option("--box", required=True, metavar="FILE|NAME", help="The machine: a profile of the package, or a file.")
@click.option(
    "--target-shape", metavar="FILE|NAME", help="A config.json or a known shape, in the bundle's target's place."
)
@click.option("--target-precision", type=click.Choice(STORED), default="fp16", help="How that shape is stored.")
@click.option("--draft-shape", metavar="FILE|NAME", help="The same for the draft.")
@click.option("--draft-precision", type=click.Choice(STORED), default="fp16", help="How that shape is stored.")
@click.option("--draft-layers", type=click.IntRange(min=1), help="So many layers of the draft.  [default: all]")
@click.option("--draft-vocabulary", type=click.IntRange(min=1), help="Tokens that a draft shape's head knows.")
@click.option("--streams", type=click.IntRange(min=0), help="Streams of a draft given as a shape.  [default: none]")
@click.option("--target-device", help="Where the target runs.  [default: the box's]")
@click.option("--draft-device", help="Where the draft runs.  [default: the box's]")
@click.option(
    "--acceptance",
    metavar="SHARE|FILE",
    help="The share of draft tokens that stand, or a result of mirror.distill.evaluate.  [default: SmolLM2's]",
)
@click.option("--context", default=500, type=click.IntRange(min=0), help="Tokens before the window.")
@click.option("--exit-layer", type=click.IntRange(min=1), help="Where to cut.  [default: the bundle's, else the best]")
@click.option(
    "--gamma", type=click.IntRange(min=1), help="Draft tokens of a window.  [default: the bundle's, else the best]"
)
@click.option(
    "--branches", type=click.IntRange(min=1), help="Branches of a rollout.  [default: the bundle's, else the best]"
)
@click.option(
    "--tokens-per-pass",
    metavar="COUNTS",
    callback=read_counts,
    help="Tokens of each pass.  [default: the bundle's, else the best]",
)
@click.option(
    "--candidates",
    type=click.Choice(CANDIDATE_SOURCES),
    help="Who offers them.  [default: the bundle's, else the best]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def plan(
    bundle: Path | None,
    box: str,
    target_shape: str | None,
    target_precision: str,
    draft_shape: str | None,
    draft_precision: str,
    draft_layers: int | None,
    draft_vocabulary: int | None,
    streams: int | None,
    target_device: str | None,
    draft_device: str | None,
    acceptance: str | None,
    context: int,
    exit_layer: int | None,
    gamma: int | None,
    branches: int | None,
    tokens_per_pass: tuple[int, ...] | None,
    candidates: str | None,
    as_json: bool,
) -> None:
    """Predict a round of BUNDLE on a machine that isn't here, and search the best choices for it.

    Bytes and operations are counted in the bundle's graphs, or from a model's sizes; the machine is a profile of
    bandwidths, rates and fixed costs. Nothing is run. docs/plan.md says how far it was off where the truth is known.
    """
    from mirror.plan.plan import PlanOptions, plan_bundle

    options = PlanOptions(
        box=box,
        target_shape=target_shape,
        draft_shape=draft_shape,
        target_precision=target_precision,
        draft_precision=draft_precision,
        draft_layers=draft_layers,
        draft_vocabulary=draft_vocabulary,
        streams=streams,
        target_device=target_device,
        draft_device=draft_device,
        acceptance=acceptance,
        context=context,
        exit_layer=exit_layer,
        gamma=gamma,
        branches=branches,
        tokens_per_pass=tokens_per_pass,
        candidates=candidates,
    )
    report = plan_bundle(bundle, options)
    if as_json:
        print_json(report.to_json())
        return
    for columns, cells in report.tables():
        print_table(columns, cells)
    print_notice(report.sentence())
    for sentence in report.unsure:
        print_notice(sentence)


@main.command(name="compile")
@click.argument("bundle", type=FOLDER)
@click.option(
    "--for",
    "compile_for",
    multiple=True,
    required=True,
    metavar="DEVICE",
    help="What to compile the draft for: qnn:v73, qnn:v75, qnn:v81, openvino:CPU|GPU|NPU; repeatable.",
)
@click.option(
    "--weights",
    default="as-is",
    type=click.Choice(("as-is", "int8", "int4")),
    help="How a Hexagon NPU stores the draft's linear layers; quantized ones need the export extra.",
)
@click.option("--gamma", type=click.IntRange(min=1), help="Draft tokens of a window.  [default: the bundle's]")
@click.option("--kappa", type=click.IntRange(min=1), help="Candidates of a position.  [default: the bundle's]")
@click.option(
    "--fanout", metavar="COUNTS", callback=read_counts, help="Branches per window position.  [default: the bundle's]"
)
@click.option(
    "--tokens-per-pass",
    metavar="COUNTS",
    callback=read_counts,
    help="Tokens that each rollout pass gives a branch.  [default: the bundle's setting, else 1]",
)
@click.option(
    "--branches-per-pass",
    metavar="COUNTS",
    callback=read_counts,
    help="Branches that take part in each rollout pass.  [default: the bundle's setting, else all]",
)
@click.option(
    "--proposal-tokens-per-pass",
    metavar="COUNTS",
    callback=read_counts,
    help="Tokens of each pass of a proposal.  [default: as for rollouts]",
)
@click.option(
    "--draft-context",
    type=click.IntRange(min=2),
    help="Tokens of a context's end that the draft reads at most.  [default: the bundle's setting, else all]",
)
@click.option("--max-length", type=click.IntRange(min=2), help="Capacity in tokens.  [default: the bundle's]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads in all.  [default: the physical cores]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def compile_ahead(
    bundle: Path,
    compile_for: tuple[str, ...],
    weights: str,
    gamma: int | None,
    kappa: int | None,
    fanout: tuple[int, ...] | None,
    tokens_per_pass: tuple[int, ...] | None,
    branches_per_pass: tuple[int, ...] | None,
    proposal_tokens_per_pass: tuple[int, ...] | None,
    draft_context: int | None,
    max_length: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Compile a BUNDLE's draft ahead of time, beside its graphs, so that a device loads it at once.

    What is compiled fits one set of sizes: give the options that `mirror run` will be given.
    """
    from mirror.compile.ahead import compile_bundle
    from mirror.runtime.options import EngineOptions
    from mirror.targets import open_compiler

    options = EngineOptions(
        threads=threads,
        max_length=max_length,
        gamma=gamma,
        kappa=kappa,
        fanout=fanout,
        tokens_per_pass=tokens_per_pass,
        branches_per_pass=branches_per_pass,
        proposal_tokens_per_pass=proposal_tokens_per_pass,
        draft_context=draft_context,
    )
    reports = [compile_bundle(bundle, open_compiler(name), options, print_notice, weights) for name in compile_for]
    if as_json:
        print_json({"compiled": [dataclasses.asdict(report) for report in reports]})
        return
    for report in reports:
        print_notice(
            f"{report.device}: {len(report.made)} compiled, {len(report.kept)} kept as they were, {size(report.bytes)}"
        )


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def devices(as_json: bool) -> None:
    """List the devices of this machine, what they can run, and why one is missing."""
    from mirror.targets import list_devices

    found = list_devices()
    if as_json:
        print_json({"devices": found})
        return
    present = [device for device in found if device.available]
    rows = [
        (device.name, device.description, f"{device.runtime} {device.version}", device.segments) for device in present
    ]
    print_table(("device", "description", "runtime", "segments"), rows)
    for device in found:
        if not device.available:
            print_notice(f"{device.name}: {device.reason}")


@main.command()
@click.argument("arguments", nargs=-1, metavar="[BUNDLE] [PROMPT]")
@click.option("--prompt-file", metavar="FILE", help="Read the prompt from a file; - for stdin.")
@click.option("--chat", is_flag=True, help="Hold a conversation, keeping its KV cache between turns.")
@click.option("--chat-template/--no-chat-template", default=True, help="Ask the prompt as a chat, or continue it.")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="auto",
    help="How tokens are made; auto takes what `mirror tune` found, else mirror, serial where draft and target share "
    "one device, plain without a draft.",
)
@click.option(
    "--target-device",
    help="Where the target runs: cpu, cuda:0, openvino:CPU|GPU|NPU.  [default: the bundle's setting, else `cpu`]",
)
@click.option(
    "--suffix-device",
    help="Where the target's later layers run, if elsewhere.  [default: the bundle's setting, else the target's]",
)
@click.option(
    "--draft-device",
    help="Where the draft runs; cuda:0:0.25 is a quarter of a GPU.  [default: the bundle's setting, else `cpu`]",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads in all.  [default: the physical cores]")
@click.option(
    "--candidates",
    type=click.Choice(CANDIDATE_SOURCES),
    help="Who offers candidates.  [default: the bundle's setting, else `draft`, with n-grams `both`]",
)
@click.option("--gamma", type=click.IntRange(min=1), help="Draft tokens of a window.  [default: the bundle's]")
@click.option("--kappa", type=click.IntRange(min=1), help="Candidates of a position.  [default: the bundle's]")
@click.option(
    "--fanout",
    metavar="COUNTS",
    callback=read_counts,
    help="Branches that leave after each window position, gamma + 1 counts; overrides kappa.  [default: the bundle's]",
)
@click.option(
    "--tokens-per-pass",
    metavar="COUNTS",
    callback=read_counts,
    help="Tokens that each rollout pass gives a branch; the last repeats.  [default: the bundle's setting, else 1]",
)
@click.option(
    "--branches-per-pass",
    metavar="COUNTS",
    callback=read_counts,
    help="Branches that take part in each rollout pass, the likeliest; the last repeats.  [default: the bundle's "
    "setting, else all]",
)
@click.option(
    "--proposal-tokens-per-pass",
    metavar="COUNTS",
    callback=read_counts,
    help="Tokens that each pass gives where the target waits for a proposal.  [default: as for rollouts]",
)
@click.option(
    "--num-assistant-tokens", type=click.IntRange(min=1), help="The most draft tokens of a round.  [default: gamma]"
)
@click.option("--max-ngram-size", default=3, type=click.IntRange(min=1), help="Longest n-gram that is looked up.")
@click.option(
    "--draft-context",
    type=click.IntRange(min=2),
    help="Tokens of a context's end that the draft reads at most.  [default: the bundle's setting, else all]",
)
@click.option("--max-length", type=click.IntRange(min=2), help="Capacity in tokens.  [default: the bundle's]")
@click.option("--pinned", is_flag=True, help="One width for every pass: the same text in all modes at any precision.")
@click.option("--max-new-tokens", default=256, type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--temperature", default=0.0, type=click.FloatRange(min=0), help="0 takes the likeliest token.")
@click.option("--top-k", default=0, type=click.IntRange(min=0), help="Keep the k likeliest tokens; 0 keeps all.")
@click.option("--top-p", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Keep this much probability.")
@click.option("--min-p", default=0.0, type=click.FloatRange(0, 1), help="Keep tokens this likely beside the likeliest.")
@click.option("--repetition-penalty", default=1.0, type=click.FloatRange(0, min_open=True), help="Above 1 discourages.")
@click.option("--seed", default=0, help="The same seed gives the same text, in every mode.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. May be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--stats/--no-stats", default=None, help="Print statistics on stderr.  [default: unless --json]")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="Write Chrome trace events (Perfetto).")
@debug_option
def run(
    arguments: tuple[str, ...],
    prompt_file: str | None,
    chat: bool,
    chat_template: bool,
    mode: str,
    target_device: str | None,
    suffix_device: str | None,
    draft_device: str | None,
    threads: int | None,
    candidates: str | None,
    gamma: int | None,
    kappa: int | None,
    fanout: tuple[int, ...] | None,
    tokens_per_pass: tuple[int, ...] | None,
    branches_per_pass: tuple[int, ...] | None,
    proposal_tokens_per_pass: tuple[int, ...] | None,
    draft_context: int | None,
    num_assistant_tokens: int | None,
    max_ngram_size: int,
    max_length: int | None,
    pinned: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: tuple[str, ...],
    as_json: bool,
    stats: bool | None,
    trace: Path | None,
) -> None:
    """Answer PROMPT with a BUNDLE, streaming text as its tokens commit.

    Without BUNDLE the default model runs, exported on first use. One argument that is no folder is the
    PROMPT. It may also come from --prompt-file or standard input.
    """
    if chat and (as_json or trace is not None or not chat_template):
        raise click.UsageError(
            "--chat is a conversation on the terminal: leave out --json, --trace, --no-chat-template"
        )
    named, words = split_arguments(arguments)
    prompt = find_prompt(words, prompt_file, chat=chat)
    options = AnswerOptions(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, num_assistant_tokens
    )
    own_draft = named is None and own_draft_pays(mode, target_device, suffix_device, draft_device)
    bundle = named or default_bundle(own_draft=own_draft)
    measured = True
    if mode == "auto":
        mode, measured = auto_mode(bundle, target_device, suffix_device, draft_device)
        measured = measured or own_draft
    output = OutputOptions(as_json, not as_json if stats is None else stats, trace, untuned=not measured)
    import mirror

    with mirror.load(
        bundle,
        mode=mode,
        target_device=target_device,
        suffix_device=suffix_device,
        draft_device=draft_device,
        threads=threads,
        max_length=max_length,
        gamma=gamma,
        kappa=kappa,
        fanout=fanout,
        tokens_per_pass=tokens_per_pass,
        branches_per_pass=branches_per_pass,
        proposal_tokens_per_pass=proposal_tokens_per_pass,
        draft_context=draft_context,
        candidates=candidates,
        pinned=pinned,
        max_ngram_size=max_ngram_size,
    ) as engine:
        if prompt is None or chat:
            code = converse(engine, prompt, options, output)
        else:
            code = answer(engine, prompt, options, output, chat_template=chat_template)
    sys.exit(code)


def split_arguments(arguments: tuple[str, ...]) -> tuple[Path | None, str | None]:
    """Return the bundle and the prompt of a command line; one argument that is no folder is the prompt."""
    if len(arguments) > 2:
        raise click.UsageError(f"expected at most BUNDLE and PROMPT, got {len(arguments)} arguments: quote the prompt")
    if len(arguments) == 2:
        return Path(arguments[0]), arguments[1]
    if not arguments:
        return None, None
    # os.path.isdir, unlike Path.is_dir, takes a text too long to be a path.
    return (Path(arguments[0]), None) if os.path.isdir(arguments[0]) else (None, arguments[0])


def find_prompt(words: str | None, prompt_file: str | None, *, chat: bool) -> str | None:
    """Return the prompt from the one place that has it: the argument, `--prompt-file`, or piped input.

    A conversation needs none; it reads its turns from standard input.
    """
    if words is not None and prompt_file is not None:
        raise click.UsageError("the prompt comes as an argument and by --prompt-file: leave one out")
    if words is None and prompt_file is None and not chat and sys.stdin.isatty():
        raise click.UsageError("no prompt: pass one as an argument, by --prompt-file or on stdin, or use --chat")
    if words is None and (prompt_file is not None or not chat):
        words = read_prompt(prompt_file or "-")
    if words is not None and not words.strip():
        raise click.UsageError("the prompt is empty")
    return words


def read_prompt(path: str) -> str:
    """Return the text of a file, or of standard input for `-`.

    Raises:
        RequestError: it can't be read, or isn't UTF-8.
    """
    name = "standard input" if path == "-" else path
    try:
        with click.open_file(path, encoding="utf-8") as stream:
            text: str = stream.read()
            return text
    except OSError as error:
        raise RequestError(f"{name} can't be read ({error.strerror}); name a text file") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from error


def auto_mode(bundle: Path, target: str | None, suffix: str | None, draft: str | None) -> tuple[str, bool]:
    """Return the mode to decode in, and whether that was measured or is the only one.

    The bundle's settings say it; else `mirror`, or `serial` where the draft would take its time from a target on the
    same device. `plain` without a draft, which is told.

    Args:
        target, suffix, draft: the devices that the user names.
    """
    from mirror.bundle import read_manifest
    from mirror.targets.base import share_device

    manifest = read_manifest(bundle)
    if manifest.draft is None:
        print_notice("the bundle has no draft: decoding in plain mode")
        return "plain", True
    if manifest.settings.mode is not None:
        return manifest.settings.mode, True
    place, other, own = manifest.settings.devices(target, suffix, draft)
    return ("serial" if share_device((place, other or place), own) else "mirror"), False


def own_draft_pays(mode: str, *devices: str | None) -> bool:
    """Whether the default model had better draft for itself, in 8 bits: on a CPU alone that has kernels for that.

    Args:
        mode: the mode that the user names, or `auto`.
        devices: those that the user names.
    """
    from mirror.targets.kernel_library import chosen_kernels

    return mode != "mirror" and all(device in (None, "cpu") for device in devices) and chosen_kernels() is not None


def default_bundle(*, own_draft: bool) -> Path:
    """Return the default model's bundle, exported into the user's cache on first use.

    Args:
        own_draft: whether the model is its own draft; else it is one that was trained for it, or n-grams.
    """
    from mirror.default_model import (
        DEFAULT_MODEL,
        DEFAULT_OPTIONS,
        OWN_DRAFT_OPTIONS,
        default_bundle_path,
        ensure_default_bundle,
    )

    def export_default(checkpoint: Path, bundle: Path, options: DefaultOptions) -> None:
        quiet_libraries(bars=False)
        from mirror.export.build import ExportOptions, export_bundle

        print_notice(f"exporting {DEFAULT_MODEL.name} once to {default_bundle_path(options=options)}")
        with ExportProgress() as progress:
            export_bundle(
                str(checkpoint),
                bundle,
                ExportOptions(
                    exit_layer=options.exit_layer,
                    gamma=options.gamma,
                    kappa=options.kappa,
                    max_length=options.max_length,
                    precision=options.precision,
                    draft=options.draft,
                    int8_draft=options.int8_draft,
                    force=False,
                    allow_failed_check=False,
                ),
                progress,
            )

    return ensure_default_bundle(export_default, options=OWN_DRAFT_OPTIONS if own_draft else DEFAULT_OPTIONS)


def _print_summary(bundle: Path) -> None:
    from mirror.summary import summarize

    summary = summarize(bundle)
    for name, value in _summary_lines(summary):
        click.echo(f"{name:<12}  {value}")
    rows = [
        (
            segment.name,
            str(segment.layers),
            size(segment.weight_bytes),
            size(segment.kv_bytes),
            " ".join(segment.devices),
        )
        for segment in summary.segments
    ]
    print_table(("segment", "layers", "weights", "KV cache", "devices"), rows)


def _summary_lines(summary: BundleSummary) -> list[tuple[str, str]]:
    return [
        ("bundle", summary.path),
        ("model", f"{summary.architecture} ({summary.model_type}) from {summary.source}"),
        ("size", f"{size(summary.total_bytes)}, {summary.precision}"),
        ("layers", f"{summary.layers}, exit after {summary.exit_layer}"),
        ("window", f"gamma {summary.gamma}, kappa {summary.kappa}"),
        ("draft", summary.draft or "none"),
        ("settings", summary.settings or "none; `mirror tune` finds some"),
        ("capacity", f"{summary.max_length} tokens"),
        ("target takes", _memory(summary.target_memory)),
        *([("draft takes", _memory(summary.draft_memory))] if summary.draft_memory is not None else []),
        ("made by", f"{summary.made_by}, schema {summary.schema_version}"),
    ]


def _memory(memory: Memory) -> str:
    """Return what loading takes, at any capacity and at the bundle's own."""
    return (
        f"{size(memory.weight_bytes)} of weights + {size(memory.slot_bytes)} a token of capacity "
        f"= {size(memory.bytes)} at {memory.max_length} tokens"
    )
