"""The check at the end of every export: split graphs against the whole graph and against torch.

A few prompts run through each in chunks, then some greedy tokens one by one, so the cache, the cut and
every operator take part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import psutil
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from mirror.bundle import Form, Manifest
from mirror.errors import SelfCheckError
from mirror.export.checkpoint import Checkpoint
from mirror.export.cut import whole_target
from mirror.export.trace import from_config
from mirror.export.weights import MemorySource

_TEXTS = (
    "The three largest cities of France are",
    "def add(a, b):\n    return",
    "Once upon a time, 42 birds flew north.",
)
_CHUNKS = (5, 1, 2)  # the prompt's chunks; what is left makes the last one
_GREEDY_TOKENS = 8
# Of the largest logit. A cut at the same operators is equal but for the order of a few roundings.
_SPLIT_TOLERANCE: Mapping[str, float] = {
    "fp32": 1e-4,
    "fp16": 2e-2,
    "int8": 1e-3,
    "int4": 1e-3,
    "int8-fp16": 2e-2,
    "int4-fp16": 2e-2,
}
_TORCH_TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "fp16": 5e-2}
_BYTES_PER_STORED = {"fp32": 3.0, "fp16": 6.0, "int8": 9.0, "int4": 14.0, "int8-fp16": 9.0, "int4-fp16": 14.0}

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """How far two ways of computing the same logits lie apart.

    `largest` is the largest difference over the largest logit; `first_token` the position of the
    first differing greedy token, None when none differs; `tokens` how many were compared.
    """

    largest: float
    first_token: int | None
    tokens: int


@dataclass(frozen=True)
class CheckReport:
    """The self-check's outcome.

    `skipped` says why nothing was compared; `draft` is at how many of the compared tokens the draft's
    first guess was the target's, None without a draft that has graphs.
    """

    precision: str
    split: Difference | None
    torch: Difference | None
    skipped: str | None = None
    draft: int | None = None

    @property
    def problems(self) -> list[str]:
        """What is wrong, in sentences; empty when the check passed or was skipped."""
        found = []
        if self.split is not None and self.split.largest > _SPLIT_TOLERANCE[self.precision]:
            found.append(f"split graphs differ from the whole graph: {_sentence(self.split)}")
        limit = _TORCH_TOLERANCE.get(self.precision)
        if self.torch is not None and limit is not None and self.torch.largest > limit:
            found.append(f"the graphs differ from torch: {_sentence(self.torch)}")
        return found

    @property
    def findings(self) -> list[str]:
        """What the check saw, a sentence for each comparison; why nothing was compared, where it was skipped."""
        if self.skipped is not None:
            return [f"skipped: {self.skipped}"]
        compared = (("split graphs against the whole graph", self.split), ("graphs against torch", self.torch))
        found = [f"{what}: {_sentence(difference)}" for what, difference in compared if difference is not None]
        if self.draft is not None and self.split is not None:
            found.append(f"the draft's first guess was the target's token {self.draft} of {self.split.tokens} times")
        return found

    def raise_if_failed(self, *, allowed: bool) -> None:
        """Raise SelfCheckError when there are problems, unless the user allowed them."""
        if self.problems and not allowed:
            raise SelfCheckError(
                "; ".join(self.problems) + "; add --allow-failed-check to keep the bundle all the same"
            )


def check(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> CheckReport:
    """Compare a bundle's target with the whole graph and with torch, on this machine's CPU."""
    precision = manifest.model.precision
    reason = _cannot_run(folder, manifest)
    if reason is not None:
        return CheckReport(precision, None, None, reason)
    prompts = _prompts(folder, manifest)
    split = _through_split(folder, manifest, prompts)
    whole = _compare(split, _through_whole(folder, manifest, split))
    draft = _draft_hits(folder, manifest, split) if "draft" in manifest.segments else None
    return CheckReport(precision, whole, _compare(split, _through_torch(checkpoint, split)), draft=draft)


def _cannot_run(folder: Path, manifest: Manifest) -> str | None:
    precision = manifest.model.precision
    if precision == "bf16":
        return "no runtime on this machine's CPU computes bf16 graphs"
    stored = sum(facts.bytes for name, facts in manifest.files.items() if name.startswith("weights/"))
    needed, free = stored * _BYTES_PER_STORED[precision], psutil.virtual_memory().available
    if needed > free * 0.8:
        return f"it needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
    return None


def _prompts(folder: Path, manifest: Manifest) -> list[list[int]]:
    path = folder / "tokenizer.json"
    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
        prompts = [tokenizer.encode(text).ids for text in _TEXTS]
    else:
        generator = np.random.default_rng(0)
        prompts = [generator.integers(0, manifest.model.vocab_size, 12).tolist() for _ in _TEXTS]
    room = manifest.decoding.max_length - _GREEDY_TOKENS
    return [prompt[:room] for prompt in prompts if prompt]


Path3 = tuple[list[int], list[int], Logits]  # prompt, greedy tokens, logits of each [tokens, vocab]


def _compare(first: list[Path3], second: list[Logits]) -> Difference:
    largest, first_token, seen = 0.0, None, 0
    for (_, tokens, ours), theirs in zip(first, second, strict=True):
        largest = max(largest, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
        wrong = np.flatnonzero(theirs.argmax(-1) != ours.argmax(-1))
        if wrong.size and first_token is None:
            first_token = int(wrong[0])
        seen += len(tokens)
    return Difference(largest, first_token, seen)


def _through_split(folder: Path, manifest: Manifest, prompts: list[list[int]]) -> list[Path3]:
    prefix = _Runner(folder / _file(manifest, "target_prefix"))
    suffix = _Runner(folder / _file(manifest, "target_suffix"))

    def step(tokens: list[int], past: int) -> Logits:
        hidden = prefix.run(tokens, past, {})["hidden_states"]
        return np.asarray(suffix.run(tokens, past, {"hidden_states": hidden})["logits"][0, -1])

    return [(prompt, *_greedy(step, prompt)) for prompt in prompts]


def _through_whole(folder: Path, manifest: Manifest, paths: list[Path3]) -> list[Logits]:
    """Follow the split graphs' tokens through the uncut graph."""
    model = whole_target(ir.load(folder / "target.source.onnx"), manifest.decoding.exit_layer)
    path = folder / ".whole.onnx"
    ir.save(model, path)
    try:
        runner = _Runner(path)
    finally:
        path.unlink()

    def step(tokens: list[int], past: int) -> Logits:
        return np.asarray(runner.run(tokens, past, {})["logits"][0, -1])

    return [_greedy(step, prompt, tokens)[1] for prompt, tokens, _ in paths]


