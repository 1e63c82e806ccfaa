"""Write a checkpoint of a big model's shape whose weights are holes in sparse files.

    python -m mirror.bench.big_checkpoint OUT [--shape qwen3-14b]

Nothing is stored but headers, so a 28 GB checkpoint takes a second and no disk. For measuring export;
the numbers are zeros.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoConfig, PretrainedConfig

from mirror.export.trace import hollow

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-14b": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "smollm2-360m": {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49152,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
}
_CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SHARD_BYTES = 4 * 10**9


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="qwen3-14b")
def main(out: Path, shape: str) -> None:
    """Write the checkpoint folder OUT."""
    config = make_config(shape)
    out.mkdir(parents=True)
    config.save_pretrained(out)
    total = 0
    for number, shard in enumerate(_shards(config), start=1):
        total += _write_sparse(out / f"model-{number:05d}.safetensors", shard)
    click.echo(f"{out}: {total / 1e9:.1f} GB in holes")


def make_config(shape: str) -> PretrainedConfig:
    """Return the config of a named shape."""
    facts = dict(SHAPES[shape])
    family = facts.pop("model_type")
    config = AutoConfig.for_model(family, **facts, dtype="float16", max_position_embeddings=40960)
    config.architectures = [_CLASSES[family]]
    return config


def _shards(config: PretrainedConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, parameter in hollow(config, torch.float16).named_parameters():
        if shard and size + parameter.numel() * 2 > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tuple(parameter.shape)
        size += parameter.numel() * 2
    yield shard


def _write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
    return offset


if __name__ == "__main__":
    main()
