"""The `mirror` command. Parts are imported inside the commands, so `mirror --help` loads none of them.

Exit codes: 0 done, 1 failed (`error:` and `hint:` on stderr), 2 wrong usage, 130 Ctrl-C. No traceback
without `--debug`.
"""

from __future__ import annotations

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
    from mirror.summary import BundleSummary

Command = TypeVar("Command", bound=Callable[..., Any])

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
MODES = ("plain", "serial", "mirror")
CANDIDATE_SOURCES = ("exit", "draft", "both")
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


@click.group(cls=MirrorGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="mirror")
@debug_option
def main() -> None:
    """Exact speculative decoding that overlaps draft and target on the devices you own."""


@main.command()
@click.argument("model")
@click.option("-o", "--output", type=FOLDER, required=True, metavar="BUNDLE", help="The bundle folder to make.")
@click.option("--exit-layer", default="0.5", help="Where to cut the target: a layer number, or a fraction below 1.")
@click.option("--gamma", default=7, type=click.IntRange(min=1), help="Draft tokens judged by one verification.")
@click.option("--kappa", default=8, type=click.IntRange(min=1), help="Candidates offered at each window position.")
@click.option("--max-length", default=2048, type=click.IntRange(min=2), help="Capacity of the KV cache, in tokens.")
@click.option("--precision", default="fp32", type=click.Choice(PRECISIONS), help="int8 and int4 quantize weights only.")
@click.option(
    "--draft",
    default="ngram",
    help="A folder or hub id with the target's tokenizer; layers:0,10,19,29 for some of the target's own; ngram; none.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@click.option(
    "--allow-failed-check", is_flag=True, help="Keep the bundle even where the self-check finds a difference."
)
@debug_option
def export(
    model: str,
    output: Path,
    exit_layer: str,
    gamma: int,
    kappa: int,
    max_length: int,
    precision: str,
    draft: str,
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
    help="How tokens are made.  [default: mirror; plain for a bundle without a draft]",
)
@click.option("--target-device", default="cpu", help="Where the target runs: cpu, cuda:0, openvino:CPU|GPU|NPU.")
@click.option("--draft-device", default="cpu", help="Where the draft runs.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads in all.  [default: the physical cores]")
@click.option("--candidates", default="both", type=click.Choice(CANDIDATE_SOURCES), help="Who offers candidates.")
@click.option("--gamma", type=click.IntRange(min=1), help="Draft tokens of a window.  [default: the bundle's]")
@click.option("--kappa", type=click.IntRange(min=1), help="Candidates of a position.  [default: the bundle's]")
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
    mode: str | None,
    target_device: str,
    draft_device: str,
    threads: int | None,
    candidates: str,
    gamma: int | None,
    kappa: int | None,
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
    options = AnswerOptions(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
    output = OutputOptions(as_json, not as_json if stats is None else stats, trace)
    bundle = named or default_bundle()
    import mirror

    with mirror.load(
        bundle,
        mode=mode or best_mode(bundle),
        target_device=target_device,
        draft_device=draft_device,
        threads=threads,
        max_length=max_length,
        gamma=gamma,
        kappa=kappa,
        candidates=candidates,
        pinned=pinned,
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


def best_mode(bundle: Path) -> str:
    """Return `mirror`, or `plain` for a bundle that has no draft, and say so."""
    from mirror.bundle import read_manifest

    if read_manifest(bundle).draft is not None:
        return "mirror"
    print_notice("the bundle has no draft: decoding in plain mode")
    return "plain"


def default_bundle() -> Path:
    """Return the default model's bundle, exported into the user's cache on first use."""
    from mirror.default_model import DEFAULT_MODEL, default_bundle_path, ensure_default_bundle

    def export_default(checkpoint: Path, bundle: Path, options: DefaultOptions) -> None:
        quiet_libraries(bars=False)
        from mirror.export.build import ExportOptions, export_bundle

        print_notice(f"exporting {DEFAULT_MODEL.name} once to {default_bundle_path()}")
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
                    force=False,
                    allow_failed_check=False,
                ),
                progress,
            )

    return ensure_default_bundle(export_default)


def _print_summary(bundle: Path) -> None:
    from mirror.summary import summarize

    summary = summarize(bundle)
    for name, value in _summary_lines(summary):
        click.echo(f"{name:<12}  {value}")
    rows = [
        (
            segment.name,
            str(segment.layers),
            size(segment.graph_bytes),
            size(segment.kv_bytes),
            " ".join(segment.devices),
        )
        for segment in summary.segments
    ]
    print_table(("segment", "layers", "graphs", "KV cache", "devices"), rows)


def _summary_lines(summary: BundleSummary) -> list[tuple[str, str]]:
    return [
        ("bundle", summary.path),
        ("model", f"{summary.architecture} ({summary.model_type}) from {summary.source}"),
        ("size", f"{size(summary.total_bytes)}, {summary.precision}"),
        ("layers", f"{summary.layers}, exit after {summary.exit_layer}"),
        ("window", f"gamma {summary.gamma}, kappa {summary.kappa}"),
        ("capacity", f"{summary.max_length} tokens"),
        ("draft", summary.draft or "none"),
        ("made by", f"{summary.made_by}, schema {summary.schema_version}"),
    ]
