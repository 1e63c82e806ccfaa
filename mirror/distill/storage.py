"""How trained tensors lie in a file: matrices as 8-bit integers with a scale for each row, the rest as float16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_SCALE = ".scale"


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, int8: bool) -> None:
    """Write tensors by name, float16.

    Args:
        tensors: of any float type, on any device.
        path: the safetensors file.
        int8: store `[out, in]` matrices as int8 `name` beside float32 `name.scale` `[out]`;
            a value is then `int8 * scale` of its row.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu", torch.float32)
        if int8 and value.ndim == 2:
            stored[name], stored[name + _SCALE] = _rounded(value)
        else:
            stored[name] = value.to(torch.float16).contiguous()
    save_file(stored, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return what `save_tensors` wrote, float32 on the CPU."""
    stored = load_file(path)
    scales = {
        name + _SCALE: stored.pop(name + _SCALE) for name, value in list(stored.items()) if value.dtype == torch.int8
    }
    return {
        name: tensor.float() * scales[name + _SCALE][:, None] if tensor.dtype == torch.int8 else tensor.float()
        for name, tensor in stored.items()
    }


def as_stored(tensors: Mapping[str, Tensor], *, int8: bool) -> dict[str, Tensor]:
    """Return float32 tensors with the values that they would have after a round trip through a file."""
    found = {}
    for name, tensor in tensors.items():
        value = tensor.detach().float()
        if int8 and value.ndim == 2:
            whole, scale = _rounded(value)
            found[name] = whole.float() * scale[:, None]
        else:
            found[name] = value.to(torch.float16).float()
    return found


def _rounded(matrix: Tensor) -> tuple[Tensor, Tensor]:
    scale = matrix.abs().amax(1).clamp_min(1e-12) / 127
    return torch.round(matrix / scale[:, None]).clamp_(-127, 127).to(torch.int8), scale
