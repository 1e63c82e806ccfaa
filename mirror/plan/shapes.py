"""The work of a model that is not exported, from the sizes in a Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mirror.errors import RequestError
from mirror.plan.work import ModelWork, Work

# Families whose layers are attention and a gated MLP; head norms on queries and keys cost two kernels more.
_GATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2")
_HEAD_NORMS = ("qwen3", "olmo2")
# Seven products, two norms with their additions, two rotations, attention, and three for the gate.
_LAYER_KERNELS, _HEAD_NORM_KERNELS, _HEAD_KERNELS, _EXIT_KERNELS = 15, 2, 3, 9


@dataclass(frozen=True)
class Storage:
    """Bytes of a stored number, scales included.

    Attributes:
        layer, head: in the layers' matrices, and in the LM head.
        cache: in the KV cache.
        precision: the arithmetic's name, for a device's rate.
    """

    layer: float
    head: float
    cache: float
    precision: str


# Ours as `mirror export` writes them (blocks of 32 with one scale); `int4-openvino` is OpenVINO's default
# (groups of 128 with scale and zero point, an 8-bit LM head), `w4a16` Qualcomm's.
STORAGE: Mapping[str, Storage] = {
    "fp32": Storage(4, 4, 4, "fp32"),
    "fp16": Storage(2, 2, 2, "fp16"),
    "bf16": Storage(2, 2, 2, "bf16"),
    "int8": Storage(1 + 4 / 32, 1 + 4 / 32, 4, "int8"),
    "int4": Storage(0.5 + 4 / 32, 0.5 + 4 / 32, 4, "int4"),
    "int8-fp16": Storage(1 + 2 / 32, 1 + 2 / 32, 2, "int8"),
    "int4-fp16": Storage(0.5 + 2 / 32, 0.5 + 2 / 32, 2, "int4"),
    "int4-openvino": Storage(0.5 + 2.5 / 128, 1, 2, "int4"),
    "w4a16": Storage(0.5, 1, 1, "int4"),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated MLPs; `heads` are query heads, each `head_dim` wide."""

    name: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    head_norms: bool = False

    @property
    def layer_matrices(self) -> int:
        """Numbers in one layer's matrices."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    def work(self, storage: Storage, vocabulary: int | None = None, capacity_slots: int = 2048) -> ModelWork:
        """Return the work of this model.

        Args:
            vocabulary: tokens that its head knows, where it was trimmed.
        """
        layer = Work(
            matrices=self.layer_matrices,
            matrix_bytes=self.layer_matrices * storage.layer,
            slot_bytes=2 * self.kv_heads * self.head_dim * storage.cache,
            attention=2 * self.heads * self.head_dim,
            kernels=_LAYER_KERNELS + _HEAD_NORM_KERNELS * self.head_norms,
        )
        size = self.hidden_size * (vocabulary or self.vocab_size)
        head = Work(size, size * storage.head, kernels=_HEAD_KERNELS)
        exit_head = Work(size, size * storage.head, kernels=_EXIT_KERNELS)
        return ModelWork(
            self.name, storage.precision, self.layers, layer, head, exit_head, Work(kernels=1), capacity_slots
        )


def named_shapes() -> tuple[str, ...]:
    """Return the names of the shapes that come with the package, sorted."""
    folder = resources.files("mirror").joinpath("plan/shapes")
    return tuple(sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json")))


def read_shape(source: str) -> Shape:
    """Return a shape by its name, or from a `config.json` or a folder that has one.

    Raises:
        RequestError: there is no such shape or file, or it doesn't describe a family that can be counted.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return shape_of(str(path), _json(path.read_text(encoding="utf-8"), str(path)))
    if source not in named_shapes():
        raise RequestError(f"there is no shape {source!r}; name a config.json, or one of {', '.join(named_shapes())}")
    text = resources.files("mirror").joinpath(f"plan/shapes/{source}.json").read_text(encoding="utf-8")
    return shape_of(source, _json(text, source))


def shape_of(name: str, config: Mapping[str, Any]) -> Shape:
    """Return the shape that a config describes.

    Raises:
        RequestError: a size is missing, or the family's layers are of another kind.
    """
    family = config.get("model_type")
    if family not in _GATED:
        raise RequestError(
            f"{name} is of the family {family!r}; shapes are counted for {', '.join(_GATED)}: export this model and "
            "plan with the bundle"
        )
    hidden, heads = _size(name, config, "hidden_size"), _size(name, config, "num_attention_heads")
    return Shape(
        name=name,
        hidden_size=hidden,
        intermediate_size=_size(name, config, "intermediate_size"),
        layers=_size(name, config, "num_hidden_layers"),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        vocab_size=_size(name, config, "vocab_size"),
        head_norms=family in _HEAD_NORMS,
    )


def _size(name: str, config: Mapping[str, Any], key: str) -> int:
    found = config.get(key)
    if not isinstance(found, int) or found < 1:
        raise RequestError(f"{name} has {key} {found!r}; expected a whole number above 0, as in a model's config.json")
    return found


def _json(text: str, name: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"{name} is not JSON ({error}); name a model's config.json") from error
    if not isinstance(found, dict):
        raise RequestError(f"{name} holds no JSON object; name a model's config.json")
    return found
