"""Measure a draft and exit heads on questions: coverage, tokens per round, outcomes prepared.

The target answers every question (greedy, and at temperature 1), then reads its own answers once,
and draft and exit heads read along. Everything reported follows from those positions; see `rounds`
and `report`. Runs in float32, so that the text is the one that a float32 bundle writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mirror.distill.data import DataOptions, decoder_for, stop_tokens
from mirror.distill.decode import Job
from mirror.distill.heads import ExitHead
from mirror.distill.prompts import ChatFormat
from mirror.distill.report import TOP, EvaluationOptions, Measured, report, save_positions
from mirror.distill.rounds import Ints, Positions
from mirror.distill.student import Student
from mirror.distill.target import Target, load_target, load_tokenizer
from mirror.errors import ExportError

_TOKENS_PER_READ = 16384  # of right-padded texts read together
_ROWS_PER_HEAD = 2048


@dataclass(frozen=True)
class Question:
    """One question of a benchmark as the prompt's token ids; `category` groups results."""

    number: int
    category: str
    prompt: tuple[int, ...]


def read_questions(path: Path, chat: ChatFormat) -> list[Question]:
    """Return the first turns of a benchmark's JSONL file with `question_id`, `category` and `turns`.

    Raises:
        ExportError: the file isn't there.
    """
    if not path.is_file():
        raise ExportError(f"no questions at {path}; give a JSONL file with question_id, category and turns")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [
        Question(int(item["question_id"]), str(item["category"]), chat.prompt(item["turns"][0])) for item in records
    ]


def measure(
    target: Target,
    student: Student | None,
    heads: Mapping[int, ExitHead],
    questions: Sequence[Question],
    options: EvaluationOptions,
) -> list[Measured]:
    """Return the positions of every question that fits. A missing draft is replaced by the first exit head."""
    fitting = [each for each in questions if len(each.prompt) + options.max_new_tokens <= options.max_length]
    reader = _Reader(target, student, heads)
    prompts = [each.prompt for each in fitting]
    greedy = answers(target, prompts, 0.0, options)
    sampled = answers(target, prompts, 1.0, options)
    own = reader.read(prompts, greedy, None)
    drawn = reader.read(prompts, sampled, None)
    coupled = reader.read(prompts, sampled, options.seed)
    rows = zip(fitting, own, drawn, coupled, strict=True)
    return [Measured(each.number, each.category, *texts) for each, *texts in rows if min(map(_length, texts)) > 1]


