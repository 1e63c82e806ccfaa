"""What a draft loses in an NPU's precisions: tokens per round and prepared outcomes against fp32.

The target's greedy answers are made once. Rounds are then walked along them with the draft alone: a proposal is
accepted as far as it is the answer, and the outcome counts as prepared where one of the draft's own branches has
it. No exit head takes part, so the loss is the draft's alone.

Whole-number graphs run on ONNX Runtime's CPU provider, which computes their scales and rounding as they are written;
what is float16 on the NPU is float32 there. Some short prompts also run on the Hexagon emulator, in its own
arithmetic, which takes seconds a pass: to their ends in float16, a round or so each with whole-number weights.

    python -m mirror.bench.npu_drafts BUNDLE spec_bench.jsonl docs/results/npu-drafts.json --work FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from mirror.bench.provenance import provenance
from mirror.bundle import Form, read_manifest
from mirror.compile.calibration import Text, answers, calibration_passes, open_draft
from mirror.export.npu_quantize import WeightBits, quantize_draft
from mirror.runtime.draft import Meeting
from mirror.runtime.model_draft import ModelDraft
from mirror.runtime.records import Ints
from mirror.targets import open_device
from mirror.targets.base import Device, LoadRequest
from mirror.targets.cpu import CpuDevice
from mirror.targets.watched import Pass, WatchedDevice, WatchedSegment

_NO_LIMIT = 1 << 30
_NARROW = 64  # rows
_SHORT_PROMPT, _SHORT_ANSWER = 160, 32  # tokens


@dataclass(frozen=True)
class Rounds:
    """Rounds walked along known answers."""

    rounds: int = 0
    tokens: int = 0
    prepared: int = 0
    proposals: tuple[tuple[int, ...], ...] = ()
    seconds: float = 0.0

    def __add__(self, other: Rounds) -> Rounds:
        return Rounds(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def to_json(self, reference: Rounds) -> dict[str, Any]:
        """Return the figures, against those of fp32 on the same prompts."""
        return {
            "rounds": self.rounds,
            "tokens_per_round": round(self.tokens / self.rounds, 3),
            "tokens_per_round_of_fp32": round(self.tokens / self.rounds / (reference.tokens / reference.rounds), 4),
            "prepared": round(self.prepared / self.rounds, 4),
            "prepared_of_fp32": round(self.prepared / self.rounds / (reference.prepared / reference.rounds), 4),
            "seconds": round(self.seconds, 1),
        }


def _values(rounds: Rounds) -> list[Any]:
    return [getattr(rounds, field.name) for field in dataclasses.fields(rounds)]


# --- rounds ---------------------------------------------------------------------------------------


def walk(draft: ModelDraft, gamma: int, text: Text, most: int) -> Rounds:
    """Walk rounds along an answer, `most` at most; the prompt's pass gave its first token."""
    known = np.array([*text.prompt, *text.answer], np.int64)
    done, total = len(text.prompt) + 1, Rounds()
    started_s = time.perf_counter()
    draft.keep(0)
    while done + gamma < known.size and total.rounds < most:
        context = known[:done]
        proposal = draft.propose(context, gamma, None).read().tokens
        accepted = _matching(proposal, known[done:])
        outcome = (accepted, int(known[done + accepted]))
        prepared = _prepares(draft, context, proposal, outcome)
        total += Rounds(1, accepted + 1, int(prepared), (tuple(proposal),))
        done += accepted + 1
    return dataclasses.replace(total, seconds=time.perf_counter() - started_s)


def _matching(proposal: Sequence[int], answer: Ints) -> int:
    same = [mine == theirs for mine, theirs in zip(proposal, answer, strict=False)]
    return same.index(False) if False in same else len(same)


def _prepares(draft: ModelDraft, context: Ints, proposal: Sequence[int], outcome: tuple[int, int]) -> bool:
    """Return whether one of the branches that the draft would roll out is the outcome."""
    window = np.array([context[-1], *proposal], np.int64)
    meeting = Meeting()
    meeting.abandon()  # the branches' first tokens are all that is asked
    branches = draft.roll_out(context, window, 1, meeting, None).branches
    return bool(((branches.accepted == outcome[0]) & (branches.next_tokens == outcome[1])).any())


def measure(bundle: Path, device: Device, texts: Sequence[Text], label: str, most: int = _NO_LIMIT) -> Rounds:
    """Walk all texts, `most` rounds of each at most; say what came out."""
    draft, gamma = open_draft(bundle, device)
    total = Rounds()
    for text in texts:
        total += walk(draft, gamma, text, most)
    click.echo(
        f"{label}: {total.tokens / total.rounds:.3f} tokens per round, {total.prepared / total.rounds:.3f} prepared"
    )
    return total


