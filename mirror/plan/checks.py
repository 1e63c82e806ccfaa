"""What the planner says of runs whose outcome is known, beside that outcome.

    python -m mirror.plan.checks

A check is one of three kinds. FITTED: a figure of the profile was chosen so that this comes out; it proves nothing.
CHECKED: nothing was chosen by it. OUTSIDE: the planner is known to miss it, and the note says why it stays so.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from mirror.plan.acceptance import read_curve
from mirror.plan.box import Box, DeviceProfile, read_box
from mirror.plan.passes import Part, PassSize, PassTime
from mirror.plan.rounds import Choice, Setting, plan_round
from mirror.plan.shapes import STORAGE, Shape, Storage, read_shape
from mirror.plan.timeline import run_beside
from mirror.plan.work import ModelWork
from mirror.runtime.candidates import CandidateSource

TOLERANCE = 0.15
_STEP = "docs/results/step-14b-h100.json"
_H200 = "one H200 with 16 Intel cores, measured before there were result files; Qwen3-14B's shape, fp16"
_FP16 = "docs/results/rounds-14b-small-products-whole.json: steps by the devices' clock, median rounds"
_INT4 = "docs/results/rounds-14b-int4-streamed.json: steps by the devices' clock, median rounds"
_CORES = "docs/results/draft-passes-amx.json: by mirror's own kernels on 15 threads"
_RUN = "https://github.com/openvinotoolkit/openvino/discussions/36484"


class Kind(Enum):
    """What a comparison is worth; see the module."""

    FITTED = "fitted"
    CHECKED = "checked"
    OUTSIDE = "outside"


@dataclass(frozen=True)
class Check:
    """One prediction beside what is known, both in one unit."""

    what: str
    predicted: float
    known: float
    unit: str
    kind: Kind
    source: str

    @property
    def error(self) -> float:
        """How far off the prediction is, as a share of what is known."""
        return self.predicted / self.known - 1.0


def all_checks() -> list[Check]:
    """Return every comparison."""
    return [*h100(), *h200(), *core_ultra(), *snapdragon()]


def h100() -> Iterator[Check]:
    """Yield the verification step of a 14B shape in fp16, eight rows, cut after 20 of 40 layers, on an H100."""
    box = read_box("h100-16-cores")
    target = Part(read_shape("qwen3-14b").work(STORAGE["fp16"]), box.device("cuda:0"), box, draft=False)

    def check(what: str, predicted: float, known: float, kind: Kind = Kind.CHECKED) -> Check:
        return Check(f"H100, 14B fp16: {what}", predicted, known, "ms", kind, _STEP)

    prefix, head, suffix = _step(target, 500)
    yield check("prefix", prefix.ms, 5.809)
    yield check("exit head", head.ms, 0.732)
    yield check("suffix", suffix.ms, 6.4)
    for context, known in ((100, 12.587), (500, 12.823), (2000, 13.699)):
        yield check(f"step at context {context}", sum(item.ms for item in _step(target, context)), known)
    yield check("suffix at context 8000", _step(target, 8000)[2].ms, 8.531)


def h200() -> Iterator[Check]:
    """Yield whole rounds on an H200, and a draft on 16 cores beside an earlier graph."""
    box = read_box("h200-16-cores")
    yield from _rounds(box, "fp16", _FP16, 64, (1, 1, 1, 4), (8.04, 9.22, 9.02))
    yield from _rounds(box, "int4-fp16", _INT4, 32, (1, 2, 4), (3.76, 4.81, 4.72))
    shipped = _shipped("int8")
    for rows, known, kind in ((8, 0.86, Kind.CHECKED), (64, 1.55, Kind.FITTED), (256, 4.40, Kind.FITTED)):
        timed = _draft_time(shipped, box, "cpu", rows)
        yield Check(f"H200's cores: the shipped draft in int8, {rows} rows", timed.ms, known, "ms", kind, _CORES)
    yield from _beside_cores(_with_costs(box, kernel_us=3.0, pass_ms=0.0))


def _rounds(
    box: Box,
    precision: str,
    source: str,
    branches: int,
    tokens_per_pass: tuple[int, ...],
    known: tuple[float, float, float],
) -> Iterator[Check]:
    """Yield a step without an exit head, and a serial and a mirror round with the shipped draft on the same GPU."""
    device = box.device("cuda:0")
    target = Part(read_shape("qwen3-14b").work(STORAGE[precision]), device, box, draft=False)
    setting = Setting(target, Part(_shipped(precision), device, box, draft=True), read_curve(None, 40), 330)
    terms = plan_round(setting, Choice(26, 7, CandidateSource.DRAFT, branches, tokens_per_pass))
    step_ms = terms.plain_ms - setting.host_ms  # a plain round's launches go on beside the GPU's work
    predicted = {"step": step_ms, "serial round": terms.serial_ms, "mirror round": terms.round_ms}
    for (what, predicted_ms), known_ms in zip(predicted.items(), known, strict=True):
        kind = Kind.FITTED if what == "step" else Kind.CHECKED
        yield Check(f"H200, 14B {precision}, draft on the GPU: {what}", predicted_ms, known_ms, "ms", kind, source)


def _shipped(precision: str) -> ModelWork:
    return read_shape("smollm2-135m").work(STORAGE[precision], 24576).with_layers(5)


def _beside_cores(box: Box) -> Iterator[Check]:
    """Yield what was measured with a graph of more kernels, each of which cost 3 us as they are counted here."""
    target = Part(read_shape("qwen3-14b").work(STORAGE["fp16"]), box.device("cuda:0"), box, draft=False)
    prefix, head, suffix = _step(target, 500)
    draft = Shape("4 layers x 1024", 1024, 3072, 4, 16, 8, 128, 16384, head_norms=True).work(STORAGE["bf16"])
    large = read_shape("qwen3-0.6b").work(Storage(1 + 2 / 128, 1 + 2 / 1024, 2, "int8"))

    def check(what: str, predicted: float, known: float, kind: Kind = Kind.CHECKED) -> Check:
        return Check(f"H200, an earlier graph: {what}", predicted, known, "ms", kind, _H200)

    yield check("prefix with its exit head", prefix.ms + head.ms, 4.93, Kind.FITTED)
    yield check("suffix", suffix.ms, 4.89)
    yield check("0.6B int8 draft on the CPU, a token", _draft_time(large, box, "openvino:CPU", 1).ms, 16.5, Kind.FITTED)
    for rows, alone, beside, kind in ((8, 2.5, 5.21, Kind.CHECKED), (64, 4.15, 5.87, Kind.FITTED)):
        timed = _draft_time(draft, box, "openvino:CPU", rows)
        yield check(f"4 layers x 1024 bf16 on the CPU, {rows} rows", timed.ms, alone, kind)
        both = run_beside([suffix], [timed], 0)
        end_ms = max(both.target_ms, both.draft_ms) + 0.36  # the host's work at that time
        yield check(f"the same beside the suffix, {rows} rows, with the host's work", end_ms, beside)


def core_ultra() -> Iterator[Check]:
    """Yield the published run on a Core Ultra 7 258V: 14B int4 on the GPU, a 0.6B draft in turns."""
    box = _stateful(read_box("core-ultra-7-258v"))
    storage = STORAGE["int4-openvino"]
    target = Part(read_shape("qwen3-14b").work(storage), box.device("openvino:GPU"), box, draft=False)
    draft = read_shape("qwen3-0.6b").work(storage)

    def check(what: str, predicted: float, known: float, unit: str = "ms", kind: Kind = Kind.CHECKED) -> Check:
        return Check(f"Core Ultra: {what}", predicted, known, unit, kind, _RUN)

    yield check("target forward", _forward(target, 1), 63.0)
    cpu, npu = (_draft_time(draft, box, name, 1).ms for name in ("openvino:CPU", "openvino:NPU"))
    yield check("0.6B draft on the CPU, a token", cpu, 9.4, kind=Kind.FITTED)
    yield check("0.6B draft on the NPU, a token", npu, 34.3, kind=Kind.FITTED)
    run = PublishedRun(target)
    yield check("serial/plain, CPU draft, 3 tokens", run.over_plain(3, 0.40, cpu), 1.35, "x", Kind.FITTED)
    for tokens, accepted, known in ((1, 0.60, 0.74), (3, 0.35, 0.58), (5, 0.32, 0.55)):
        yield check(f"serial/plain, NPU draft, {tokens} tokens", run.over_plain(tokens, accepted, 54.5), known, "x")
    llama = Shape("llama 2 7B", 4096, 11008, 32, 32, 32, 128, 32000).work(STORAGE["w4a16"])
    yield check(
        "Llama 2 7B on the NPU, a token", _draft_time(llama, box, "openvino:NPU", 1).ms, 53.9, kind=Kind.OUTSIDE
    )


@dataclass(frozen=True)
class PublishedRun:
    """Another engine's rounds in turns, on the published figures of that run.

    A plain token took 82 ms (12.2 tokens/s) where a forward took 63: what it spends beside forwards it spends in each
    round. The draft makes its tokens one by one, and one pass more where all of them stood, to read the last one.
    """

    target: Part
    plain_ms: float = 1000 / 12.2

    def over_plain(self, tokens: int, accepted: float, draft_ms: float) -> float:
        """Return the speed over plain, for the published share of accepted draft tokens."""
        chance = _chance(tokens, accepted * tokens)
        beside_ms = self.plain_ms - _forward(self.target, 1)
        verify_ms = _forward(self.target, tokens + 1) + beside_ms
        round_ms = verify_ms + (tokens + chance**tokens) * draft_ms
        return (1 + accepted * tokens) * self.plain_ms / round_ms


def snapdragon() -> Iterator[Check]:
    """Yield public runs of single models on a Snapdragon X Elite."""
    box = _stateful(read_box("snapdragon-x-elite"))
    q4_0, q4_1 = Storage(0.5625, 6.5625 / 8, 2, "int4"), Storage(0.625, 6.5625 / 8, 2, "int4")
    hub, studio, opencl = (
        "https://github.com/quic/ai-hub-models",
        "https://huggingface.co/pipilok",
        "https://github.com/ggml-org/llama.cpp/pull/19840",
    )
    llama_3b = Shape("Llama 3.2 3B", 3072, 8192, 28, 24, 8, 128, 128256)
    qwen_7b = Shape("Qwen2.5 7B", 3584, 18944, 28, 28, 4, 128, 152064)
    llama_8b = Shape("Llama 3.1 8B", 4096, 14336, 32, 32, 8, 128, 128256)
    llama_1b = Shape("Llama 3.2 1B", 2048, 8192, 16, 32, 8, 64, 128256)
    qwen_14b = Shape("Qwen2.5 14B", 5120, 13824, 48, 40, 8, 128, 152064)
    qwen_1b = Shape("Qwen2.5 1.5B", 1536, 8960, 28, 12, 2, 128, 151936)
    fitted, checked, outside = Kind.FITTED, Kind.CHECKED, Kind.OUTSIDE
    runs = (
        ("qnn:htp", llama_3b, STORAGE["w4a16"], 4096, 1e3 / 18.4176, fitted, hub),
        ("qnn:htp", qwen_7b, STORAGE["w4a16"], 4096, 1e3 / 12.3381, fitted, hub),
        ("qnn:htp", llama_8b, STORAGE["w4a16"], 4096, 1e3 / 10.0367, checked, hub),
        ("cpu", qwen_14b, q4_0, 0, 1e3 / 9.5, fitted, studio),
        ("cpu", qwen_1b, q4_0, 0, 1e3 / 50, fitted, studio),
        ("cpu", qwen_7b, q4_0, 0, 1e3 / 17, checked, studio),
        ("cpu", llama_1b, q4_0, 0, 1e3 / 60, outside, studio),
        ("adreno", read_shape("qwen3-0.6b"), q4_1, 0, 21.77, fitted, opencl),
        ("adreno", read_shape("qwen3-4b"), q4_1, 0, 91.37, fitted, opencl),
        ("adreno", llama_3b, q4_1, 0, 75.61, checked, opencl),
    )
    for device, shape, storage, context, known, kind, source in runs:
        timed = _draft_time(shape.work(storage), box, device, 1, context)
        yield Check(f"Snapdragon {device}: {shape.name}, a token", timed.ms, known, "ms", kind, source)


def _step(target: Part, context: int) -> tuple[PassTime, PassTime, PassTime]:
    size, model = PassSize(8, 8, context), target.model
    return target.time(model.prefix(20), size), target.time(model.exit(), size), target.time(model.suffix(20), size)


def _forward(target: Part, rows: int) -> float:
    return target.time(target.model.whole("target"), PassSize(rows, rows, 128)).ms


def _draft_time(model: ModelWork, box: Box, device: str, rows: int, context: int = 128) -> PassTime:
    part = Part(model, box.device(device), box, draft=True)
    return part.time(model.whole(), PassSize(rows, rows, context))


def _with_costs(box: Box, **values: float) -> Box:
    device = box.device("cuda:0")
    costs = {name: dataclasses.replace(getattr(device, name), value=value) for name, value in values.items()}
    changed = dataclasses.replace(device, **costs)
    return dataclasses.replace(box, devices={**box.devices, "cuda:0": changed})


def _stateful(box: Box) -> Box:
    """Return the box for engines whose cache stays on the device and whose call costs nothing of its own."""
    devices: dict[str, DeviceProfile] = {}
    for name, device in box.devices.items():
        devices[name] = dataclasses.replace(
            device, copy_gb_s=None, pass_ms=dataclasses.replace(device.pass_ms, value=0.0)
        )
    return dataclasses.replace(box, devices=devices)


def _chance(tokens: int, mean: float) -> float:
    """Return the chance of a token to stand that makes so many of them stand on average, one after the other."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(1, tokens + 1)) < mean else (low, middle)
    return low


def main() -> None:
    """Print the comparisons as a table in Markdown."""
    rows = [
        f"| {item.what} | {item.predicted:.2f} | {item.known:.2f} {item.unit} | {item.error:+.1%} | {item.kind.value} |"
        for item in all_checks()
    ]
    sys.stdout.write("\n".join(["| what | predicted | known | off by | |", "|---|--:|--:|--:|---|", *rows]) + "\n")


if __name__ == "__main__":
    main()