def answers(
    target: Target, prompts: Sequence[tuple[int, ...]], temperature: float, options: EvaluationOptions
) -> list[Ints]:
    """Return the target's answer to every prompt, int64 `[n]` each."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    jobs = [Job(prompts[index], options.max_new_tokens, temperature) for index in order]
    decoder = decoder_for(target, jobs, DataOptions(rows=256), stop_tokens(target), options.seed)
    found: list[Ints] = [np.zeros(0, np.int64)] * len(jobs)
    for answer in decoder.run(jobs):
        found[order[answer.job]] = np.array(answer.tokens)
    return found


class _Reader:
    """Lets target, draft and exit heads read texts, and keeps their likeliest tokens."""

    def __init__(self, target: Target, student: Student | None, heads: Mapping[int, ExitHead]) -> None:
        self._target, self._student, self._heads = target, student, heads

    def read(
        self, prompts: Sequence[tuple[int, ...]], written: Sequence[Ints], coupling: int | None
    ) -> list[Positions]:
        """Return the positions of every text's answer.

        Args:
            prompts: token ids.
            written: the target's own answers, int64 `[n]` each.
            coupling: seed of the noise that made the answers at temperature 1, drawn anew given the answers
                and added to every pupil's logits; None for pupils that know nothing of it.
        """
        found: list[Positions | None] = [None] * len(prompts)
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, written, strict=True)]
        noise = None if coupling is None else torch.Generator(self._target.device).manual_seed(coupling)
        for group in _groups(lengths):
            texts = self._read_group([prompts[i] for i in group], [written[i] for i in group], noise)
            for index, text in zip(group, texts, strict=True):
                found[index] = text
        return [text for text in found if text is not None]

    @torch.no_grad()
    def _read_group(
        self, prompts: Sequence[tuple[int, ...]], written: Sequence[Ints], generator: torch.Generator | None
    ) -> list[Positions]:
        ids, where = _padded(prompts, written)
        ids, where = ids.to(self._target.device), where.to(self._target.device)
        final, exits = self._target.states(ids, tuple(self._heads))
        states = {
            str(layer): self._target.final_norm(head(exits[layer].flatten(0, 1)[where]))
            for layer, head in self._heads.items()
        }
        if self._student is not None:
            states["draft"] = self._student(ids).flatten(0, 1)[where]
        chosen = ids.flatten()[where + 1]
        tops = self._likeliest(final.flatten(0, 1)[where], chosen, states, generator)
        cuts = np.cumsum([len(answer) for answer in written])[:-1]
        split = {name: np.split(top, cuts) for name, top in tops.items()}
        draft = split.pop("draft") if self._student is not None else next(iter(split.values()))
        return [
            Positions(answer, draft[i], {int(layer): top[i] for layer, top in split.items()})
            for i, answer in enumerate(written)
        ]

    def _likeliest(
        self, final: Tensor, chosen: Tensor, states: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> dict[str, Ints]:
        """Return the likeliest tokens `[n, TOP]` of every pupil, from normalised states `[n, hidden]`."""
        parts: dict[str, list[Ints]] = {name: [] for name in states}
        for start in range(0, len(chosen), _ROWS_PER_HEAD):
            rows = slice(start, start + _ROWS_PER_HEAD)
            noise = None
            if generator is not None:
                noise = _posterior_noise(self._target.head(final[rows]), chosen[rows], generator)
            for name, state in states.items():
                scores = torch.log_softmax(self._target.head(state[rows]).float(), -1)
                scores = scores if noise is None else scores + noise
                parts[name].append(scores.topk(min(TOP, scores.shape[1]), -1).indices.cpu().numpy())
        return {name: np.concatenate(part) for name, part in parts.items()}


def _posterior_noise(logits: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Return Gumbel noise `[n, vocab]`, drawn given that `argmax(log p + noise)` is the chosen token `[n]`.

    Source: Maddison et al., A* sampling (2014): the largest perturbed value is Gumbel(0) for normalised
    log p, the others are Gumbel variables cut off at it.
    """
    log_p = torch.log_softmax(logits.float(), -1)
    free = -torch.empty_like(log_p).exponential_(generator=generator).log()
    top = -torch.empty_like(log_p[:, :1]).exponential_(generator=generator).log()
    cut = -torch.logaddexp(-top, -(log_p + free))
    cut.scatter_(1, chosen[:, None], top)
    return cut - log_p


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield texts of similar length, as many as are read together."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda each: lengths[each]):
        if group and (len(group) + 1) * lengths[index] > _TOKENS_PER_READ:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _padded(prompts: Sequence[tuple[int, ...]], written: Sequence[Ints]) -> tuple[Tensor, Tensor]:
    """Return right-padded ids `[batch, length]`, and the flat positions before each answer token."""
    texts = [[*prompt, *answer.tolist()] for prompt, answer in zip(prompts, written, strict=True)]
    length = max(map(len, texts))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    pairs = enumerate(zip(prompts, texts, strict=True))
    where = [
        torch.arange(row * length + len(prompt) - 1, row * length + len(text) - 1) for row, (prompt, text) in pairs
    ]
    return ids, torch.cat(where)


def _length(text: Positions) -> int:
    return len(text.tokens)


def main(arguments: Sequence[str]) -> None:
    """Evaluate: `python -m mirror.distill.evaluate TARGET FOLDER QUESTIONS RESULT.json [LIMIT]`."""
    from mirror.distill.run import load_pupils

    model, folder, questions, result = arguments[:4]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(model, device, torch.float32)
    pupils = load_pupils(Path(folder), target)
    chosen = read_questions(Path(questions), ChatFormat(load_tokenizer(target.checkpoint)))
    chosen = chosen[: int(arguments[4]) if len(arguments) > 4 else None]
    options = EvaluationOptions()
    measured = measure(target, pupils.student, pupils.heads, chosen, options)
    save_positions(Path(result).with_suffix(".npz"), measured)
    write_result(Path(result), measured, options, len(chosen), device_name(device))


def write_result(path: Path, measured: Sequence[Measured], options: EvaluationOptions, asked: int, device: str) -> None:
    """Write the figures and the circumstances of an evaluation."""
    facts = {
        "command": "python -m mirror.distill.evaluate TARGET FOLDER QUESTIONS RESULT",
        "device": device,
        "dtype": "float32",
        "options": asdict(options),
        "questions": len(measured),
        "left_out": asked - len(measured),
    }
    path.write_text(json.dumps(facts | report(measured, options), indent=1) + "\n", encoding="utf-8")


def device_name(device: torch.device) -> str:
    """Return what a result should call the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main(sys.argv[1:])
