"""Measure a draft and exit heads on questions: coverage, tokens per round, outcomes prepared.

The target answers every question (greedy, and at temperature 1), then reads its own answers once,
and draft and exit heads read along. Everything reported follows from those positions; see `rounds`
and `report`. Runs in float32, so that the text is the one that a float32 bundle writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from mirror.distill.data import Batch, DataOptions, decoder_for, stop_tokens, to_device
from mirror.distill.decode import Job
from mirror.distill.layout import ChainOptions
from mirror.distill.prompts import ChatFormat
from mirror.distill.reading import Read, read_draft
from mirror.distill.report import (
    COUPLED,
    GREEDY,
    SAMPLED,
    TOP,
    EvaluationOptions,
    Measured,
    report,
    save_positions,
    suggested,
)
from mirror.distill.rounds import Ints, Positions
from mirror.distill.target import Head, Target, load_target, load_tokenizer
from mirror.distill.train import Pupils
from mirror.errors import ExportError

_TOKENS_PER_READ = 8192  # of right-padded texts read together
_ROWS_PER_HEAD = 2048

View = Callable[[Tensor, Tensor | None], Tensor]  # log-probs and noise [n, vocab] -> scores [n, vocab]


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
    pupils: Pupils,
    ranking: Sequence[int],
    questions: Sequence[Question],
    options: EvaluationOptions,
) -> list[Measured]:
    """Return the positions of every question that fits. A missing draft is replaced by the first exit head.

    Args:
        target: the target.
        pupils: draft and exit heads.
        ranking: the target's tokens by falling frequency, for trimmed vocabularies; empty for none.
        questions: what is asked.
        options: lengths and variants.
    """
    fitting = [each for each in questions if len(each.prompt) + options.max_new_tokens <= options.max_length]
    prompts = [each.prompt for each in fitting]
    greedy = answers(target, prompts, 0.0, options)
    sampled = answers(target, prompts, 1.0, options)
    reader = _Reader(target, pupils, options.gamma)
    laws = reader.read(prompts, greedy, None, {GREEDY: _as_it_is, **_trimmed_views(ranking, options)})
    laws |= reader.read(prompts, sampled, None, {SAMPLED: _as_it_is})
    laws |= reader.read(prompts, sampled, options.seed, _coupled_views(options))
    rows = [(each, {law: texts[i] for law, texts in laws.items()}) for i, each in enumerate(fitting)]
    return [
        Measured(each.number, each.category, texts)
        for each, texts in rows
        if min(len(text.tokens) for text in texts.values()) > 1
    ]


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

    def __init__(self, target: Target, pupils: Pupils, gamma: int) -> None:
        self._target, self._pupils = target, pupils
        streams = 0 if pupils.student is None else pupils.student.stream_count
        # A draft with features is measured within branches, where its rows have none; others on their streams.
        fed = pupils.feature_layer is not None
        self._chains = ChainOptions(0 if fed else streams, gamma - 1 if fed else 0)

    def read(
        self,
        prompts: Sequence[tuple[int, ...]],
        written: Sequence[Ints],
        coupling: int | None,
        views: Mapping[str, View],
    ) -> dict[str, list[Positions]]:
        """Return the positions of every text's answer, by view.

        Args:
            prompts: token ids.
            written: the target's own answers, int64 `[n]` each.
            coupling: seed of the noise that made the answers at temperature 1, drawn anew given the answers;
                None where there is none.
            views: what a pupil's log-probs and the noise are made into, by name.
        """
        found: dict[str, dict[int, Positions]] = {name: {} for name in views}
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, written, strict=True)]
        noise = None if coupling is None else torch.Generator(self._target.device).manual_seed(coupling)
        for group in _groups(lengths):
            texts = self._read_group([prompts[i] for i in group], [written[i] for i in group], noise, views)
            for name, parts in texts.items():
                found[name] |= dict(zip(group, parts, strict=True))
        return {name: [texts[i] for i in range(len(prompts))] for name, texts in found.items()}

    @torch.no_grad()
    def _read_group(
        self,
        prompts: Sequence[tuple[int, ...]],
        written: Sequence[Ints],
        noise: torch.Generator | None,
        views: Mapping[str, View],
    ) -> dict[str, list[Positions]]:
        batch = _batch(prompts, written)
        device, fed = self._target.device, self._pupils.feature_layer
        layers = dict.fromkeys((*self._pupils.heads, *(() if fed is None else (fed,))))
        final, exits = self._target.states(to_device(batch.input_ids, device), tuple(layers))
        where = to_device(batch.learned, device)
        scored = _Scored(self._target.head(final.flatten(0, 1)[where]), _following(batch).to(device), noise)
        head = self._target.head
        tops = {
            str(layer): scored.likeliest(self._target.final_norm(own(exits[layer].flatten(0, 1)[where])), head, views)
            for layer, own in self._pupils.heads.items()
        }
        student = self._pupils.student
        said: dict[str, Ints] = {}
        if student is not None:
            read = read_draft(student, batch, None if fed is None else exits[fed], self._chains, device)
            tops["draft"] = scored.likeliest(read.own, student.head, views)
            said = self._on_chains(read, scored, student.head, views)
        split = {view: _split(batch, {name: top[view] for name, top in tops.items()}, said.get(view)) for view in views}
        return {
            view: [self._positions(answer, parts[i]) for i, answer in enumerate(written)]
            for view, parts in split.items()
        }

    def _on_chains(self, read: Read, scored: _Scored, head: Head, views: Mapping[str, View]) -> dict[str, Ints]:
        """Return what the chain at each position says, int64 `[n, chain length]`, -1 past a text's end, by view."""
        if read.layout is None:
            return {}
        rows = torch.from_numpy(read.layout.lesson).to(read.chains.device)
        found = {}
        for view, top in scored.likeliest(read.chains, head, views, rows=rows, most=1).items():
            found[view] = np.full((scored.count, self._chains.length), -1)
            found[view][read.layout.anchored, read.layout.step] = top[:, 0]
        return found

    def _positions(self, answer: Ints, parts: Mapping[str, Ints]) -> Positions:
        exits = {int(name): top for name, top in parts.items() if name not in ("draft", "chains")}
        draft = parts["draft"] if "draft" in parts else next(iter(exits.values()))
        none = np.zeros((0, 0), np.int64)
        chains = parts.get("chains", none)
        fed = self._pupils.feature_layer is not None
        return Positions(answer, draft, exits, none if fed else chains, chains if fed else none)


