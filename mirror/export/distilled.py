"""What `mirror distill` made, as export takes it: trained exit heads and a draft that borrows from its target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import AutoConfig, PretrainedConfig

from mirror.errors import ExportError
from mirror.export.bind import Binder
from mirror.export.weights import DRAFT_SCOPE, ChainedSource, SafetensorsSource, WeightSource

RECORD = "distill.json"
ADAPTER_TENSORS = ("norm.weight", "gate.weight", "up.weight", "down.weight")
EPSILON_KEY = "exit_head_epsilon"  # in the source graph's metadata


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
    def has_draft(self) -> bool:
        """Whether there is a draft, not only exit heads."""
        return (self.folder / "draft" / "config.json").is_file()

    def draft_config(self) -> PretrainedConfig:
        """Return the draft's config."""
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder / "draft")
        return config

    def draft_weights(self, target: WeightSource) -> WeightSource:
        """Return the draft's tensors, then the target's for those that it shares."""
        return ChainedSource((SafetensorsSource.open(self.folder / "draft", "model", DRAFT_SCOPE), target))

    def add_exit_heads(self, graph: ir.Graph, binder: Binder) -> tuple[int, ...]:
        """Put every exit head's tensors into the target's source graph; return their exit layers."""
        graph.metadata_props[EPSILON_KEY] = str(self.record["norm_eps"])
        layers = []
        for path in sorted(self.folder.glob("exit_head_*.safetensors")):
            layer = int(path.stem.rpartition("_")[2])
            tensors = SafetensorsSource.of_file(path).tensors
            missing = [name for name in ADAPTER_TENSORS if name not in tensors]
            if missing:
                raise ExportError(f"{path} lacks the tensor {missing[0]}; distill again")
            for name in ADAPTER_TENSORS:
                binder.add(graph, adapter_name(layer, name), tensors[name], adapter_name(layer, name))
            layers.append(layer)
        return tuple(layers)


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
    facts = {"fingerprint", "tokenizer_fingerprint"} <= set(record.get("target", {})) and "norm_eps" in record
    if record.get("format") != 1 or not facts:
        raise ExportError(f"{path} is of another version (format {record.get('format')!r}, expected 1); distill again")
    return Distilled(path.parent, record)
