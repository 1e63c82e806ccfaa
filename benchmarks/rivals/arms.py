"""Runs one rival engine as a benchmark arm: requests on stdin, answers on stdout.

    python arms.py ENGINE --model PATH --threads N [--lookup] [--float32]

One JSON object per line; the protocol is in ``compare.py``'s docstring. Each
engine is used as its own documentation shows, greedily, with the end tokens of
its own model folder. Every generation starts from an empty cache. The clock
starts when the prompt's ids are handed over and stops when the last token is
back in Python, so building a generator or a cache counts towards the first
token. Imports of an engine stay inside its class: each has its own environment.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

LLAMACPP_CONTEXT_TOKENS = 2048
LLAMACPP_ERROR_LEVEL = 4
# Each engine's own documented settings for lookup without a draft model.
GENAI_LOOKUP = {
    "ngram_size": 4,
    "max_draft_tokens": 8,
    "ngram_chained_lookup": True,
    "min_adaptive_k": 2,
    "cooldown": False,
}
OPENVINO_LOOKUP = {"num_assistant_tokens": 5, "max_ngram_size": 3}
LLAMACPP_LOOKUP = {"num_pred_tokens": 2}  # what its documentation advises on a CPU


@dataclass(frozen=True)
class Options:
    """What the command line chose for one arm."""

    model: Path
    threads: int
    lookup: bool
    float32: bool


@dataclass(frozen=True)
class Generation:
    """One answer.

    ``token_ids`` holds the new tokens only, with the end token if it was
    reached. ``decode_tokens_per_s`` is tokens after the first over the time
    after the first token, None where there is only one token.
    """

    token_ids: list[int]
    ttft_s: float
    decode_tokens_per_s: float | None
    stats: dict[str, Any]


class Engine(Protocol):
    """A loaded model."""

    distributions: tuple[str, ...]

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> Generation:
        """Generate greedily until an end token or ``max_new_tokens``."""


class Stopwatch:
    """Times one generation; ``token`` may be called for every token, only the first counts."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._first_s: float | None = None

    def token(self) -> None:
        """Note that a token is available."""
        if self._first_s is None:
            self._first_s = time.perf_counter()

    def finish(self, token_ids: list[int], stats: dict[str, Any] | None = None) -> Generation:
        """Stop the clock and return the answer.

        Raises:
            RuntimeError: if no token was noted.
        """
        end_s = time.perf_counter()
        if self._first_s is None:
            raise RuntimeError("the engine returned no token")
        later = len(token_ids) - 1
        rate = later / (end_s - self._first_s) if later > 0 else None
        return Generation(token_ids, self._first_s - self._start_s, rate, stats or {})


class Transformers:
    """Hugging Face transformers in float32: the reference text."""

    distributions: tuple[str, ...] = ("transformers", "torch")

    def __init__(self, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options.threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> Generation:
        """Generate with the library's own loop."""
        ids = self._torch.tensor([prompt_ids])  # [1, prompt]
        watch = Stopwatch()
        output = self._model.generate(
            ids,
            attention_mask=self._torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=_TransformersStreamer(watch),
        )
        return watch.finish(output[0, len(prompt_ids) :].tolist())


class _TransformersStreamer:
    """Notes tokens; transformers hands over the prompt first."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._prompt_seen = False

    def put(self, value: object) -> None:
        if self._prompt_seen:
            self._watch.token()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing to flush."""


class Genai:
    """onnxruntime-genai on the CPU execution provider."""

    distributions: tuple[str, ...] = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, options: Options) -> None:
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()
        config = onnxruntime_genai.Config(str(options.model))
        session = {"intra_op_num_threads": options.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._library = onnxruntime_genai
        self._model = onnxruntime_genai.Model(config)
        self._lookup = options.lookup

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> Generation:
        """Generate token by token, with a new generator."""
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt_ids) + max_new_tokens, do_sample=False)
        if self._lookup:
            params.set_speculative_options(**GENAI_LOOKUP)
        watch = Stopwatch()
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(prompt_ids)
        token_ids: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            token_ids.append(int(generator.get_next_tokens()[0]))
            watch.token()
        # Not get_sequence(): it leaves the end token out.
        return watch.finish(token_ids, self._stats(generator))

    def _stats(self, generator: Any) -> dict[str, Any]:
        if not self._lookup:
            return {}
        names = ("rounds", "draft_tokens_proposed", "draft_tokens_accepted", "acceptance_rate")
        stats = generator.get_speculative_stats()
        return {name: stats[name] for name in names}


