"""The frozen target: its trunk, its decoder layers, and what turns a state into logits.

Everything is transformers' own modelling code; what differs between architectures here is the name
of the final norm and how logits are scaled.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from mirror.errors import ExportError
from mirror.export.checkpoint import Checkpoint, open_checkpoint, tokenizer_fingerprint
from mirror.export.trace import decoder_layers

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm")


@dataclass(frozen=True)
class Head:
    """The LM head as arithmetic: `softcap(scale * (weight @ h + bias))`.

    `weight` is `[vocab, hidden]`, frozen, on the target's device. Calling it with normalised states
    `[n, hidden]` gives logits `[n, vocab]` in the weight's dtype.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def __call__(self, states: Tensor) -> Tensor:
        logits = nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def states_gradient(self, logits_gradient: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient `[n, hidden]` at the states, from that at the logits `[n, vocab]`."""
        if self.softcap is not None:
            logits_gradient = logits_gradient * (1 - (logits / self.softcap) ** 2)
        gradient = logits_gradient @ self.weight
        return gradient if self.scale == 1.0 else gradient * self.scale


@dataclass(frozen=True)
class Target:
    """A frozen decoder, ready to teach."""

    checkpoint: Checkpoint
    model: Any  # a transformers ForCausalLM; its classes have no common typed base
    layers: nn.ModuleList
    final_norm: nn.Module
    head: Head

    @property
    def config(self) -> PretrainedConfig:
        """The target's config."""
        return self.checkpoint.config

    @property
    def device(self) -> torch.device:
        """Where the target is."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the target computes in."""
        return self.head.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head."""
        return int(self.head.weight.shape[0])

    def states(self, input_ids: Tensor, exit_layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the trunk over right-padded rows; return what the heads start from.

        Args:
            input_ids: int64 `[batch, length]`.
            exit_layers: after how many layers a state is wanted.

        Returns:
            The final, normalised state `[batch, length, hidden]`, and the raw state after each exit layer.
        """
        with torch.no_grad(), self._watch(exit_layers) as exits:
            final = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return final, exits

    @contextmanager
    def _watch(self, exit_layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.layers[layer - 1].register_forward_hook(keep(layer)) for layer in exit_layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def load_target(name: str, device: torch.device, dtype: torch.dtype) -> Target:
    """Load a target as a frozen model.

    Raises:
        ExportError: there is no such checkpoint, or it is not a decoder that can be taught from.
    """
    checkpoint = open_checkpoint(name)
    model = _plain_model(checkpoint)
    return freeze(checkpoint, model.to(device=device, dtype=dtype))


def freeze(checkpoint: Checkpoint, model: Any) -> Target:
    """Return a loaded model as a target.

    Raises:
        ExportError: its final norm has a name that isn't known here.
    """
    model.eval().requires_grad_(False)
    norm = final_norm(model)
    return Target(checkpoint, model, decoder_layers(model, checkpoint.config), norm, head_of(model, checkpoint.config))


def compile_layers(model: Any, config: PretrainedConfig) -> None:
    """Let torch.compile fuse what happens within each decoder layer, once; all layers share one compiled form."""
    for layer in decoder_layers(model, config):
        if "forward" in vars(layer):
            continue
        layer.forward = torch.compile(layer.forward, dynamic=True)


def final_norm(model: Any) -> nn.Module:
    """Return the norm before the LM head.

    Raises:
        ExportError: none of the known names is there.
    """
    for trunk in (model.base_model, getattr(model.base_model, "decoder", None)):
        for name in _FINAL_NORMS:
            found = getattr(trunk, name, None)
            if isinstance(found, nn.Module):
                return found
    raise ExportError(
        f"{type(model).__name__} has no final norm under the names {', '.join(_FINAL_NORMS)}; "
        "exit heads can't be made for this architecture yet"
    )


def target_fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what tells whether a draft or an exit head was made for a target."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = checkpoint.write_tokenizer(Path(folder))
        return {"fingerprint": checkpoint.fingerprint, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer that a bundle of this checkpoint would carry, with its chat template.

    Raises:
        ExportError: the checkpoint has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint.write_tokenizer(Path(folder)) is None:
            raise ExportError(f"{checkpoint.name} has no tokenizer; training needs one to turn prompts into tokens")
        return AutoTokenizer.from_pretrained(folder)


def _plain_model(checkpoint: Checkpoint) -> Any:
    """Return the model in float32, free of the marks that a quantised file leaves on it."""
    folder, file = (checkpoint.path.parent, checkpoint.path.name) if checkpoint.is_gguf else (checkpoint.path, None)
    extra: dict[str, Any] = {"gguf_file": file} if file else {}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"{checkpoint.name} can't be loaded by transformers: {error}") from error
    if not checkpoint.is_gguf:
        return loaded
    model = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    return model


def head_of(model: Any, config: PretrainedConfig) -> Head:
    """Return a model's LM head as arithmetic."""
    output = model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, output.bias, scale, None if softcap is None else float(softcap))