def _draft_hits(folder: Path, manifest: Manifest, paths: list[Path3]) -> int:
    """Return how many of the target's greedy tokens are the draft's first guess, its context the target's."""
    runner, hits = _Runner(folder / _file(manifest, "draft")), 0
    for prompt, tokens, _ in paths:
        line = [*prompt, *tokens[:-1]]
        given: dict[str, NDArray[np.generic]] = {
            "logit_rows": np.arange(len(prompt) - 1, len(line)),
            "row_visible": np.arange(1, len(line) + 1, dtype=np.int32),
            "row_branch": np.full(len(line), -2, np.int32),
            "slot_branch": np.full(runner.capacity, -1, np.int32),
            "feature_rows": np.zeros(len(line), np.float32),
        }
        for spec in runner.session.get_inputs():
            if spec.name == "features":
                dtype = np.float16 if spec.type == "tensor(float16)" else np.float32
                given["features"] = np.zeros((1, len(line), spec.shape[2]), dtype)
        hits += int((runner.run(line, 0, given)["token_ids"][0] == tokens).sum())
    return hits


def _through_torch(checkpoint: Checkpoint, paths: list[Path3]) -> list[Logits]:
    model = _reference(checkpoint)
    results = []
    for prompt, tokens, _ in paths:
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 :]
        results.append(logits.float().numpy())
    return results


