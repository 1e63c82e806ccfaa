"""The text to learn from: prompts, the target's own answers to them, cached in shards on disk.

A corpus folder is named after all that its content depends on. Its shards are written whole and
in a fixed order, each from a seed of its own, so a run that was killed goes on where it stopped
and ends with the same corpus.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirror.distill.decode import BatchDecoder, Job
from mirror.distill.progress import DistillProgress
from mirror.distill.prompts import (
    OPENINGS,
    ChatFormat,
    Prompt,
    given_passages,
    given_tasks,
    passage_requests,
    passage_tasks,
    read_prompts,
    topics,
)
from mirror.distill.target import Target, load_tokenizer
from mirror.errors import ExportError
from mirror.export.checkpoint import eos_ids

Ints = NDArray[np.int64]
_SHORT_PROMPT = 64  # tokens; shorter prompts are alike
TEXTS_FILE = "texts.npz"
_NOT_WRITTEN = ("files", "texts", "rows", "cache_bytes")  # options that don't change what is written, or not by name


@dataclass(frozen=True)
class DataOptions:
    """What the corpus is made of. Counts are texts, lengths are tokens.

    `files`: prompts. `texts`: corpora that the same target wrote for earlier trainings, learned from too.
    `own_prompts`: user turns that the target writes; `opened_prompts`: turns whose first words are given, most
    of them questions'. `passages`: passages it writes for tasks on long texts; `given_tasks`: tasks on passages
    found in the files' prompts. `ask_prompts`: whether the files' prompts are asked themselves. `greedy_answers` and
    `sampled_answers`: answers to each prompt; 0.5 is one to every other prompt. `rows`: texts decoded at once at
    most. `cache_bytes`: memory for their KV cache, which limits `rows` on long prompts.
    """

    files: tuple[Path, ...] = ()
    texts: tuple[Path, ...] = ()
    own_prompts: int = 0
    opened_prompts: int = 0
    passages: int = 0
    given_tasks: int = 0
    ask_prompts: bool = True
    greedy_answers: float = 1.0
    sampled_answers: float = 0.5
    temperature: float = 1.0
    max_prompt_tokens: int = 1536
    max_answer_tokens: int = 192
    rows: int = 8192
    cache_bytes: int = 36 * 2**30
    jobs_per_shard: int = 32768
    seed: int = 0


@dataclass(frozen=True)
class Corpus:
    """Texts as one flat array.

    Text i is `tokens[offsets[i] : offsets[i + 1]]`; its answer begins `prompt_lengths[i]` tokens into it.
    """

    tokens: NDArray[np.uint32]
    offsets: Ints
    prompt_lengths: Ints

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def answer_tokens(self) -> int:
        """Tokens that the target wrote."""
        return int(self.offsets[-1] - self.prompt_lengths.sum())


@dataclass(frozen=True)
class Batch:
    """Right-padded texts of similar length.

    `texts`: int64 `[batch]`, their numbers in the corpus. `input_ids`: int64 `[batch, length]`. `learned`:
    int64 `[n]`, the positions whose next token the target wrote, in the flattened batch, text by text.
    `counts`: how many of them each text has.
    """

    texts: Ints
    input_ids: Tensor
    learned: Tensor
    counts: tuple[int, ...]


def make_corpus(target: Target, options: DataOptions, cache: Path, progress: DistillProgress) -> Corpus:
    """Return the corpus of a target, from the cache where it is there.

    What was written is also kept whole, as `texts.npz` in its folder, for trainings to come.

    Raises:
        ExportError: a file is missing or malformed, or there is nothing to learn from.
    """
    kept = [load_corpus(path, target.checkpoint.fingerprint) for path in options.texts]
    folder = _corpus_folder(target, options, cache)
    author = _Author(target, options, folder, progress)
    given = [prompt for path in options.files for prompt in read_prompts(path)]
    asked = given if options.ask_prompts else []
    prompts = asked + author.own_prompts() + author.opened_prompts() + author.passage_tasks(given)
    prompts += author.given_tasks(given)
    if not prompts and not kept:
        raise ExportError("there are no prompts to learn from; give --prompts FILE.jsonl or --own-prompts COUNT")
    if not prompts:
        return joined(kept)
    written = author.answers(prompts)
    if not (folder / TEXTS_FILE).is_file():
        save_corpus(written, folder / TEXTS_FILE, target.checkpoint.fingerprint)
    return joined([*kept, written])


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Return the texts of several corpora as one, in turn."""
    lengths = np.concatenate([np.diff(each.offsets) for each in corpora])
    return Corpus(
        np.concatenate([each.tokens for each in corpora]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([each.prompt_lengths for each in corpora]),
    )


def save_corpus(corpus: Corpus, path: Path, fingerprint: str) -> None:
    """Write a corpus into one `.npz` file, with the fingerprint of the target that wrote it."""
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(
        partial,
        tokens=_narrow(corpus.tokens),
        lengths=np.diff(corpus.offsets).astype(np.int32),
        prompts=corpus.prompt_lengths.astype(np.int32),
        target=np.array(fingerprint),
    )
    os.replace(partial, path)


def load_corpus(path: Path, fingerprint: str) -> Corpus:
    """Return what `save_corpus` wrote.

    Raises:
        ExportError: the file isn't there, is no corpus, or another target wrote it.
    """
    if not path.is_file():
        raise ExportError(f"no corpus at {path}; give the {TEXTS_FILE} that an earlier training left in its cache")
    with np.load(path) as stored:
        if missing := {"tokens", "lengths", "prompts", "target"} - set(stored.files):
            raise ExportError(f"{path} holds no {sorted(missing)[0]}; give a {TEXTS_FILE} that `mirror distill` wrote")
        wrote = str(stored["target"])
        if wrote != fingerprint:
            raise ExportError(
                f"{path} was written by another target ({wrote[:12]}) than this one ({fingerprint[:12]}); "
                "let this target write its own"
            )
        lengths = stored["lengths"].astype(np.int64)
        prompts = stored["prompts"].astype(np.int64)
        return Corpus(stored["tokens"].astype(np.uint32), np.concatenate([[0], np.cumsum(lengths)]), prompts)


def batches(corpus: Corpus, texts: Sequence[int], tokens_per_batch: int, seed: int) -> Iterator[Batch]:
    """Yield one epoch over some texts of a corpus, in an order that the seed decides."""
    source = np.random.default_rng(seed)
    lengths = np.diff(corpus.offsets)[texts]
    # A little noise on the length mixes the texts of neighbouring lengths anew in every epoch.
    order = np.asarray(texts)[np.argsort(lengths * source.uniform(0.95, 1.05, len(lengths)))]
    groups = list(_groups(order, np.diff(corpus.offsets), tokens_per_batch))
    for index in source.permutation(len(groups)):
        yield _batch(corpus, groups[index])


def ranking(corpus: Corpus, vocab_size: int) -> Ints:
    """Return all token ids, int64 `[vocab]`, the most frequent in a corpus's answers first."""
    return np.argsort(-np.bincount(_answers(corpus, range(len(corpus))), minlength=vocab_size), kind="stable")


def coverage_of(ranked: Ints, corpus: Corpus, texts: Sequence[int], sizes: Sequence[int]) -> dict[int, float]:
    """Return which share of some texts' answer tokens the first tokens of a ranking cover, by their number."""
    place = np.empty_like(ranked)
    place[ranked] = np.arange(len(ranked))
    places = place[_answers(corpus, texts)]
    return {size: float((places < size).mean()) for size in sizes}


def _answers(corpus: Corpus, texts: Sequence[int]) -> Ints:
    """Return the tokens of some answers, int64 `[n]`."""
    parts = [corpus.tokens[corpus.offsets[i] + corpus.prompt_lengths[i] : corpus.offsets[i + 1]] for i in texts]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def held_out(corpus: Corpus, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the texts to learn from and those kept for measuring; equal prompts stay on one side."""
    learn: list[int] = []
    keep: list[int] = []
    for index in range(len(corpus)):
        start = corpus.offsets[index]
        prompt = corpus.tokens[start : start + corpus.prompt_lengths[index]].tobytes()
        bits = int.from_bytes(hashlib.blake2b(prompt, digest_size=4, key=str(seed).encode()).digest(), "big")
        (keep if bits < share * 2**32 else learn).append(index)
    return learn, keep


class _Author:
    """Lets one target write: its own prompts, passages, answers. Everything it writes is cached in a folder."""

    def __init__(self, target: Target, options: DataOptions, folder: Path, progress: DistillProgress) -> None:
        self._target, self._options, self._folder, self._progress = target, options, folder, progress
        tokenizer = load_tokenizer(target.checkpoint)
        self._chat = ChatFormat(tokenizer)
        self._stop = stop_tokens(target)

    def own_prompts(self) -> list[Prompt]:
        """Return user turns that the target wrote, without repetitions."""
        job = Job(self._chat.open_turn(), 192, 0.8)
        written = self._texts([job] * self._options.own_prompts, "prompts")
        seen = dict.fromkeys(text for text in written if len(text) >= 8)
        return [Prompt("own", text) for text in seen]

    def opened_prompts(self) -> list[Prompt]:
        """Return user turns that the target wrote from given openings on, without repetitions."""
        openings = [OPENINGS[i % len(OPENINGS)] for i in range(self._options.opened_prompts)]
        jobs = [Job(self._chat.open_turn(opening), 96, 0.9) for opening in openings]
        written = zip(openings, self._decoded(jobs, "openings"), strict=True)
        seen = dict.fromkeys((opening + text).strip() for opening, text in written)
        return [Prompt("opened", text) for text in seen if len(text) >= 16]

    def given_tasks(self, given: Sequence[Prompt]) -> list[Prompt]:
        """Return tasks on passages of the given prompts."""
        return given_tasks(
            given_passages(given), _short_questions(given), self._options.given_tasks, self._options.seed
        )

    def passage_tasks(self, given: Sequence[Prompt]) -> list[Prompt]:
        """Return tasks on passages that the target wrote."""
        requests = passage_requests(topics(given, self._options.passages, self._options.seed))
        written = self._texts([Job(self._chat.prompt(request.text), 384, 0.8) for request in requests], "passages")
        passages = [Prompt(request.kind, text) for request, text in zip(requests, written, strict=True) if text]
        return passage_tasks(passages, _short_questions(given), self._options.seed)

    def answers(self, prompts: Sequence[Prompt]) -> Corpus:
        """Return all prompts with their answers."""
        options = self._options
        texts = list(dict.fromkeys(prompt.text for prompt in prompts))
        encoded = dict(zip(texts, self._chat.prompts(texts), strict=True))
        fitting = {text: ids for text, ids in encoded.items() if len(ids) <= options.max_prompt_tokens}
        jobs = [
            Job(fitting[text], options.max_answer_tokens, temperature)
            for temperature, count in ((0.0, options.greedy_answers), (options.temperature, options.sampled_answers))
            for text in repeated(list(fitting), count)
        ]
        return _corpus(jobs, self._write(jobs, "answers"))

    def _texts(self, jobs: list[Job], stage: str) -> list[str]:
        return [text.strip() for text in self._decoded(jobs, stage)]

    def _decoded(self, jobs: list[Job], stage: str) -> list[str]:
        return [self._chat.text(answer.tolist()) for answer in self._write(jobs, stage)]

    def _write(self, jobs: list[Job], stage: str) -> list[Ints]:
        """Return the answer of every job, written shard by shard."""
        answers: list[Ints] = [np.zeros(0, np.int64)] * len(jobs)
        order = sorted(range(len(jobs)), key=lambda index: len(jobs[index].prompt))
        shards = _shards(order, [len(job.prompt) for job in jobs], self._options.jobs_per_shard)
        self._progress.start(f"writing {stage}", len(jobs))
        for number, chosen in enumerate(shards):
            path = self._folder / f"{stage}-{number:05d}.npz"
            if not path.is_file():
                self._write_shard(path, [jobs[index] for index in chosen], f"{stage} {number}")
            for index, answer in zip(chosen, _load_shard(path), strict=True):
                answers[index] = answer
            self._progress.advance(len(chosen))
        return answers

    def _write_shard(self, path: Path, jobs: list[Job], seed: str) -> None:
        began = time.perf_counter()
        decoder = decoder_for(self._target, jobs, self._options, self._stop, _seed(f"{self._options.seed} {seed}"))
        answers: list[Ints] = [np.zeros(0, np.int64)] * len(jobs)
        for answer in decoder.run(jobs):
            answers[answer.job] = np.array(answer.tokens)
        _save_shard(path, answers)
        total = sum(len(answer) for answer in answers)
        self._progress.report({"tokens": total, "tokens_per_s": total / (time.perf_counter() - began)})


def _short_questions(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts if prompt.text.endswith("?") and len(prompt.text) < 100]


def repeated(texts: Sequence[str], count: float) -> list[str]:
    """Return every text `count` times; a fraction falls on texts that their hash chooses."""
    return [text for turn in range(math.ceil(count)) for text in texts if _seed(text) < (count - turn) * 2**32]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device, without waiting for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def stop_tokens(target: Target) -> tuple[int, ...]:
    """Return the ids that end an answer."""
    folder = target.checkpoint.path
    return eos_ids(target.checkpoint, folder if folder.is_dir() else folder.parent)


def decoder_for(
    target: Target, jobs: Sequence[Job], options: DataOptions, stop: Sequence[int], seed: int
) -> BatchDecoder:
    """Return a decoder for some jobs, with as many rows as memory allows."""
    capacity = max(len(job.prompt) + job.max_new_tokens for job in jobs) + 32
    rows = min(options.rows, len(jobs), max(1, options.cache_bytes // (capacity * _slot_bytes(target))))
    return BatchDecoder(target, rows, capacity, stop, seed)


def _slot_bytes(target: Target) -> int:
    config = target.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * dim * target.dtype.itemsize)


def _corpus_folder(target: Target, options: DataOptions, cache: Path) -> Path:
    facts = {name: value for name, value in asdict(options).items() if name not in _NOT_WRITTEN}
    facts["files"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in options.files if path.is_file()]
    facts["target"] = target.checkpoint.fingerprint
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / f"corpus-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _corpus(jobs: Sequence[Job], answers: Sequence[Ints]) -> Corpus:
    pairs = [(job, answer) for job, answer in zip(jobs, answers, strict=True) if len(answer) > 1]
    lengths = [len(job.prompt) + len(answer) for job, answer in pairs]
    tokens = np.concatenate([part for job, answer in pairs for part in (np.array(job.prompt), answer)]).astype(
        np.uint32
    )
    return Corpus(tokens, np.cumsum([0, *lengths]), np.array([len(job.prompt) for job, _ in pairs]))


def _shards(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Yield runs of jobs by rising prompt length, at most `most` in each.

    A run ends where a prompt's length passes a power of two, since its longest decides how many rows decode at once.
    """
    start = 0
    for stop in range(1, len(order) + 1):
        if (
            stop == len(order)
            or stop - start == most
            or _size_class(lengths[order[stop]]) != _size_class(lengths[order[start]])
        ):
            yield order[start:stop]
            start = stop


def _size_class(length: int) -> int:
    return max(length, _SHORT_PROMPT).bit_length()


def _save_shard(path: Path, answers: Sequence[Ints]) -> None:
    partial = path.with_suffix(".partial.npz")
    tokens = np.concatenate(answers)
    np.savez_compressed(
        partial,
        tokens=_narrow(tokens),
        lengths=np.array([len(answer) for answer in answers]),
    )
    os.replace(partial, path)


def _narrow(tokens: NDArray[Any]) -> NDArray[Any]:
    return tokens.astype(np.min_scalar_type(int(tokens.max(initial=0))))


def _load_shard(path: Path) -> list[Ints]:
    with np.load(path) as stored:
        return list(np.split(stored["tokens"].astype(np.int64), np.cumsum(stored["lengths"])[:-1]))


def _groups(order: Ints, lengths: Ints, tokens_per_batch: int) -> Iterator[Ints]:
    start = 0
    while start < len(order):
        # Ascending lengths: the last text of a group decides how many fit.
        count = 1
        while start + count < len(order) and (count + 1) * lengths[order[start + count]] <= tokens_per_batch:
            count += 1
        yield order[start : start + count]
        start += count


def _batch(corpus: Corpus, texts: Ints) -> Batch:
    parts = [torch.from_numpy(corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]].astype(np.int64)) for i in texts]
    length = -(-max(len(part) for part in parts) // 32) * 32
    ids = torch.zeros(len(parts), length, dtype=torch.int64)
    learned = []
    for row, (part, text) in enumerate(zip(parts, texts, strict=True)):
        ids[row, : len(part)] = part
        learned.append(torch.arange(row * length + int(corpus.prompt_lengths[text]) - 1, row * length + len(part) - 1))
    return Batch(texts, ids, torch.cat(learned), tuple(len(part) for part in learned))


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
