"""What `mirror distill` made, as export takes it: exit heads, a draft that borrows from its target, defaults."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import AutoConfig, PretrainedConfig

from mirror.errors import ExportError
from mirror.export.bind import Binder
from mirror.export.draft_inputs import FEATURE_WEIGHT, INPUT_TENSORS, STREAMS
from mirror.export.weights import DRAFT_SCOPE, ChainedSource, MemorySource, WeightSource

RECORD = "distill.json"
FORMAT = 2
ADAPTER_TENSORS = ("norm.weight", "gate.weight", "up.weight", "down.weight")
EPSILON_KEY = "exit_head_epsilon"  # in the source graphs' metadata
_SCALE = ".scale"

Tensors = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Defaults:
    """What a training found best for bundles made with it; None where it does not say."""

    exit_layer: int | None = None
    kappa: int | None = None
    candidates: str | None = None
    fanout: tuple[int, ...] | None = None
    tokens_per_pass: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Distilled:
    """A folder that `mirror distill` wrote."""

    folder: Path
    record: dict[str, Any]

    def check_target(self, name: str, fingerprint: str, tokenizer: str) -> None:
        """Refuse a target that this was not made for.

        Raises:
            ExportError: the fingerprints differ.
        """
        made_for = self.record["target"]
        if made_for["fingerprint"] != fingerprint or made_for["tokenizer_fingerprint"] != tokenizer:
            raise ExportError(
                f"{self.folder} was distilled for {made_for.get('name', 'another target')}, not for {name}; "
                "distill a draft for this target, or choose another --draft"
            )

    @property
    def defaults(self) -> Defaults:
        """The recorded defaults."""
        said = {name: value for name, value in self.record["defaults"].items() if value is not None}
        lists = {name: tuple(said[name]) for name in ("fanout", "tokens_per_pass") if name in said}
        return Defaults(**{**said, **lists})

    @property
    def has_draft(self) -> bool:
        """Whether there is a draft, not only exit heads."""
        return (self.folder / "draft" / "config.json").is_file()

    @property
    def feature_layer(self) -> int | None:
        """The exit layer whose state feeds the draft, None for a draft of tokens alone."""
        draft = self.record.get("draft")
        return None if draft is None else draft["feature_layer"]

    @property
    def suggested_vocabulary(self) -> int | None:
        """How many tokens a trimmed head should know, None for all."""
        size: int | None = self.record["vocabulary"]
        return size

    def vocabulary(self, count: int) -> NDArray[np.int64]:
        """Return the target's most frequent tokens, int64 [count].

        Raises:
            ExportError: the folder ranks fewer.
        """
        path = self.folder / "vocabulary.safetensors"
        ids = load_file(path)["ids"] if path.is_file() else np.empty(0, np.int32)
        if len(ids) < count:
            raise ExportError(f"{self.folder} ranks {len(ids)} tokens, --draft-vocabulary is {count}; ask for fewer")
        return ids[:count].astype(np.int64)

    def draft_config(self) -> PretrainedConfig:
        """Return the draft's config."""
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder / "draft")
        return config

    def draft_weights(self, target: WeightSource) -> WeightSource:
        """Return the draft's tensors, then the target's for those that it shares."""
        return ChainedSource((MemorySource(self._draft_tensors(), DRAFT_SCOPE), target))

    def add_draft_inputs(self, graph: ir.Graph, binder: Binder) -> tuple[int, int | None]:
        """Put the tensors of streams and features into the draft's source graph.

        Returns:
            How many streams it has, and the exit layer that feeds it.
        """
        tensors = self._draft_tensors()
        graph.metadata_props[EPSILON_KEY] = str(self.record["norm_eps"])
        for name in INPUT_TENSORS:
            if name in tensors:
                binder.add(graph, name, tensors[name], f"{DRAFT_SCOPE}{name}")
        fed = self.feature_layer
        if (FEATURE_WEIGHT in tensors) is not (fed is not None):
            raise ExportError(
                f"{self.folder / RECORD} says feature_layer {fed} and the draft "
                f"{'has' if FEATURE_WEIGHT in tensors else 'lacks'} {FEATURE_WEIGHT}; distill again"
            )
        return (tensors[STREAMS].shape[0] if STREAMS in tensors else 0), fed

    def add_exit_heads(self, graph: ir.Graph, binder: Binder) -> tuple[int, ...]:
        """Put every exit head's tensors into the target's source graph; return their exit layers."""
        graph.metadata_props[EPSILON_KEY] = str(self.record["norm_eps"])
        layers = []
        for path in sorted(self.folder.glob("exit_head_*.safetensors")):
            layer = int(path.stem.rpartition("_")[2])
            tensors = read_tensors(path)
            missing = [name for name in ADAPTER_TENSORS if name not in tensors]
            if missing:
                raise ExportError(f"{path} lacks the tensor {missing[0]}; distill again")
            for name in ADAPTER_TENSORS:
                binder.add(graph, adapter_name(layer, name), tensors[name], adapter_name(layer, name))
            layers.append(layer)
        return tuple(sorted(layers))

    def _draft_tensors(self) -> Tensors:
        return read_tensors(self.folder / "draft" / "model.safetensors")


def read_tensors(path: Path) -> Tensors:
    """Return a trained file's tensors by name; those stored in 8 bits, with a scale per row, as float32."""
    stored = load_file(path)
    tensors: Tensors = {}
    for name, values in stored.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored:
            continue
        scale = stored.get(name + _SCALE)
        tensors[name] = values if scale is None else values.astype(np.float32) * scale.astype(np.float32)[:, None]
    return tensors


def adapter_name(layer: int, tensor: str) -> str:
    """Return the initializer that holds a tensor of the exit head at a layer."""
    return f"exit_head.{layer}.{tensor}"


def open_distilled(text: str) -> Distilled | None:
    """Return the distilled folder that `--draft` names, None where it names something else.

    Raises:
        ExportError: the record is broken or of another version.
    """
    path = Path(text).expanduser() / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ExportError(f"{path} is not readable JSON ({error}); distill again") from error
    if record.get("format") != FORMAT:
        raise ExportError(
            f"{path} is of another version (format {record.get('format')!r}, expected {FORMAT}); distill again"
        )
    missing = {"target", "norm_eps", "draft", "vocabulary", "defaults"} - record.keys()
    if missing or not {"fingerprint", "tokenizer_fingerprint"} <= record["target"].keys():
        raise ExportError(f"{path} lacks {', '.join(sorted(missing)) or 'a fingerprint'}; distill again")
    return Distilled(path.parent, record)