def _reference(checkpoint: Checkpoint) -> torch.nn.Module:
    """Return transformers' own float32 model with the checkpoint's weights."""
    config = copy.deepcopy(checkpoint.config)
    if isinstance(checkpoint.weights, MemorySource):
        with init_empty_weights(include_buffers=False):
            model = from_config(config, torch.float32, "eager")
        state = {name: torch.from_numpy(array) for name, array in checkpoint.weights.arrays.items()}
        model.load_state_dict(state, assign=True)
        model.tie_weights()
    else:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, config=config, dtype=torch.float32, attn_implementation="eager"
        )
    module: torch.nn.Module = model.train(False)
    return module


def _greedy(
    step: Callable[[list[int], int], Logits], prompt: list[int], follow: list[int] | None = None
) -> tuple[list[int], Logits]:
    """Run a prompt in chunks, then greedy tokens (or the given ones); return them and each one's logits."""
    past, rest, logits = 0, list(prompt), np.zeros(0, np.float32)
    for size in (*_CHUNKS, len(prompt)):
        if rest:
            logits = step(rest[:size], past)
            past, rest = past + len(rest[:size]), rest[size:]
    rows, tokens = [logits], [int(logits.argmax())]
    while len(tokens) < _GREEDY_TOKENS:
        last = tokens[-1] if follow is None else follow[len(tokens) - 1]
        rows.append(step([last], past))
        tokens.append(int(rows[-1].argmax()))
        past += 1
    return tokens, np.stack(rows)


def _file(manifest: Manifest, segment: str) -> str:
    return manifest.segments[segment].graphs[Form.INPLACE].file


class _Runner:
    """Runs one in-place graph on ONNX Runtime's CPU provider, with buffers just large enough."""

    capacity = 128

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.cache: dict[str, ort.OrtValue] = {}

    def run(
        self, tokens: list[int], past: int, given: Mapping[str, NDArray[np.generic]]
    ) -> dict[str, NDArray[np.float32]]:
        """Run one pass and return the outputs that are not caches."""
        if past == 0:
            self.cache.clear()
        width = len(tokens)
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([tokens], np.int64),
            "position_ids": np.arange(past, past + width, dtype=np.int64)[None],
            "logit_rows": np.array([width - 1], np.int64),
            "seqlens_k": np.array([past + width - 1], np.int32),
            "total_sequence_length": np.array(self.capacity if "slot_branch" in given else past + width, np.int32),
            **given,
        }
        binding = self.session.io_binding()
        for spec in self.session.get_inputs():
            name = spec.name
            value = (
                self._buffer(spec)
                if name.startswith("past_key_values.")
                else ort.OrtValue.ortvalue_from_numpy(feeds[name])
            )
            binding.bind_ortvalue_input(name, value)
        results = []
        for spec in self.session.get_outputs():
            if spec.name.startswith("present."):
                binding.bind_ortvalue_output(spec.name, self.cache[spec.name.removeprefix("present.")])
            else:
                binding.bind_output(spec.name)
                results.append(spec.name)
        self.session.run_with_iobinding(binding)
        names = [spec.name for spec in self.session.get_outputs()]
        return {
            name: value.numpy() for name, value in zip(names, binding.get_outputs(), strict=True) if name in results
        }

    def _buffer(self, spec: ort.NodeArg) -> ort.OrtValue:
        key = spec.name.removeprefix("past_key_values.")
        if key not in self.cache:
            dtype = np.float16 if spec.type == "tensor(float16)" else np.float32
            shape = [self.capacity if size == "capacity" else size for size in spec.shape]
            self.cache[key] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
        return self.cache[key]


def _sentence(difference: Difference) -> str:
    where = (
        "no greedy token differs"
        if difference.first_token is None
        else f"greedy token {difference.first_token} differs first"
    )
    return f"largest difference {difference.largest:.2e} of the largest logit over {difference.tokens} tokens, {where}"
