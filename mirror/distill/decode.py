"""Many texts at once: the target decoding thousands of rows with a fixed KV cache.

Rows are independent: each has its own length, and a row whose text ended takes the next prompt. On
CUDA a step is a captured graph per cache length in use, so its cost is memory traffic, not launches,
and attention reads the slots that a row has filled (`row_attention`) where the model's form allows it.
transformers' own modelling code runs; only its attention function is replaced.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mirror.distill.target import Target

_STEPS_PER_VISIT = 16  # decode steps between two looks at what has ended
_PREFILL_ROWS = 512
_BUCKET = 128  # cache slots that attention reads, in steps of this
_ATTENTION = "mirror_rows"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Job:
    """One text to write: prompt token ids, at most how many new tokens, at which temperature (0: greedy)."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float


@dataclass(frozen=True)
class Answer:
    """What was written for the job of this index; the stop token, where one came, is included."""

    job: int
    tokens: tuple[int, ...]


@dataclass
class _Row:
    job: int
    left: int
    tokens: list[int]
    checked: int = 0  # tokens that are known not to stop the text


class RowCache:
    """Keys and values of every layer, `[rows, kv_heads, capacity, head_dim]` each, and the attention over them.

    Mutable: `prefill_rows` (the rows a prefill writes, None in decoding), `lengths` int64 `[rows]`
    (filled slots before this step) and `bucket` (slots that a decode step reads).
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.rows, self.capacity = rows, capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.all_rows = torch.arange(rows, device=device)
        self.slots = torch.arange(capacity, device=device)
        self.prefill_rows: Tensor | None = None
        self.bucket = capacity
        self._bias: dict[int | None, Tensor] = {}

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        softcap: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Store the new keys and values, and attend to all that a row has.

        Returns `[rows, width, heads, head_dim]`.

        Args:
            module: transformers' attention module; its `layer_idx` says which cache.
            query: `[rows, heads, width, head_dim]`; key and value alike, with the KV heads.
        """
        layer = int(module.layer_idx)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if layer not in self.keys:
            self._allocate(layer, key, value)
        if self.prefill_rows is None:
            self.keys[layer][self.all_rows, :, self.lengths] = key[:, :, 0]
            self.values[layer][self.all_rows, :, self.lengths] = value[:, :, 0]
            out = self._decode(layer, query, scale, softcap, sliding_window)
        else:
            width = key.shape[2]
            self.keys[layer][self.prefill_rows, :, :width] = key
            self.values[layer][self.prefill_rows, :, :width] = value
            out = _prefill(query, key, value, scale, softcap, sliding_window)
        return out.transpose(1, 2)

    def start_step(self) -> None:
        """Forget what the last step derived from `lengths`."""
        self._bias.clear()

    def _allocate(self, layer: int, key: Tensor, value: Tensor) -> None:
        for store, rows in ((self.keys, key), (self.values, value)):
            store[layer] = rows.new_zeros(self.rows, rows.shape[1], self.capacity, rows.shape[3])

    def _decode(self, layer: int, query: Tensor, scale: float, softcap: float | None, window: int | None) -> Tensor:
        rows, heads, _, dim = query.shape
        # The queries of one KV head become rows of one attention, so that no key is read twice.
        grouped = query.reshape(rows, self.keys[layer].shape[1], -1, dim)
        if softcap is None and window is None and _reads_filled_slots(query):
            from mirror.distill.row_attention import row_attention

            out = row_attention(grouped, self.keys[layer], self.values[layer], self.lengths, scale)
            return out.reshape(rows, heads, 1, dim)
        keys, values = self.keys[layer][:, :, : self.bucket], self.values[layer][:, :, : self.bucket]
        bias = self._visible(window, query.dtype)
        out = _attention(grouped, keys, values, bias.expand(-1, grouped.shape[1], grouped.shape[2], -1), scale, softcap)
        return out.reshape(rows, heads, 1, -1)

    def _visible(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._bias:
            slots = self.slots[: self.bucket]
            seen = slots <= self.lengths[:, None]
            if window is not None:
                seen &= slots > self.lengths[:, None] - window
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
            self._bias[window] = bias[:, None, None]  # [rows, 1, 1, bucket]
        return self._bias[window]


class BatchDecoder:
    """Writes many texts with one target; not thread-safe, and the target serves nothing else meanwhile."""

    def __init__(self, target: Target, rows: int, capacity: int, stop: Sequence[int], seed: int) -> None:
        self._target = target
        self._stop = frozenset(stop)
        self._cache = RowCache(rows, -(-capacity // _BUCKET) * _BUCKET, target.device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=target.device)
        self._temperatures = torch.zeros(rows, device=target.device)
        self._history = torch.zeros(_STEPS_PER_VISIT, rows, dtype=torch.int64, device=target.device)
        self._step = torch.zeros(1, dtype=torch.int64, device=target.device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._greedy = False
        torch.manual_seed(seed)

    def run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Yield the answers as they end. Jobs of similar prompt length, side by side, decode fastest."""
        self._greedy = all(job.temperature == 0 for job in jobs)
        model = self._target.model
        before = model.config._attn_implementation
        attending = [module for module in model.modules() if hasattr(module, "layer_idx")]
        for module in attending:
            module.mirror_rows = self._cache
        model.set_attn_implementation(_ATTENTION)
        try:
            yield from self._run(jobs)
        finally:
            model.set_attn_implementation(before)
            for module in attending:
                del module.mirror_rows

    def _run(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        waiting = iter(range(len(jobs)))
        rows: list[_Row | None] = [None] * self._cache.rows
        while True:
            self._fill(jobs, waiting, rows)
            yield from self._collect(rows)  # a prompt's first token may already end its text
            if not any(rows):
                if (following := next(waiting, None)) is None:
                    return
                waiting = itertools.chain((following,), waiting)
                continue
            self._decode(rows)
            yield from self._collect(rows)

    def _fill(self, jobs: Sequence[Job], waiting: Iterator[int], rows: list[_Row | None]) -> None:
        """Give free rows the next jobs, a batch of similar length at a time."""
        free = [index for index, row in enumerate(rows) if row is None]
        taken = list(zip(free, waiting, strict=False))
        while taken:
            longest = max(len(jobs[job].prompt) for _, job in taken[:_PREFILL_ROWS])
            batch, taken = _split(taken, max(1, min(_PREFILL_ROWS, 2**16 // longest)))
            first = self._prefill([row for row, _ in batch], [jobs[job] for _, job in batch])
            for (row, job), token in zip(batch, first, strict=True):
                rows[row] = _Row(job, jobs[job].max_new_tokens - 1, [token])

    @torch.no_grad()
    def _prefill(self, rows: list[int], jobs: list[Job]) -> list[int]:
        device = self._target.device
        width = -(-max(len(job.prompt) for job in jobs) // 16) * 16
        width = min(width, self._cache.capacity)
        ids = torch.zeros(len(jobs), width, dtype=torch.int64)
        for index, job in enumerate(jobs):
            ids[index, : len(job.prompt)] = torch.tensor(job.prompt)
        lengths = torch.tensor([len(job.prompt) for job in jobs], device=device)
        where = torch.tensor(rows, device=device)
        temperatures = torch.tensor([job.temperature for job in jobs], device=device)
        self._cache.prefill_rows = where
        positions = torch.arange(width, device=device)[None].expand(len(jobs), -1)
        states = self._trunk(ids.to(device), positions)
        last = states[torch.arange(len(jobs), device=device), lengths - 1]
        tokens = _sample(self._target.head(last), None if self._greedy else temperatures)
        self._cache.prefill_rows = None
        self._cache.lengths[where], self._tokens[where], self._temperatures[where] = lengths, tokens, temperatures
        first: list[int] = tokens.tolist()
        return first

    @torch.no_grad()
    def _decode(self, rows: list[_Row | None]) -> None:
        """Advance every row by some steps; free rows idle."""
        longest = int(self._cache.lengths[[index for index, row in enumerate(rows) if row]].max())
        self._cache.bucket = min(-(-(longest + _STEPS_PER_VISIT) // _BUCKET) * _BUCKET, self._cache.capacity)
        # A row that was given up keeps decoding garbage: in its first slots, to read little, and never past the cache.
        idle = [index for index, row in enumerate(rows) if row is None]
        self._cache.lengths[idle] = 0
        self._cache.lengths.clamp_(max=self._cache.bucket - _STEPS_PER_VISIT)
        self._step.zero_()
        graph = self._graph()
        for _ in range(_STEPS_PER_VISIT):
            if graph is None:
                self._advance()
            else:
                graph.replay()

    def _graph(self) -> torch.cuda.CUDAGraph | None:
        if self._target.device.type != "cuda":
            return None
        key = (self._cache.bucket, self._greedy)
        if key not in self._graphs:
            self._graphs[key] = self._capture()
        return self._graphs[key]

    def _capture(self) -> torch.cuda.CUDAGraph:
        state = (self._tokens, self._cache.lengths, self._step)
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        # The trial step moved the rows; what it wrote into the cache, the next step writes again.
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        return graph

    def _advance(self) -> None:
        self._cache.start_step()
        states = self._trunk(self._tokens[:, None], self._cache.lengths[:, None])
        tokens = _sample(self._target.head(states[:, 0]), None if self._greedy else self._temperatures)
        self._history.index_copy_(0, self._step, tokens[None])
        self._tokens.copy_(tokens)
        self._cache.lengths.add_(1)
        self._step.add_(1)

    def _trunk(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._target.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def _collect(self, rows: list[_Row | None]) -> Iterator[Answer]:
        """Take what the last steps wrote; yield and free the rows whose text has ended."""
        steps = int(self._step)
        history = self._history[:steps].T.tolist()
        self._step.zero_()
        for index, row in enumerate(rows):
            if row is None:
                continue
            row.tokens.extend(history[index])
            row.left -= steps
            fresh = range(row.checked, len(row.tokens))
            end = next((at for at in fresh if row.tokens[at] in self._stop), None)
            row.checked = len(row.tokens)
            if end is not None or row.left <= 0:
                keep = len(row.tokens) + min(row.left, 0)
                yield Answer(row.job, tuple(row.tokens[: keep if end is None else min(end + 1, keep)]))
                rows[index] = None


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    width = query.shape[2]
    if softcap is None and (window is None or window >= width):
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    slots = torch.arange(width, device=query.device)
    seen = slots <= slots[:, None]
    if window is not None:
        seen &= slots > slots[:, None] - window
    bias = torch.zeros(width, width, dtype=query.dtype, device=query.device).masked_fill(~seen, -torch.inf)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return _attention(query, key, value, bias, scale, softcap)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, softcap: float | None) -> Tensor:
    if softcap is None:
        backends = [SDPBackend.EFFICIENT_ATTENTION] if query.is_cuda else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
        with sdpa_kernel(backends):
            return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap + bias
    return torch.softmax(scores.float(), -1).to(value.dtype) @ value


def _reads_filled_slots(query: Tensor) -> bool:
    """Return whether the kernel that reads filled slots alone serves these queries `[rows, heads, 1, head_dim]`."""
    dim = query.shape[-1]
    return query.is_cuda and dim >= 16 and dim & (dim - 1) == 0 and _HAS_TRITON


def _sample(logits: Tensor, temperatures: Tensor | None) -> Tensor:
    """Return int64 `[rows]` drawn from `[rows, vocab]`; temperature 0, or None for all, takes the likeliest."""
    if temperatures is None:
        return torch.argmax(logits, -1)
    # argmax(logits + T * gumbel) is a draw at temperature T, and the argmax at T = 0.
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().log_()
    return torch.argmax(logits.float() - temperatures[:, None] * noise, -1)


def _split(items: list[tuple[int, int]], count: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return items[:count], items[count:]


def _attend_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,  # transformers hands every model's extras to every attention function
) -> tuple[Tensor, None]:
    return module.mirror_rows.attend(module, query, key, value, scaling, softcap, sliding_window), None


AttentionInterface.register(_ATTENTION, _attend_rows)
