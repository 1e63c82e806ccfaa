"""A draft's pass in numpy, from its program (docs/bundle.md): what kernels and graphs are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from mirror.runtime.feeds import PassFeeds
from mirror.targets.draft_program import Matrix, Program

Array = np.ndarray


@dataclass
class Reference:
    """A program in numpy, rounding what is multiplied as the kernels do: by a scale for a row, or for each 64 of it."""

    program: Program
    capacity: int
    fine: bool = False
    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = self.capacity, self.program.sizes["kv_heads"], self.program.sizes["head_dim"]
        self.keys = [np.zeros(shape, np.float32) for _ in self.program.layers]
        self.values = [np.zeros(shape, np.float32) for _ in self.program.layers]

    def logits(self, feeds: PassFeeds, past: int, wanted: Array) -> Array:
        """Run one pass; return the wanted rows' logits `[wanted, vocabulary]`."""
        x = self.embedded(feeds.ids[0])
        places = np.minimum(given(feeds, "position_ids")[0], self.program.sizes["positions"] - 1)
        for number, layer in enumerate(self.program.layers):
            normed = self.normed(x, layer.attention_norm)
            x = x + self.product(self.attention(number, normed, places, feeds, past), layer.output)
            gate, up = np.split(self.product(self.normed(x, layer.mlp_norm), layer.gate_up), 2, axis=-1)
            x = x + self.inner_product(gate / (1 + np.exp(-gate)) * up, layer.down)
        return self.product(self.normed(x[wanted], self.program.norm), self.program.head)

    def embedded(self, ids: Array) -> Array:
        table, tokens = self.program.embedding, self.program.sizes["tokens"]
        if table.kind == "bfloat16":
            rows = table.values.view(ml_dtypes.bfloat16).astype(np.float32)
        elif table.kind in ("blocks_4", "blocks_8"):
            packed = table.values
            numbers = packed.astype(np.float32) - 128
            if table.kind == "blocks_4":
                numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(tokens, -1).astype(np.float32) - 8
            assert table.scales is not None
            rows = numbers * np.repeat(table.scales.astype(np.float32), 32, axis=1)
        else:
            rows = table.values.astype(np.float32)
        streams = self.program.stream_rows
        return rows[ids] if streams is None else np.concatenate([rows, streams])[ids]

    def normed(self, x: Array, weight: Array) -> Array:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + self.program.epsilon) * weight

    def attention(self, number: int, x: Array, places: Array, feeds: PassFeeds, past: int) -> Array:
        sizes, layer, width = self.program.sizes, self.program.layers[number], len(x)
        parts = np.cumsum([sizes["heads"], sizes["kv_heads"]]) * sizes["head_dim"]
        split = np.split(self.product(x, layer.qkv), parts, axis=-1)
        query, key, value = (part.reshape(width, -1, sizes["head_dim"]) for part in split)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self.normed(query, layer.query_norm), self.normed(key, layer.key_norm)
        slots = slice(past, past + width)
        self.keys[number][slots], self.values[number][slots] = self.rotated(key, places), value
        group, seen = sizes["heads"] // sizes["kv_heads"], visible_slots(feeds, past)
        keys, values = (np.repeat(part, group, axis=1) for part in (self.keys[number], self.values[number]))
        scores = np.einsum("ihd,jhd->hij", self.rotated(query, places), keys) * self.program.scale
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed: Array = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), values)
        return mixed.reshape(width, -1)

    def product(self, x: Array, matrix: Matrix) -> Array:
        size = x.shape[-1]
        block = 64 if self.fine else size
        result = np.zeros((len(x), matrix.values.shape[1]), np.float32)
        for first in range(0, size, block):
            part, values = x[:, first : first + block], matrix.values[first : first + block].astype(np.float32)
            scale = np.abs(part).max(-1, keepdims=True) / np.float32(127)
            result += np.rint(part / scale) @ values * scale
        result *= matrix.scales
        return result if matrix.bias is None else result + matrix.bias

    def inner_product(self, x: Array, matrix: Matrix) -> Array:
        """Return the last product of an MLP."""
        return self.product(x, matrix)

    def rotated(self, x: Array, places: Array) -> Array:
        cos, sin = self.program.cosines[places, None], self.program.sines[places, None]
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def given(feeds: PassFeeds, name: str) -> Array:
    tensor = feeds.tensors[name]
    assert isinstance(tensor, np.ndarray)
    return tensor


def visible_slots(feeds: PassFeeds, past: int) -> Array:
    """Return bool [width, capacity]: the tree layout of docs/bundle.md."""
    slots, rows = np.arange(given(feeds, "slot_branch").size), np.arange(feeds.width)
    trunk = slots < given(feeds, "row_visible")[:, None]
    own = (given(feeds, "slot_branch") == given(feeds, "row_branch")[:, None]) & (given(feeds, "slot_branch") >= 0)
    return (trunk | own) & (slots <= past + rows[:, None])
