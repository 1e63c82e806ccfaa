"""The public face: a loaded bundle that answers prompts.

Opens devices by name, keeps one answer at a time, and puts text in front of tokens. Tokens are made
in `generation`; text is made in `text`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as ListLike
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mirror.bundle import Manifest, check_files, read_manifest
from mirror.errors import BusyError, RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.generation import Generation
from mirror.runtime.loading import Placement, Plan, load_draft, load_target, make_plan, memory_needs, round_shape
from mirror.runtime.memory import check_room
from mirror.runtime.options import EngineOptions, GenerationOptions
from mirror.runtime.records import Event, FinishReason, Ints, Lane, Mode
from mirror.runtime.result import Answer, Result, Stream, Streamer
from mirror.runtime.sampling import ChooseRow, Sampler, SamplingParams, coupled
from mirror.runtime.sequence import Sequence
from mirror.runtime.statistics import PromptFacts, summarise
from mirror.runtime.stopping import Stopping
from mirror.runtime.target import Target
from mirror.runtime.text import TextCodec, TextStream
from mirror.runtime.worker import DraftSeat
from mirror.targets.base import Device, FreeMemory, share_cpu

__all__ = ["Conversation", "Engine", "Result", "Stream", "load"]

Messages = ListLike[Mapping[str, str]]


class Engine:
    """A loaded bundle. Answers one prompt at a time; use as a context manager, or call `close`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        options: EngineOptions,
        target_device: Device,
        draft_device: Device,
        *,
        suffix_device: Device | None = None,
        free_memory: Callable[[str], FreeMemory] | None = None,
    ) -> None:
        """Load a bundle on its devices; most callers want `mirror.load`.

        Args:
            suffix_device: where the target's suffix runs; None means on the target's device.
            free_memory: tells what a device has left, to refuse what won't fit; None asks nobody.
        """
        self.manifest = manifest
        places = Placement(target_device, suffix_device or target_device, draft_device)
        targets = list(dict.fromkeys((places.target.name, places.suffix.name)))
        self.plan: Plan = make_plan(manifest, options, shared_cpu=share_cpu(targets, draft_device.name))
        if free_memory is not None:
            check_room(memory_needs(folder, manifest, places, self.plan), free_memory)
        self._folder = folder
        self._codec: TextCodec | None = None
        self._devices = {Lane.TARGET: " and ".join(targets), Lane.DRAFT: draft_device.name}
        self._target: Target | None = load_target(folder, manifest, places.target, self.plan, places.suffix)
        self._seat: DraftSeat | None = None
        if self.plan.mode is not Mode.PLAIN:
            draft = load_draft(folder, manifest, draft_device, self.plan)
            self._seat = DraftSeat(draft, options.draft_timeout_s)
        self._sequence = Sequence(self.plan.max_length)
        self._busy = threading.Lock()
        self._cancel = threading.Event()
        self._active: Answer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let sessions, caches and the draft's thread go. A closed engine answers nothing."""
        self.cancel()
        active = self._active
        if active is not None and active.commits is not None:
            # Paused between two pieces: nobody would free the engine. Busy on another thread: it
            # sees the cancellation.
            with contextlib.suppress(ValueError):
                active.commits.close()
        with self._busy:
            if self._seat is not None:
                self._seat.close()
            self._seat = self._target = None

    def cancel(self) -> None:
        """Stop the answer being made, from any thread, after its current round; no-op when idle."""
        self._cancel.set()

    def generate(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: ListLike[str] = (),
        mode: str | Mode | None = None,
        num_assistant_tokens: int | None = None,
        streamer: Streamer | None = None,
        apply_chat_template: bool = True,
    ) -> Result:
        """Answer a prompt: a text, or messages with `role` and `content`.

        Args:
            max_new_tokens: the most tokens of the answer.
            temperature: 0 is greedy. The other sampling arguments: see `SamplingParams`.
            stop: strings that end the text and are left out of it.
            mode: `plain`, `serial` or `mirror`; None takes the one given at loading.
            num_assistant_tokens: the most draft tokens of a round; None, like any number above it, means gamma.
            streamer: gets each piece of text as its tokens are committed: a callable, whose True
                stops the answer, or an object with `write` and `end`.
            apply_chat_template: whether a text is put into the model's chat format.

        Raises:
            RequestError: arguments that contradict themselves or the bundle.
            CapacityError: the prompt doesn't fit the cache.
            BusyError: another answer is being made.
            DeviceError: the target's device failed.
        """
        sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = GenerationOptions(max_new_tokens, sampling, _stops(stop), _mode(mode), num_assistant_tokens)
        return self._say(self._text_codec().encode_prompt(prompt, apply_chat_template), options, streamer, reuse=False)

    def stream(
        self,
        prompt: str | Messages,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: ListLike[str] = (),
        mode: str | Mode | None = None,
        num_assistant_tokens: int | None = None,
        apply_chat_template: bool = True,
    ) -> Stream[str]:
        """Answer a prompt piece by piece; arguments and errors as in `generate`.

        The answer begins with the first `next`, which is also when `BusyError` is raised.
        """
        sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = GenerationOptions(max_new_tokens, sampling, _stops(stop), _mode(mode), num_assistant_tokens)
        tokens = self._text_codec().encode_prompt(prompt, apply_chat_template)
        answer = self._answer(options, text=True)
        return Stream(self._texts(tokens, options, answer, reuse=False), answer)

    def generate_tokens(
        self,
        tokens: ListLike[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: ListLike[str] = (),
        mode: str | Mode | None = None,
        num_assistant_tokens: int | None = None,
    ) -> Result:
        """Continue tokens; arguments and errors as in `generate`. Works without a tokenizer."""
        stream = self.stream_tokens(
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            mode=mode,
            num_assistant_tokens=num_assistant_tokens,
        )
        for _ in stream:
            pass
        return _finished(stream.result)

    def stream_tokens(
        self,
        tokens: ListLike[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: ListLike[str] = (),
        mode: str | Mode | None = None,
        num_assistant_tokens: int | None = None,
    ) -> Stream[tuple[int, ...]]:
        """Continue tokens, one tuple per commit; arguments and errors as in `stream`."""
        sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = GenerationOptions(max_new_tokens, sampling, _stops(stop), _mode(mode), num_assistant_tokens)
        answer = self._answer(options, text=bool(options.stop))
        return Stream(self._commits(tokens, options, answer, reuse=False), answer)

    def conversation(self, messages: Messages = ()) -> Conversation:
        """Return a conversation that keeps the cache between its turns.

        Args:
            messages: what was said before, such as a system message.
        """
        return Conversation(self, messages)

    # From here on: how an answer is made.

    def _text_codec(self) -> TextCodec:
        if self._codec is None:
            if not (self._folder / "tokenizer.json").is_file():
                raise RequestError(
                    f"{self._folder} has no tokenizer.json, so it takes no text; use generate_tokens, "
                    "or export it again from a checkpoint with a tokenizer"
                )
            self._codec = TextCodec.load(self._folder)
        return self._codec

    def _answer(self, options: GenerationOptions, *, text: bool) -> Answer:
        return Answer(TextStream(self._text_codec(), options.stop) if text else None)

    def _say(
        self, tokens: ListLike[int], options: GenerationOptions, streamer: Streamer | None, *, reuse: bool
    ) -> Result:
        answer = self._answer(options, text=True)
        pieces = self._texts(tokens, options, answer, reuse=reuse)
        write, end = _as_sink(streamer)
        try:
            for piece in pieces:
                if write(piece):
                    break
        finally:
            # Also after an interrupt: the engine must be free again when this returns.
            pieces.close()
            end()
        return _finished(answer.result)

    def _texts(
        self, tokens: ListLike[int], options: GenerationOptions, answer: Answer, *, reuse: bool
    ) -> Generator[str, None, None]:
        """Yield the text of an answer as it settles; what was held back comes last."""
        commits, shown = self._commits(tokens, options, answer, reuse=reuse), 0
        try:
            for _ in commits:
                if piece := answer.take_text():
                    shown += len(piece)
                    yield piece
        finally:
            commits.close()
        if rest := (_finished(answer.result).text or "")[shown:]:
            yield rest

    def _commits(
        self, tokens: ListLike[int], options: GenerationOptions, answer: Answer, *, reuse: bool
    ) -> Generator[tuple[int, ...], None, None]:
        """Return the iterator over what each round commits, known to `answer` so that `close` can end it."""
        answer.commits = self._run(tokens, options, answer, reuse=reuse)
        return answer.commits

    def _run(
        self, tokens: ListLike[int], options: GenerationOptions, answer: Answer, *, reuse: bool
    ) -> Generator[tuple[int, ...], None, None]:
        """Yield what each round commits and leave the result in `answer`, however this ends."""
        started_s = time.perf_counter()
        prompt = self._checked(tokens)
        if not self._busy.acquire(blocking=False):
            raise BusyError("this engine is already making an answer; wait for it, cancel it, or load a second engine")
        try:
            self._cancel.clear()
            self._active = answer
            reused = self._sequence.begin(prompt, reuse=reuse)
            generation = self._generation(prompt, options, answer)
            first_s: float | None = None
            try:
                for committed in generation.run():
                    first_s = first_s or time.perf_counter()
                    answer.tokens.extend(committed)
                    yield committed
            finally:
                facts = PromptFacts(
                    prompt.size,
                    reused,
                    generation.prefill_passes,
                    None if first_s is None else first_s - started_s,
                    len(answer.tokens) - sum(item.committed for item in generation.rounds),
                )
                answer.result = self._result(generation, answer, facts)
        finally:
            self._active = None
            self._busy.release()

    def _checked(self, tokens: ListLike[int]) -> Ints:
        prompt = np.asarray(tokens, np.int64)
        vocab_size = self.manifest.model.vocab_size
        if prompt.ndim != 1 or prompt.size == 0:
            raise RequestError("the prompt has no tokens; give at least one")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise RequestError(
                f"the prompt holds token {int(prompt.max() if prompt.max() >= vocab_size else prompt.min())}; "
                f"this model's tokens are 0 to {vocab_size - 1}"
            )
        return prompt

    def _generation(self, prompt: Ints, options: GenerationOptions, answer: Answer) -> Generation:
        if self._target is None:
            raise RequestError("this engine is closed; load the bundle again")
        mode = options.mode or self.plan.mode
        if mode is not Mode.PLAIN and self._seat is None:
            raise RequestError(
                f"mode {mode.value} needs the draft, and the bundle was loaded in mode plain, without it; "
                "load it in mode serial or mirror"
            )
        seat, events = self._seat, []
        if mode is not Mode.PLAIN and seat is not None and seat.lost is not None:
            mode = Mode.PLAIN
            events.append(Event("draft_lost", seat.lost))
        generation = Generation(
            self._target,
            None if seat is not None and seat.lost is not None else seat,
            self._sequence,
            Sampler(options.sampling, self.manifest.model.vocab_size, prompt, chooser_for(options.sampling)),
            Stopping(
                self.manifest.tokens.eos, options.max_new_tokens, answer.watch if answer.text is not None else None
            ),
            mode=mode,
            shape=round_shape(self.manifest, self.plan, options.num_assistant_tokens),
            cancelled=self._cancel.is_set,
            noise=coupled(options.sampling),
        )
        generation.events.extend(events)
        return generation

    def _result(self, generation: Generation, answer: Answer, facts: PromptFacts) -> Result:
        if answer.text is not None:
            answer.text.finish()
        return Result(
            tokens=tuple(answer.tokens),
            text=None if answer.text is None else answer.text.text,
            # An answer whose iterator was closed, or that an error ended, was cut short.
            finish_reason=generation.finish_reason or FinishReason.CANCELLED,
            prompt_tokens=facts.tokens,
            statistics=summarise(facts, generation.rounds),
            events=tuple(generation.events),
            rounds=tuple(generation.rounds),
            prefill_spans=generation.prefill_spans,
            devices=self._devices,
        )


class Conversation:
    """Turns of user and assistant over one cache: each turn runs only what is new.

    Attributes:
        messages: what was said so far.
    """

    def __init__(self, engine: Engine, messages: Messages) -> None:
        self._engine = engine
        self.messages: list[dict[str, str]] = [dict(message) for message in messages]

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: ListLike[str] = (),
        mode: str | Mode | None = None,
        num_assistant_tokens: int | None = None,
        streamer: Streamer | None = None,
    ) -> Result:
        """Say something and return the answer; arguments and errors as in `Engine.generate`.

        A turn that raises leaves the conversation as it was; one that is cancelled stays in it.
        """
        sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        options = GenerationOptions(max_new_tokens, sampling, _stops(stop), _mode(mode), num_assistant_tokens)
        turn = [*self.messages, {"role": "user", "content": text}]
        tokens = self._engine._text_codec().encode_prompt(turn, True)
        result = self._engine._say(tokens, options, streamer, reuse=True)
        self.messages = [*turn, {"role": "assistant", "content": result.text or ""}]
        return result


def load(
    bundle: str | Path,
    *,
    mode: str | Mode | None = None,
    target_device: str | None = None,
    suffix_device: str | None = None,
    draft_device: str | None = None,
    threads: int | None = None,
    max_length: int | None = None,
    gamma: int | None = None,
    kappa: int | None = None,
    fanout: ListLike[int] | None = None,
    tokens_per_pass: ListLike[int] | None = None,
    branches_per_pass: ListLike[int] | None = None,
    proposal_tokens_per_pass: ListLike[int] | None = None,
    draft_context: int | None = None,
    candidates: str | CandidateSource | None = None,
    pinned: bool = False,
    draft_timeout_s: float = 30.0,
    max_ngram_size: int = 3,
    verify_hashes: bool = False,
) -> Engine:
    """Load a bundle.

    Args:
        bundle: its folder.
        mode: `plain`, `serial` or `mirror`; None takes the bundle's setting, else mirror. In `plain` the draft
            isn't loaded.
        target_device: where the target runs: `cpu`, `cuda:0`, `openvino:GPU`...; None takes the bundle's
            setting, else `cpu`.
        suffix_device: where the target's layers past the exit run, if not there; None takes the bundle's setting
            where that for the target holds too, else the target's device.
        draft_device: where the draft runs; None takes the bundle's setting, else `cpu`. `cuda:0:0.25` is a quarter of
            a GPU's multiprocessors, for a draft that disturbs a target beside it less.
        threads: CPU threads in all; None takes one per physical core.
        max_length: tokens a context may have; None takes the bundle's.
        gamma: draft tokens of a window; None takes the bundle's.
        kappa: branches that leave after each window position; None takes the bundle's.
        fanout: the same per position, gamma + 1 counts; overrides kappa.
        tokens_per_pass: tokens that each of a rollout's passes gives a branch, at most 1 + the draft's streams;
            the last number repeats. None takes the bundle's setting, else 1.
        branches_per_pass: branches that take part in each of those passes at most, the likeliest; the last number
            repeats. None takes the bundle's setting, else all.
        proposal_tokens_per_pass: as `tokens_per_pass`, for proposals that the target waits for. None takes the
            bundle's setting, else `tokens_per_pass`.
        draft_context: tokens of a context's end that the draft reads at most, 2 or more: fewer make its passes cheaper,
            and drafts trained on short texts guess better. None takes the bundle's setting, else all.
        candidates: where the branches' first tokens come from: `exit`, `draft` or `both`; None takes the bundle's
            setting, else the draft's, with n-grams both.
        pinned: run every target pass after prefill at width gamma + 1, plain ones too, so that the
            text is the same in every mode at any precision.
        draft_timeout_s: how long to wait for the draft before going on without it.
        max_ngram_size: the most tokens that an n-gram draft looks up at once.
        verify_hashes: check the sha256 of every file; sizes are always checked.

    Raises:
        BundleError: a file is missing, truncated or edited.
        DeviceError: a device isn't there, can't take a segment, or has too little memory.
        RequestError: arguments that contradict themselves or the bundle.
    """
    options = EngineOptions(
        mode=_mode(mode),
        threads=threads,
        max_length=max_length,
        gamma=gamma,
        kappa=kappa,
        fanout=_counts(fanout),
        tokens_per_pass=_counts(tokens_per_pass),
        branches_per_pass=_counts(branches_per_pass),
        proposal_tokens_per_pass=_counts(proposal_tokens_per_pass),
        draft_context=draft_context,
        candidates=None if candidates is None else _source(candidates),
        pinned=pinned,
        draft_timeout_s=draft_timeout_s,
        max_ngram_size=max_ngram_size,
    )
    folder = Path(bundle)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=verify_hashes)
    # Here, so that whoever brings their own devices needs none of the others' libraries.
    from mirror.targets import free_memory, open_device

    target, suffix, draft = manifest.settings.devices(target_device, suffix_device, draft_device)
    return Engine(
        folder,
        manifest,
        options,
        open_device(target),
        open_device(draft, background=True),
        suffix_device=None if suffix is None else open_device(suffix),
        free_memory=free_memory,
    )


