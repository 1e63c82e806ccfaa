"""Plain decoding against onnxruntime-genai on one GPU: same layers, same weights, same precision, in turns.

    python -m mirror.bench.gpu_genai CHECKPOINT WORK --layers 12 --out docs/results/gpu-genai.json

The first layers of a checkpoint (a whole one twice over needs more memory than most machines have) become a bundle and,
by onnxruntime-genai's own builder, a genai model, both under WORK; what is there is used again. Each answer continues
the same random tokens. Only tokens after the first are timed. genai runs as its builder leaves it and with CUDA graphs
turned on; mirror runs rows of width 1 and, as in every other mode, pinned to the window's width.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

import mirror
from mirror.bench.provenance import gpu_name, provenance
from mirror.errors import ExportError

_INDEX = "model.safetensors.index.json"
_GRAPH_OPTION = "enable_cuda_graph"

Decode = Callable[[Sequence[int], int], float]  # prompt, new tokens -> tokens/s after the first


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--layers", default=12, show_default=True)
@click.option("--precision", default="fp16", show_default=True, type=click.Choice(["fp32", "fp16"]))
@click.option("--device", default="cuda:0", show_default=True, type=click.Choice(["cuda:0", "cpu"]))
@click.option("--contexts", default="500", show_default=True, help="Tokens of the prompts, comma-separated.")
@click.option("--tokens", default=64, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--graphs/--no-graphs", default=True, show_default=True, help="Try genai with CUDA graphs too.")
@click.option("--build-only", is_flag=True, help="Stop when both models are there.")
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(
    checkpoint: Path,
    work: Path,
    layers: int,
    precision: str,
    device: str,
    contexts: str,
    tokens: int,
    repeats: int,
    graphs: bool,
    build_only: bool,
    out: Path | None,
) -> None:
    """Compare mirror's plain decoding of CHECKPOINT's first layers with onnxruntime-genai's."""
    lengths = [int(part) for part in contexts.split(",")]
    longest = max(lengths) + tokens + 1
    build(checkpoint, work, layers, precision, device, longest)
    if build_only:
        return
    arms = load_arms(work, device, longest, graphs=graphs and device != "cpu")
    rows = [row for length in lengths for row in compare(arms, prompt_of(work, length), tokens, repeats)]
    for row in rows:
        click.echo(json.dumps(row))
    facts = {**provenance("mirror.bench.gpu_genai"), "gpu": gpu_name(0), "layers": layers, "precision": precision}
    if out is not None:
        out.write_text(json.dumps({**facts, "genai": _genai_version(), "rows": rows}, indent=1) + "\n", "utf-8")


def fewer_layers(checkpoint: Path, out: Path, layers: int) -> None:
    """Write a checkpoint of another one's first layers, its files linked.

    Raises:
        ExportError: the checkpoint has fewer layers.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["num_hidden_layers"] < layers:
        raise ExportError(f"{checkpoint} has {config['num_hidden_layers']} layers, {layers} are wanted; ask for fewer")
    out.mkdir(parents=True)
    for path in checkpoint.glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    config["num_hidden_layers"] = layers
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    names = {path.name for path in checkpoint.glob("*.safetensors")}
    if (checkpoint / _INDEX).is_file():
        index = json.loads((checkpoint / _INDEX).read_text(encoding="utf-8"))
        kept = {name: file for name, file in index["weight_map"].items() if _layer_of(name) < layers}
        (out / _INDEX).write_text(json.dumps({**index, "weight_map": kept}, indent=1), encoding="utf-8")
        names = set(kept.values())
    for name in names:
        os.link(checkpoint / name, out / name)


def _layer_of(name: str) -> int:
    """Return the layer that a tensor belongs to, -1 for those outside of layers."""
    _, found, rest = name.partition(".layers.")
    return int(rest.split(".")[0]) if found else -1


def build(checkpoint: Path, work: Path, layers: int, precision: str, device: str, longest: int) -> None:
    """Make the small checkpoint, the bundle, and genai's model with and without CUDA graphs, where they are missing."""
    from mirror.export.build import ExportOptions, export_bundle

    work.mkdir(parents=True, exist_ok=True)
    if not (work / "checkpoint").exists():
        fewer_layers(checkpoint, work / "checkpoint", layers)
    if not (work / "bundle").exists():
        options = ExportOptions(precision=precision, draft=None, max_length=longest, allow_failed_check=True)
        export_bundle(str(work / "checkpoint"), work / "bundle", options)
    if not (work / "genai").exists():
        kind = device.partition(":")[0]
        command = [sys.executable, str(_builder()), "-p", precision, "-e", kind]
        paths = ["-i", work / "checkpoint", "-o", work / "genai", "-c", work / "cache"]
        subprocess.run([*command, *map(str, paths)], check=True)
    if device != "cpu" and not (work / "genai-graphs").exists():
        with_graphs(work / "genai", work / "genai-graphs")


