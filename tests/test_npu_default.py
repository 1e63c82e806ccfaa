"""The default model end to end: the target on the CPU, its shipped draft on the Hexagon NPU's emulator.

The emulator takes about a second for each pass and five to compile one, so the round is small: three branches, a
window of three, few tokens. `python -m mirror.bench.npu_run` does the same at length.
"""

from __future__ import annotations

from pathlib import Path

from mirror.bundle import read_manifest
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Lane, Mode
from mirror.runtime.text import TextCodec
from mirror.targets import open_device
from mirror.targets.cpu import CpuDevice
from tests.test_qnn import needs_emulator

OPTIONS = EngineOptions(
    mode=Mode.MIRROR, max_length=96, gamma=3, fanout=(2, 1, 0, 0), tokens_per_pass=(1, 2), draft_timeout_s=120
)
QUESTION, NEW_TOKENS = "What is the capital of France?", 12


@needs_emulator
def test_the_default_draft_on_the_emulator_gives_the_plain_text(smollm2: Path) -> None:
    prompt = TextCodec.load(smollm2).encode_prompt(QUESTION, True)
    with Engine(smollm2, read_manifest(smollm2), OPTIONS, CpuDevice(), CpuDevice()) as engine:
        plain = engine.generate_tokens(prompt, max_new_tokens=NEW_TOKENS, mode="plain")
        on_cpu = engine.generate_tokens(prompt, max_new_tokens=NEW_TOKENS)
    with Engine(smollm2, read_manifest(smollm2), OPTIONS, CpuDevice(), open_device("qnn:htp")) as engine:
        on_npu = engine.generate_tokens(prompt, max_new_tokens=NEW_TOKENS)
    assert on_npu.tokens == on_cpu.tokens == plain.tokens
    assert on_npu.devices[Lane.DRAFT] == "qnn:emulator"
    assert not on_npu.events
    assert sum(item.accepted for item in on_npu.rounds) > 0
    assert any(item.reused for item in on_npu.rounds), "no branch that the emulator prepared was taken"
