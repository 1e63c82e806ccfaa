"""Exit heads: a small gated adapter in front of the target's own norm and LM head."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mirror.distill.storage import load_tensors, save_tensors
from mirror.errors import DraftError


class ExitHead(nn.Module):
    """`h + down(silu(gate(n)) * up(n))` with `n = rms_norm(h)`: what the skipped layers would have added.

    Takes and returns states `[..., hidden]`. It starts as the identity. Its tensors are `norm.weight`
    `[hidden]`, `gate.weight` and `up.weight` `[size, hidden]`, `down.weight` `[hidden, size]`.
    """

    def __init__(self, hidden: int, size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.gate = nn.Linear(hidden, size, bias=False)
        self.up = nn.Linear(hidden, size, bias=False)
        self.down = nn.Linear(size, hidden, bias=False)
        nn.init.normal_(self.gate.weight, std=hidden**-0.5)
        nn.init.normal_(self.up.weight, std=hidden**-0.5)
        nn.init.zeros_(self.down.weight)

    def forward(self, states: Tensor) -> Tensor:
        """Return the states as the final norm should see them, `[..., hidden]`."""
        normed = self.norm(states)
        added: Tensor = self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return states + added


def exit_head_file(layer: int) -> str:
    """Return the file name of a layer's exit head."""
    return f"exit_head_{layer}.safetensors"


def save_exit_head(head: ExitHead, folder: Path, layer: int, *, int8: bool = False) -> None:
    """Write an exit head as float16, its matrices as int8 where asked."""
    save_tensors(head.state_dict(), folder / exit_head_file(layer), int8=int8)


def load_exit_head(folder: Path, layer: int, eps: float) -> ExitHead:
    """Return the exit head of a layer, float32 on the CPU.

    Raises:
        DraftError: the folder has none for this layer.
    """
    path = folder / exit_head_file(layer)
    if not path.is_file():
        raise DraftError(
            f"{folder} has no exit head for layer {layer}; train one with `mirror distill --exit-layers {layer}`"
        )
    tensors = load_tensors(path)
    size, hidden = tensors["gate.weight"].shape
    head = ExitHead(hidden, size, eps)
    head.load_state_dict(tensors)
    return head


def grown(head: ExitHead, size: int) -> ExitHead:
    """Return an exit head of more inner channels that computes the same: the new ones add nothing yet.

    Raises:
        DraftError: it has more channels than that already.
    """
    had, hidden = head.gate.weight.shape
    if size < had:
        raise DraftError(f"the exit head to start from has {had} channels, {size} were asked; ask for at least {had}")
    larger = ExitHead(hidden, size, head.norm.eps or 0.0)
    with torch.no_grad():
        larger.norm.weight.copy_(head.norm.weight)
        larger.gate.weight[:had], larger.up.weight[:had] = head.gate.weight, head.up.weight
        larger.down.weight[:, :had] = head.down.weight
    return larger