def _mode(mode: str | Mode | None) -> Mode | None:
    if mode is None or isinstance(mode, Mode):
        return mode
    try:
        return Mode(mode)
    except ValueError:
        raise RequestError(f"mode is {mode!r}; it must be one of {', '.join(item.value for item in Mode)}") from None


def _counts(counts: ListLike[int] | None) -> tuple[int, ...] | None:
    return None if counts is None else tuple(counts)


def _source(source: str | CandidateSource) -> CandidateSource:
    try:
        return CandidateSource(source)
    except ValueError:
        known = ", ".join(item.value for item in CandidateSource)
        raise RequestError(f"candidates is {source!r}; it must be one of {known}") from None


def _stops(stop: ListLike[str]) -> tuple[str, ...]:
    if isinstance(stop, str):
        raise RequestError(f"stop is the string {stop!r}; pass a list of strings")
    return tuple(stop)


def chooser_for(params: SamplingParams) -> ChooseRow | None:
    """Return what draws an answer's tokens in numpy's place; None where it is greedy, or there is no such library."""
    if params.temperature == 0.0:
        return None
    from mirror.targets import row_chooser

    return row_chooser(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
    )


def _as_sink(streamer: Streamer | None) -> tuple[Callable[[str], bool | None], Callable[[], None]]:
    if streamer is None:
        return (lambda text: None), (lambda: None)
    if callable(streamer):
        return streamer, (lambda: None)
    return streamer.write, streamer.end


def _finished(result: Result | None) -> Result:
    assert result is not None, "an answer that ended has a result"
    return result
