"""What a draft is fed on real text, for a quantizer that wants to know the ranges of its numbers.

The text is the project's own prompts and the target's greedy answers to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mirror.bench.prompts import load_prompts
from mirror.bundle import Form, read_manifest
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.draft import Meeting
from mirror.runtime.engine import Engine
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.model_draft import ModelDraft
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.runtime.text import TextCodec
from mirror.targets.base import Array, Device, Tensor, to_host
from mirror.targets.cpu import CpuDevice
from mirror.targets.static_shapes import PAST_PREFIX
from mirror.targets.watched import Pass, WatchedDevice

MAX_LENGTH = 512
LONGEST_PROMPT = 320  # tokens
ANSWER_TOKENS = 24
PROMPTS_PER_KIND = 2
EVERY = 3  # passes of which one is kept


@dataclass(frozen=True)
class Text:
    """A prompt and the target's greedy answer, as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def answers(bundle: Path, prompts: Sequence[str], count: int) -> list[Text]:
    """Return the target's greedy answers of `count` tokens at most; prompts that are too long are left out."""
    codec = TextCodec.load(bundle)
    texts = []
    with Engine(bundle, read_manifest(bundle), _options(Mode.PLAIN), CpuDevice(), CpuDevice()) as engine:
        for prompt in prompts:
            tokens = codec.encode_prompt(prompt, True)
            if len(tokens) <= LONGEST_PROMPT:
                texts.append(Text(tuple(tokens), engine.generate_tokens(tokens, max_new_tokens=count).tokens))
    return texts


def _options(mode: Mode) -> EngineOptions:
    return EngineOptions(mode=mode, max_length=MAX_LENGTH, candidates=CandidateSource.DRAFT)


def open_draft(bundle: Path, device: Device) -> tuple[ModelDraft, int]:
    """Return a bundle's draft on a device, and its gamma."""
    manifest = read_manifest(bundle)
    plan = make_plan(manifest, _options(Mode.MIRROR), shared_cpu=False)
    draft = load_draft(bundle, manifest, device, plan)
    assert isinstance(draft, ModelDraft)
    return draft, plan.gamma


Recorded = dict[str, list[Mapping[str, Array]]]


def recording_device(passes: Recorded) -> Device:
    """Return ONNX Runtime's CPU over graphs in rows form; the inputs of every pass are kept, by segment."""
    return WatchedDevice(CpuDevice(Form.ROWS), lambda item: _recorded(item, passes))


def _recorded(item: Pass, passes: Recorded) -> Mapping[str, Tensor]:
    """Keep a copy of a pass's inputs, and of the cache as it is before the pass; run it."""
    kept = {name: to_host(item.feeds[name]).copy() for name in item.inner.input_names}
    buffers = getattr(item.cache, "buffers", {})
    kept |= {name: buffer.numpy().copy() for name, buffer in buffers.items() if name.startswith(PAST_PREFIX)}
    passes.setdefault(item.segment, []).append(kept)
    return item.run()


def calibration_passes(bundle: Path) -> Mapping[str, Sequence[Mapping[str, Array]]]:
    """Return inputs of passes of each draft segment, caches included: windows and one branch's rollouts."""
    prompts = [prompt.text for prompt in load_prompts(PROMPTS_PER_KIND)]
    recorded: Recorded = {}
    draft, gamma = open_draft(bundle, recording_device(recorded))
    for text in answers(bundle, prompts, ANSWER_TOKENS):
        _read_and_draft(draft, gamma, text)
    return {name: passes[::EVERY] for name, passes in recorded.items()}


def _read_and_draft(draft: ModelDraft, gamma: int, text: Text) -> None:
    """Let a draft propose, and read its window, at some places of an answer."""
    known = np.array([*text.prompt, *text.answer], np.int64)
    draft.keep(0)
    for end in range(len(text.prompt) + 1, known.size, 3):
        context = known[:end]
        proposal = draft.propose(context, gamma, None).read().tokens
        meeting = Meeting()
        meeting.abandon()  # the window is all that is to be read
        draft.roll_out(context, np.array([context[-1], *proposal], np.int64), 1, meeting, None)