class _Scored:
    """The target's word on the positions of a batch: what pupils are scored beside.

    `logits`: the target's, `[n, vocab]`. `chosen`: int64 `[n]`, the text's own tokens. `generator`: draws the
    noise that made them; None for none.
    """

    def __init__(self, logits: Tensor, chosen: Tensor, generator: torch.Generator | None) -> None:
        self.count = len(chosen)
        parts = zip(torch.split(logits, _ROWS_PER_HEAD), torch.split(chosen, _ROWS_PER_HEAD), strict=True)
        noise = [] if generator is None else [_posterior_noise(*part, generator) for part in parts]
        self._noise = torch.cat(noise) if noise else None

    def likeliest(
        self, states: Tensor, head: Head, views: Mapping[str, View], *, rows: Tensor | None = None, most: int = TOP
    ) -> dict[str, Ints]:
        """Return the likeliest tokens, int64 `[m, most]`, -1 for none, by view.

        Args:
            states: normalised states `[m, hidden]` of a pupil.
            head: its LM head.
            views: how scores are made.
            rows: int64 `[m]`, the position that each state speaks about; None for all in turn.
            most: tokens for each.
        """
        places = torch.arange(len(states), device=states.device) if rows is None else rows
        parts: dict[str, list[Ints]] = {name: [np.zeros((0, most), np.int64)] for name in views}
        for state, place in zip(torch.split(states, _ROWS_PER_HEAD), torch.split(places, _ROWS_PER_HEAD), strict=True):
            log_p = torch.log_softmax(head(state).float(), -1)
            given = None if self._noise is None else self._noise[place]
            for name, view in views.items():
                top = view(log_p, given).topk(min(most, log_p.shape[1]), -1)
                parts[name].append(top.indices.masked_fill(top.values == -torch.inf, -1).cpu().numpy())
        return {name: np.concatenate([each for each in part if each.size]) for name, part in parts.items()}