def _builder() -> Path:
    """Return genai's model builder, which needs none of its libraries and so is run as a file."""
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or found.origin is None:
        raise ExportError("onnxruntime-genai is not installed; run: pip install onnxruntime-genai-cuda==0.18.0")
    return Path(found.origin).parent / "models" / "builder.py"


def with_graphs(folder: Path, out: Path) -> None:
    """Link a genai model under another configuration: CUDA graphs on."""
    out.mkdir()
    for path in folder.iterdir():
        if path.name != "genai_config.json":
            os.link(path, out / path.name)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    for entry in config["model"]["decoder"]["session_options"]["provider_options"]:
        for options in entry.values():
            options[_GRAPH_OPTION] = "1"
    (out / "genai_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def prompt_of(work: Path, length: int) -> list[int]:
    """Return random tokens of a model, the same at each call."""
    config = json.loads((work / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    tokens: list[int] = np.random.default_rng(0).integers(100, min(config["vocab_size"], 40_000), length).tolist()
    return tokens


def load_arms(work: Path, device: str, longest: int, *, graphs: bool) -> dict[str, Decode]:
    """Return how each arm decodes, mirror's width 1 first."""
    arms = {
        "mirror, width 1": _mirror(work / "bundle", device, pinned=False),
        "mirror, pinned": _mirror(work / "bundle", device, pinned=True),
        "genai": _genai(work / "genai", longest),
    }
    if graphs:
        arms["genai, CUDA graphs"] = _genai(work / "genai-graphs", longest)
    return arms


def _mirror(bundle: Path, device: str, *, pinned: bool) -> Decode:
    engine = mirror.load(bundle, mode="plain", target_device=device, pinned=pinned)

    def decode(prompt: Sequence[int], tokens: int) -> float:
        rounds = engine.generate_tokens(prompt, max_new_tokens=tokens).rounds
        if not rounds:
            return float("nan")  # the first token ended the answer
        return sum(item.committed for item in rounds) / (rounds[-1].end_s - rounds[0].start_s)

    return decode


def _genai(folder: Path, longest: int) -> Decode:
    genai = _library()
    model = genai.Model(str(folder))

    def decode(prompt: Sequence[int], tokens: int) -> float:
        params = genai.GeneratorParams(model)
        # A fixed length, so that CUDA graphs stay; no end token before it.
        params.set_search_options(max_length=longest, min_length=longest, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(list(prompt))
        generator.generate_next_token()
        generator.get_next_tokens()
        start_s = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
            generator.get_next_tokens()
        return (tokens - 1) / (time.perf_counter() - start_s)

    return decode


def _genai_version() -> str:
    return str(_library().__version__)


def _library() -> Any:
    """Return onnxruntime-genai, which is installed by whoever compares with it."""
    return importlib.import_module("onnxruntime_genai")


def compare(
    arms: Mapping[str, Decode], prompt: Sequence[int], tokens: int, repeats: int, warm: int = 2
) -> list[dict[str, Any]]:
    """Return each arm's speed after a prompt, in turns; ratios are mirror's speed of the same turn over the arm's."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm + repeats):
        for name, decode in arms.items():
            speed = decode(prompt, tokens)
            if turn >= warm:
                speeds[name].append(speed)
    mine = speeds[next(iter(arms))]
    return [
        {
            "arm": name,
            "context": len(prompt),
            "tokens_per_s": statistics.median(found),
            "low": min(found),
            "high": max(found),
            "mirror_over_it": statistics.median(a / b for a, b in zip(mine, found, strict=True)),
        }
        for name, found in speeds.items()
    ]


if __name__ == "__main__":
    main()
