"""What `--draft` means, and the config and tensor names of a draft made of the target's own layers."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

from transformers import PretrainedConfig

from mirror.errors import ExportError
from mirror.export.checkpoint import Checkpoint, tokenizer_fingerprint
from mirror.export.trace import Aliases, Traced

_LAYER_INDEX = re.compile(r"^(.*?\.(?:layers|h|blocks)\.)(\d+)(\..*)$")


@dataclass(frozen=True)
class DraftChoice:
    """A parsed `--draft`: exactly one of the fields is set, or none for no draft."""

    ngram: bool = False
    layers: tuple[int, ...] = ()
    model: str | None = None


def parse_draft(text: str | None, target_layers: int) -> DraftChoice:
    """Return the draft that `--draft` names.

    Raises:
        ExportError: the layer list is malformed or names layers that the target lacks.
    """
    if text is None:
        return DraftChoice()
    if text == "ngram":
        return DraftChoice(ngram=True)
    if not text.startswith("layers:"):
        return DraftChoice(model=text)
    parts = [part.strip() for part in text.removeprefix("layers:").split(",")]
    if not all(part.isdigit() for part in parts):
        raise ExportError(f"draft {text} is not a list of layers; write layers:0,10,19,29")
    layers = tuple(int(part) for part in parts)
    if any(layer >= target_layers for layer in layers) or len(set(layers)) != len(layers):
        raise ExportError(
            f"draft {text} repeats layers or names some that the target lacks; it has 0..{target_layers - 1}"
        )
    return DraftChoice(layers=layers)


def with_layers(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """Return a config for a model made of some of another's layers."""
    config = copy.deepcopy(config)
    total = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    return config


def take_layers(traced: Traced, layers: tuple[int, ...]) -> dict[str, Aliases]:
    """Return a traced draft's tensor names, its layer i standing for the target's `layers[i]`."""

    def target_name(name: str) -> str:
        match = _LAYER_INDEX.match(name)
        return f"{match[1]}{layers[int(match[2])]}{match[3]}" if match else name

    return {name: tuple(target_name(alias) for alias in aliases) for name, aliases in traced.parameters.items()}


def check_same_tokens(target: Checkpoint, draft: Checkpoint, target_print: str, draft_print: str) -> None:
    """Refuse a draft whose tokenizer is not the target's.

    Raises:
        ExportError: the token-to-id maps differ; without tokenizers, the vocabularies' sizes.
    """
    unknown = draft_print == tokenizer_fingerprint(None) and draft.config.vocab_size != target.config.vocab_size
    if target_print != draft_print or unknown:
        raise ExportError(
            f"draft {draft.name} has another tokenizer than {target.name} (vocabulary "
            f"{draft.config.vocab_size} against {target.config.vocab_size}); use a draft with the target's tokenizer"
        )