def _as_it_is(log_p: Tensor, _: Tensor | None) -> Tensor:
    return log_p


def _noisy(log_p: Tensor, noise: Tensor | None) -> Tensor:
    return log_p if noise is None else log_p + noise


def _noisy_among(count: int, log_p: Tensor, noise: Tensor | None) -> Tensor:
    """Add the noise to the `count` likeliest scores, as a host can that gets no others; drop the rest."""
    least = log_p.topk(min(count, log_p.shape[1]), -1).values[:, -1:]
    return _noisy(log_p, noise).masked_fill(log_p < least, -torch.inf)


def _trimmed(known: Tensor, log_p: Tensor, _: Tensor | None) -> Tensor:
    return log_p.masked_fill(~known.to(log_p.device), -torch.inf)


def _trimmed_views(ranking: Sequence[int], options: EvaluationOptions) -> dict[str, View]:
    views: dict[str, View] = {}
    for size in options.vocabularies:
        if size < len(ranking):
            known = torch.zeros(len(ranking), dtype=torch.bool)
            known[list(ranking[:size])] = True
            views[f"{GREEDY}_vocabulary_{size}"] = partial(_trimmed, known)
    return views


def _coupled_views(options: EvaluationOptions) -> dict[str, View]:
    among = {f"{COUPLED}_among_{count}": partial(_noisy_among, count) for count in options.coupled_scores}
    return {COUPLED: _noisy, **among}


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


def _batch(prompts: Sequence[tuple[int, ...]], written: Sequence[Ints]) -> Batch:
    """Return right-padded texts, learned at the positions before each answer token."""
    texts = [[*prompt, *answer.tolist()] for prompt, answer in zip(prompts, written, strict=True)]
    length = max(map(len, texts))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    pairs = enumerate(zip(prompts, texts, strict=True))
    where = [
        torch.arange(row * length + len(prompt) - 1, row * length + len(text) - 1) for row, (prompt, text) in pairs
    ]
    return Batch(np.arange(len(texts)), ids, torch.cat(where), tuple(map(len, written)))


def _following(batch: Batch) -> Tensor:
    return batch.input_ids.flatten()[batch.learned + 1]


def _split(batch: Batch, tops: Mapping[str, Ints], said: Ints | None) -> list[dict[str, Ints]]:
    """Return the parts of each text."""
    cuts = np.cumsum(batch.counts)[:-1]
    named = {**tops, **({} if said is None else {"chains": said})}
    split = {name: np.split(top, cuts) for name, top in named.items()}
    return [{name: parts[i] for name, parts in split.items()} for i in range(len(batch.counts))]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("questions", type=click.Path(path_type=Path))
@click.argument("result", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--limit", default=None, type=int, help="Ask the first questions only.")
@click.option("--max-new-tokens", default=128, help="Longest answer.")
@click.option("--set-defaults", is_flag=True, help="Write the defaults that follow into FOLDER/distill.json.")
def main(
    model: str, folder: Path, questions: Path, result: Path, limit: int | None, max_new_tokens: int, set_defaults: bool
) -> None:
    """Measure what `mirror distill` made in FOLDER for MODEL on QUESTIONS, into RESULT (JSON, and positions beside)."""
    from mirror.distill import run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = load_target(model, device, torch.float32)
    pupils = run.load_pupils(folder, target)
    chosen = read_questions(questions, ChatFormat(load_tokenizer(target.checkpoint)))[:limit]
    options = EvaluationOptions(max_new_tokens=max_new_tokens)
    measured = measure(target, pupils, run.load_ranking(folder), chosen, options)
    save_positions(result.with_suffix(".npz"), measured)
    write_result(result, measured, options, len(chosen), device_name(device))
    if set_defaults:
        run.set_defaults(folder, suggested(measured, options))


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
    facts["suggested"] = suggested(measured, options)
    path.write_text(json.dumps(facts | report(measured, options), indent=1) + "\n", encoding="utf-8")


def device_name(device: torch.device) -> str:
    """Return what a result should call the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