# --- the table ------------------------------------------------------------------------------------


class _Narrow(WatchedDevice):
    """A device without the programs of whole rollouts, which no round here gets to, and with those of one branch.

    An emulator takes longer the more rows a pass has, padded ones too.
    """

    padded_width = 1

    def load_segment(self, request: LoadRequest) -> WatchedSegment:
        """Load a segment for the narrow ones of its passes."""
        shapes = [shape for shape in request.shapes if shape.width <= _NARROW]
        return super().load_segment(dataclasses.replace(request, shapes=shapes))


def emulate(bundle: Path, texts: Sequence[Text], label: str, most: int) -> dict[str, Any]:
    """Return what the emulator proposes beside what the CPU does, `most` rounds of each text at most."""
    on_cpu = measure(bundle, CpuDevice(Form.ROWS), texts, f"{label}, the emulator's rounds", most)
    on_npu = measure(bundle, _Narrow(open_device("qnn:htp"), Pass.run), texts, f"{label}, emulated", most)
    # One token apart, the rest of a proposal is another text, and so may the rounds after it be.
    pairs = list(zip(on_cpu.proposals, on_npu.proposals, strict=False))
    return {
        "prompts": len(texts),
        **on_npu.to_json(on_cpu),
        "rounds_cpu": on_cpu.rounds,
        "tokens_cpu_emulator": [on_cpu.tokens, on_npu.tokens],
        "prepared_cpu_emulator": [on_cpu.prepared, on_npu.prepared],
        "same_first_token": round(sum(mine[0] == theirs[0] for mine, theirs in pairs) / len(pairs), 3),
        "same_proposal": round(sum(mine == theirs for mine, theirs in pairs) / len(pairs), 3),
    }


def shortened(texts: Sequence[Text], count: int) -> list[Text]:
    """Return some short texts, spread over all kinds, with answers that make few rounds."""
    short = [text for text in texts if len(text.prompt) <= _SHORT_PROMPT and len(text.answer) >= _SHORT_ANSWER]
    chosen = short[:: max(1, len(short) // max(count, 1))][:count]
    return [dataclasses.replace(text, answer=text.answer[:_SHORT_ANSWER]) for text in chosen]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("prompts", type=click.Path(path_type=Path, exists=True))
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Where quantized bundles are made.")
@click.option("--every", default=20, help="Takes every so many prompts.")
@click.option("--tokens", default=64, help="Longest answer, in tokens.")
@click.option("--emulated", default=8, help="Short prompts that also run on the emulator; 0 for none.")
@click.option("--rounds", default=1, help="Rounds of each of them with whole-number weights, which take longest.")
def main(
    bundle: Path, prompts: Path, result: Path, work: Path, every: int, tokens: int, emulated: int, rounds: int
) -> None:
    """Measure the draft of BUNDLE in every precision on a part of PROMPTS (Spec-Bench's first turns)."""
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()][::every]
    texts = answers(bundle, [line["turns"][0] for line in lines], tokens)
    click.echo(f"{len(texts)} answers, {sum(len(text.answer) for text in texts)} tokens")
    bundles = {"fp32": bundle}
    passes = calibration_passes(bundle)
    for bits in WeightBits:
        bundles[bits.value] = work / bits.value
        quantize_draft(bundle, bundles[bits.value], bits, passes)
    whole = {name: measure(folder, CpuDevice(Form.ROWS), texts, name) for name, folder in bundles.items()}
    record = {
        **provenance("mirror.bench.npu_drafts"),
        "prompts": len(texts),
        "answer_tokens": sum(len(text.answer) for text in texts),
        "candidates": "draft",
        "draft": dataclasses.asdict(read_manifest(bundle).draft),  # type: ignore[arg-type]
        "settings": dataclasses.asdict(read_manifest(bundle).settings),
        "cpu": {name: found.to_json(whole["fp32"]) for name, found in whole.items()},
        "emulator": {},
    }
    _write(result, record)
    for name, folder in bundles.items() if emulated else ():
        most = _NO_LIMIT if name == "fp32" else rounds
        record["emulator"]["float16" if name == "fp32" else name] = emulate(
            folder, shortened(texts, emulated), name, most
        )
        _write(result, record)


def _write(result: Path, record: dict[str, Any]) -> None:
    result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