class OpenVino:
    """OpenVINO GenAI on CPU; ``float32`` forces computation and cache to float32."""

    distributions: tuple[str, ...] = ("openvino-genai", "openvino")

    def __init__(self, options: Options) -> None:
        import openvino
        import openvino_genai

        # The pipeline's default scheduler keeps prompts between requests, which
        # would turn the repeats' time to first token into a cache look-up.
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": options.threads,
            "scheduler_config": scheduler,
        }
        if options.float32:
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        if options.lookup:
            settings["prompt_lookup"] = True
        self._tensor = openvino.Tensor
        self._streamer = _openvino_streamer(openvino_genai)
        self._pipeline = openvino_genai.LLMPipeline(str(options.model), "CPU", **settings)
        self._lookup = OPENVINO_LOOKUP if options.lookup else {}

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> Generation:
        """Generate in one call, with a streamer that notes the tokens' times."""
        import numpy

        config = self._pipeline.get_generation_config()
        config.max_new_tokens = max_new_tokens
        config.do_sample = False
        for name, value in self._lookup.items():
            setattr(config, name, value)
        ids = self._tensor(numpy.array([prompt_ids], dtype=numpy.int64))  # [1, prompt]
        watch = Stopwatch()
        result = self._pipeline.generate(ids, config, self._streamer(watch))
        return watch.finish(list(result.tokens[0]))


