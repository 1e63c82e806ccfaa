"""Fit what `mirror distill` made for a small model to the same model in a big one's shape.

    python -m mirror.bench.spread_distilled DISTILLED MODEL TARGET OUT

Exit heads read and write the wide state: their matrices get columns for channels that are zero, and zero
rows. The draft stays as small as it is; it gets the small model's embedding and LM head for its own, since
the big target's have another width.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from mirror.bench.spread_checkpoint import spread_layer
from mirror.errors import ExportError, MirrorError
from mirror.export.checkpoint import Checkpoint, open_checkpoint, tokenizer_fingerprint

_RECORD, _DRAFT_FILE = "distill.json", Path("draft") / "model.safetensors"
_FORMAT = {"format": "pt"}
_SCALE = ".scale"  # the rows' scales of a tensor that is stored as int8

Tensors = Mapping[str, NDArray[Any]]


def spread_distilled(folder: Path, small: Checkpoint, target: Path, out: Path) -> None:
    """Write the distilled folder `out`, for the spread checkpoint at `target`.

    Args:
        folder: what was distilled for `small`; its layers become the target's.

    Raises:
        ExportError: `folder` was made for another model.
    """
    record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    if record["target"]["fingerprint"] != small.fingerprint:
        raise ExportError(
            f"{folder} was distilled for {record['target']['name']}, not for {small.name}; name the model it belongs to"
        )
    big = open_checkpoint(str(target))
    out.mkdir(parents=True)
    if (folder / "vocabulary.safetensors").is_file():
        shutil.copyfile(folder / "vocabulary.safetensors", out / "vocabulary.safetensors")
    for layer in record["exit_layers"]:
        tensors = _widen(load_file(folder / f"exit_head_{layer}.safetensors"), small, big, ("norm", "gate", "up"))
        tensors["down.weight"] = _more_rows(tensors["down.weight"], big.config.hidden_size)
        save_file(tensors, out / f"exit_head_{_moved(layer, small, big)}.safetensors")
    if (folder / _DRAFT_FILE).is_file():
        _write_draft(folder, small, big, out)
    text = json.dumps(_record(record, small, big), indent=1)
    (out / _RECORD).write_text(text + "\n", encoding="utf-8")


def write_own_draft(folder: Path, small: Checkpoint, out: Path) -> None:
    """Write a distilled draft as a model like any other: embedding and tokenizer its own, float16, without streams.

    Args:
        folder: what was distilled for `small`.
    """
    stored = _floats(load_file(folder / _DRAFT_FILE))
    tensors = {name: tensor.astype(np.float16) for name, tensor in stored.items() if name.startswith("model.")}
    config = AutoConfig.from_pretrained(folder / "draft")
    out.mkdir(parents=True)
    save_file({**tensors, **_vocabulary(small, tied=config.tie_word_embeddings)}, out / _DRAFT_FILE.name, _FORMAT)
    config.save_pretrained(out)
    small.write_tokenizer(out)


def _vocabulary(small: Checkpoint, *, tied: bool) -> dict[str, NDArray[np.float16]]:
    """Return a model's embedding, and its LM head where that is another matrix."""
    tensors = {}
    for name in ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]:
        found = small.weights.find((name,))
        if found is None:
            raise ExportError(f"{small.name} has no tensor {name} to give to its draft")
        tensors[name] = found.tensor.numpy().astype(np.float16)
    return tensors


def _record(record: dict[str, Any], small: Checkpoint, big: Checkpoint) -> dict[str, Any]:
    """Return the record with the big target's layers and fingerprints; results stay the small model's."""
    changed = copy.deepcopy(record)
    layers = [_moved(layer, small, big) for layer in record["exit_layers"]]
    changed["target"] = {
        "name": f"{small.name} in the shape of {big.config.num_hidden_layers} x {big.config.hidden_size}",
        "fingerprint": big.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(_if_there(big.path / "tokenizer.json")),
    }
    changed["norm_eps"] = record["norm_eps"] * small.config.hidden_size / big.config.hidden_size
    changed["exit_layers"] = layers
    changed["exit_head_files"] = [f"exit_head_{layer}.safetensors" for layer in layers]
    for facts, key in ((changed.get("draft"), "feature_layer"), (changed.get("defaults"), "exit_layer")):
        if facts and facts.get(key) is not None:
            facts[key] = _moved(int(facts[key]), small, big)
    return changed


def _moved(layer: int, small: Checkpoint, big: Checkpoint) -> int:
    return spread_layer(layer, small.config.num_hidden_layers, big.config.num_hidden_layers)


def _write_draft(folder: Path, small: Checkpoint, big: Checkpoint, out: Path) -> None:
    """Write the draft with an embedding of its own, float16; what reads the target's state is widened."""
    stored = load_file(folder / _DRAFT_FILE)
    features = {
        name: tensor for name, tensor in stored.items() if name.startswith("features.") and "absent" not in name
    }
    tensors = {name: tensor for name, tensor in stored.items() if name not in features}
    if features:
        tensors.update(_widen(features, small, big, ("features.norm", "features")))
    config = AutoConfig.from_pretrained(folder / "draft")
    tensors.update(_vocabulary(small, tied=config.tie_word_embeddings))
    (out / "draft").mkdir()
    save_file(tensors, out / _DRAFT_FILE, _FORMAT)
    config.save_pretrained(out / "draft")


def _widen(stored: Tensors, small: Checkpoint, big: Checkpoint, readers: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Return float16 tensors; those of `readers` (norms and matrices over the target's state) read the wide one."""
    tensors = _floats(stored)
    narrow, wide = small.config.hidden_size, big.config.hidden_size
    for name in (f"{reader}.weight" for reader in readers):
        tensor = tensors[name]
        columns = np.zeros((*tensor.shape[:-1], wide), np.float32)
        columns[..., :narrow] = tensor * (np.sqrt(narrow / wide) if tensor.ndim == 1 else 1.0)
        tensors[name] = columns
    return {name: tensor.astype(np.float16) for name, tensor in tensors.items()}


def _floats(stored: Tensors) -> dict[str, NDArray[np.float32]]:
    """Return tensors as float32; an int8 one is multiplied by its rows' scales."""
    scales = {name.removesuffix(_SCALE): tensor for name, tensor in stored.items() if name.endswith(_SCALE)}
    whole = {name: tensor.astype(np.float32) for name, tensor in stored.items() if not name.endswith(_SCALE)}
    return {name: tensor * scales[name][:, None] if name in scales else tensor for name, tensor in whole.items()}


def _more_rows(tensor: NDArray[Any], rows: int) -> NDArray[Any]:
    wide = np.zeros((rows, tensor.shape[1]), tensor.dtype)
    wide[: tensor.shape[0]] = tensor
    return wide


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


@click.command()
@click.argument("distilled", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("model")
@click.argument("target", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
def main(distilled: Path, model: str, target: Path, out: Path) -> None:
    """Write what was DISTILLED for MODEL into OUT, fitted to MODEL as it was spread into the folder TARGET."""
    try:
        spread_distilled(distilled, open_checkpoint(model), target, out)
    except MirrorError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
