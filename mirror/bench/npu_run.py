"""Mirror mode with a bundle's draft on the Hexagon emulator, its tokens against plain decoding's.

Says how long compiling ahead and loading take; times of passes on the emulator say nothing about an NPU.

    python -m mirror.bench.npu_run BUNDLE docs/results/npu-run.json --work FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import provenance
from mirror.bundle import read_manifest
from mirror.compile.ahead import compile_bundle
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.runtime.text import TextCodec
from mirror.targets import open_compiler, open_device
from mirror.targets.base import Device
from mirror.targets.cpu import CpuDevice

OPTIONS = EngineOptions(mode=Mode.MIRROR, max_length=160, fanout=(4, 2, 1, 1, 0, 0, 0, 0), draft_timeout_s=600)


def run(bundle: Path, device: Device, prompts: Sequence[Sequence[int]], tokens: int, mode: Mode) -> dict[str, Any]:
    """Load a bundle with its draft on a device and answer prompts."""
    options = dataclasses.replace(OPTIONS, mode=mode)
    started_s = time.perf_counter()
    with Engine(bundle, read_manifest(bundle), options, CpuDevice(), device) as engine:
        loaded_s = time.perf_counter() - started_s
        results = [engine.generate_tokens(prompt, max_new_tokens=tokens) for prompt in prompts]
    rounds = [item for result in results for item in result.rounds]
    return {
        "load_s": round(loaded_s, 2),
        "tokens": [list(result.tokens) for result in results],
        "rounds": len(rounds),
        "accepted": sum(item.accepted for item in rounds),
        "events": [event.message for result in results for event in result.events],
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where the bundle is copied and compiled.")
@click.option("--tokens", default=24, help="Tokens of each answer.")
@click.option("--prompts", "count", default=2, help="How many prompts.")
@click.option("--weights", default="as-is", help="How the draft's weights are stored: as-is, int8, int4.")
def main(bundle: Path, result: Path, work: Path, tokens: int, count: int, weights: str) -> None:
    """Compile BUNDLE's draft for the emulator and run mirror mode on it."""
    shutil.copytree(bundle, work)
    codec = TextCodec.load(work)
    prompts = [codec.encode_prompt(prompt.text, True) for prompt in load_prompts(1)[:count]]
    plain = run(work, CpuDevice(), prompts, tokens, Mode.PLAIN)
    on_cpu = run(work, CpuDevice(), prompts, tokens, Mode.MIRROR)
    from_graph = run(work, open_device("qnn:htp"), prompts[:1], 1, Mode.MIRROR)
    started_s = time.perf_counter()
    report = compile_bundle(work, open_compiler("qnn:v73"), OPTIONS, click.echo, weights)
    compiled_s = time.perf_counter() - started_s
    on_npu = run(work, open_device("qnn:htp"), prompts, tokens, Mode.MIRROR)
    assert on_npu["tokens"] == on_cpu["tokens"] == plain["tokens"], "the text depends on where the draft runs"
    record = {
        **provenance("mirror.bench.npu_run"),
        "draft": dataclasses.asdict(read_manifest(work).draft),  # type: ignore[arg-type]
        "weights": weights,
        "same_tokens_as_plain": True,
        "generated_tokens": sum(map(len, plain["tokens"])),
        "passes_compiled": [[item.width, item.rows, item.capacity] for item in report.made],
        "compile_s": round(compiled_s, 1),
        "compiled_bytes": report.bytes,
        "load_from_graph_s": from_graph["load_s"],
        "load_compiled_s": on_npu["load_s"],
        "draft_on_cpu": {name: on_cpu[name] for name in ("rounds", "accepted", "events")},
        "draft_on_emulator": {name: on_npu[name] for name in ("rounds", "accepted", "events")},
    }
    result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps({name: record[name] for name in list(record)[4:]}))


if __name__ == "__main__":
    main()