def _openvino_streamer(library: Any) -> Callable[[Stopwatch], Any]:
    """Class of a streamer that only notes tokens (its base exists after the import)."""

    class Streamer(library.StreamerBase):
        def __init__(self, watch: Stopwatch) -> None:
            super().__init__()
            self._watch = watch

        def write(self, token: int | list[int]) -> Any:
            self._watch.token()
            return library.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing to flush."""

    return Streamer


class LlamaCpp:
    """llama.cpp through its C interface, as its ``simple`` example uses it (float16 cache)."""

    distributions: tuple[str, ...] = ("llama-cpp-python",)

    def __init__(self, options: Options) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._log_callback = _quieten_llamacpp(llama_cpp)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(options.model).encode(), params)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = context.n_batch = LLAMACPP_CONTEXT_TOKENS
        context.n_threads = context.n_threads_batch = options.threads
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> Generation:
        """Generate token by token, after the cache was cleared."""
        token_ids: list[int] = []
        watch = Stopwatch()
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        step = prompt_ids
        while len(token_ids) < max_new_tokens:
            token_ids.append(self._next_token(step))
            watch.token()
            step = token_ids[-1:]
            if self._c.llama_vocab_is_eog(self._vocabulary, step[0]):
                break
        return watch.finish(token_ids)

    def _next_token(self, ids: list[int]) -> int:
        buffer = (self._c.llama_token * len(ids))(*ids)
        status = self._c.llama_decode(self._context, self._c.llama_batch_get_one(buffer, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(ids)} tokens")
        return self._c.llama_sampler_sample(self._sampler, self._context, -1)


def _quieten_llamacpp(library: Any) -> object:
    """Show errors only: by default every decoded token is logged in detail.

    Returns:
        The callback. C keeps no more than a pointer to it, so the caller must keep it.
    """

    @library.llama_log_callback
    def show(level: int, text: bytes, _: object) -> None:
        if level == LLAMACPP_ERROR_LEVEL:
            sys.stderr.write(text.decode(errors="replace"))

    library.llama_log_set(show, None)
    return show


class LlamaCppLookup:
    """llama-cpp-python's own prompt lookup, which runs in Python around llama.cpp."""

    distributions: tuple[str, ...] = ("llama-cpp-python",)

    def __init__(self, options: Options) -> None:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        self._log_callback = _quieten_llamacpp(llama_cpp)
        self._llama = llama_cpp.Llama(
            str(options.model),
            n_ctx=LLAMACPP_CONTEXT_TOKENS,
            n_batch=LLAMACPP_CONTEXT_TOKENS,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            draft_model=LlamaPromptLookupDecoding(**LLAMACPP_LOOKUP),
            verbose=False,
        )

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> Generation:
        """Generate with the package's own loop, after a reset."""
        token_ids: list[int] = []
        watch = Stopwatch()
        self._llama.reset()
        for token in self._llama.generate(prompt_ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            token_ids.append(token)
            watch.token()
            if token == self._llama.token_eos() or len(token_ids) == max_new_tokens:
                break
        return watch.finish(token_ids)


ENGINES: dict[str, Callable[[Options], Engine]] = {
    "transformers": Transformers,
    "genai": Genai,
    "openvino": OpenVino,
    "llamacpp": lambda options: (LlamaCppLookup if options.lookup else LlamaCpp)(options),
}
WITH_LOOKUP = ("genai", "openvino", "llamacpp")
WITH_FLOAT32 = ("openvino",)


def model_bytes(model: Path) -> int:
    """Size of the weights: the file itself, or the folder's weight files."""
    if model.is_file():
        return model.stat().st_size
    suffixes = {".bin", ".data", ".onnx", ".safetensors"}
    weights = (path for path in model.iterdir() if path.suffix in suffixes)
    return sum(path.stat().st_size for path in weights if "tokenizer" not in path.name)


def take_stdout() -> TextIO:
    """A private copy of stdout; whatever native code prints from now on goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def load(engine: str, options: Options) -> tuple[Engine, dict[str, Any]]:
    """The loaded engine and its ready line."""
    start_s = time.perf_counter()
    loaded = ENGINES[engine](options)
    ready = {
        "ready": True,
        "load_s": time.perf_counter() - start_s,
        "model_bytes": model_bytes(options.model),
        "versions": {name: importlib.metadata.version(name) for name in loaded.distributions},
    }
    return loaded, ready


def serve(engine: Engine, requests: TextIO, answers: TextIO) -> None:
    """Answer each request line until the input ends."""
    for line in requests:
        request = json.loads(line)
        generation = engine.generate(request["prompt_ids"], request["max_new_tokens"])
        print(json.dumps({"id": request["id"], **asdict(generation)}), file=answers)


def parse_arguments() -> tuple[str, Options]:
    """Engine name and options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=list(ENGINES))
    parser.add_argument("--model", type=Path, required=True, help="model folder, or a GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--lookup", action="store_true", help="n-gram speculation")
    parser.add_argument("--float32", action="store_true", help="compute in float32 (openvino)")
    arguments = parser.parse_args()
    if arguments.lookup and arguments.engine not in WITH_LOOKUP:
        parser.error(f"--lookup works with {', '.join(WITH_LOOKUP)}, not {arguments.engine}")
    if arguments.float32 and arguments.engine not in WITH_FLOAT32:
        parser.error(f"--float32 works with {', '.join(WITH_FLOAT32)}, not {arguments.engine}")
    if not arguments.model.exists():
        parser.error(f"model {arguments.model} not found; setup.sh prepares it")
    chosen = (arguments.model, arguments.threads, arguments.lookup, arguments.float32)
    return arguments.engine, Options(*chosen)


def main() -> None:
    """Load the engine, say so, and serve."""
    engine_name, options = parse_arguments()
    answers = take_stdout()
    engine, ready = load(engine_name, options)
    print(json.dumps(ready), file=answers)
    serve(engine, sys.stdin, answers)


if __name__ == "__main__":
    main()
