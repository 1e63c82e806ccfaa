"""The draft: a model of the target's own class, made of some of its layers, on its frozen embedding and head.

Only what is trained is stored: the embedding and the LM head come from the target.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mirror.distill.target import Target
from mirror.errors import DraftError
from mirror.export.draft import with_layers
from mirror.export.trace import decoder_layers

WEIGHTS_FILE = "model.safetensors"


class Student(nn.Module):
    """A draft being trained: float32 weights of its own, the target's frozen embedding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """What is trained and stored, by name; neither embedding nor LM head."""
        shared = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) not in shared}

    @property
    def size(self) -> int:
        """Parameters outside the embedding and the LM head."""
        return sum(parameter.numel() for parameter in self.own.values())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return final, normalised states `[batch, length, hidden]` of right-padded rows `[batch, length]`."""
        states: Tensor = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return states


def spread_layers(total: int, count: int) -> tuple[int, ...]:
    """Return `count` layer numbers spread evenly from the first to the last of `total`."""
    return tuple(round(index * (total - 1) / max(count - 1, 1)) for index in range(count))


def make_student(target: Target, layers: Sequence[int]) -> Student:
    """Return a draft that starts as the target's `layers`, float32 on the target's device."""
    config = with_layers(target.config, tuple(layers))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    source = decoder_layers(target.model, target.config)
    for own, layer in zip(decoder_layers(model, config), layers, strict=True):
        own.load_state_dict({name: tensor.float() for name, tensor in source[layer].state_dict().items()})
    outside = _outside_layers(target.model.state_dict(), source, target.model)
    model.load_state_dict({name: tensor.float() for name, tensor in outside.items()}, strict=False)
    return _share(model.to(target.device), target)


def save_student(student: Student, folder: Path) -> None:
    """Write `config.json` and the draft's own tensors as float16 into a folder, made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(student.model.config)
    config.architectures = [type(student.model).__name__]
    config.dtype = "float16"
    config.save_pretrained(folder)
    tensors = {
        name: parameter.detach().to("cpu", torch.float16).contiguous() for name, parameter in student.own.items()
    }
    save_file(tensors, folder / WEIGHTS_FILE)


def load_student(folder: Path, target: Target) -> Student:
    """Return a stored draft on its target's embedding and head, float32 on the target's device.

    Raises:
        DraftError: the folder holds no draft, or its tensors aren't those that its config needs.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise DraftError(f"{folder} has no {WEIGHTS_FILE}; give the `draft` folder that `mirror distill` wrote")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    student = _share(model.to(target.device), target)
    stored = load_file(folder / WEIGHTS_FILE)
    if stored.keys() != student.own.keys():
        wrong = sorted(stored.keys() ^ student.own.keys())[0]
        raise DraftError(f"{folder / WEIGHTS_FILE} and its config.json differ at {wrong}; train the draft again")
    with torch.no_grad():
        for name, parameter in student.own.items():
            parameter.copy_(stored[name])
    return student


def _share(model: Any, target: Target) -> Student:
    model.set_input_embeddings(target.model.get_input_embeddings())
    model.set_output_embeddings(target.model.get_output_embeddings())
    model.eval()  # without dropout: the target's own words are the only noise wanted
    return Student(model)


def _outside_layers(tensors: dict[str, Tensor], layers: nn.ModuleList, model: nn.Module) -> dict[str, Tensor]:
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
