"""Compares engines on one machine: interleaved rounds over arms, one JSON result.

    python compare.py --root FOLDER --threads 1 2 --out RESULT.json

FOLDER is what ``setup.sh`` prepared. Needs only the standard library. For each
thread count every arm is started once, loads its model and stays; each round
then visits all arms in a new order, one at a time, with all prompts. Warm-up
rounds come first and are thrown away.

An arm is an external command that speaks one JSON object per line. Its stdout
carries nothing else; logs go to stderr, whose end is shown if the arm fails.

1. Once the model is loaded, the arm writes its ready line::

       {"ready": true, "load_s": 0.9, "model_bytes": 540328112,
        "versions": {"onnxruntime": "1.32.0"}}

   ``versions`` is required (it may be empty); ``load_s`` and ``model_bytes``,
   the size of the weight files, may be left out.
2. For each request line on stdin::

       {"id": "story", "prompt_ids": [1, 9690, ...], "max_new_tokens": 128}

   it generates greedily from an empty cache until ``max_new_tokens`` or an end
   token of the model, and writes one answer line::

       {"id": "story", "token_ids": [...], "ttft_s": 0.071,
        "decode_tokens_per_s": 49.8, "stats": {}}

   ``prompt_ids`` has the chat template applied. ``token_ids`` holds the new
   tokens only, with the end token if it was reached. ``ttft_s`` runs from the
   ids being handed over to the first token being in the caller's hands.
   ``decode_tokens_per_s`` is tokens after the first over time after the first
   token, null where there is only one token; several tokens may come at once.
   ``stats`` is free and may be left out. A request that fails ends the arm with
   a message on stderr and a non-zero exit; the whole comparison then stops.
3. When stdin ends, the arm exits with 0.

In an arm's command ``{root}``, ``{threads}``, ``{here}`` (this folder) and
``{python}`` (the interpreter running this file) are filled in. Add arms to
``ARMS``, or for one run with ``--arm 'NAME=COMMAND'``.

Text is compared before speed is shown: ``same text`` counts the prompts whose
tokens equal the reference arm's in every round, and ``stable`` says whether
all of an arm's rounds gave the same tokens. A speculative arm that changes
text differs from its own plain twin, not only from the reference.
"""

# ruff: noqa: T201 - a script prints its result

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import platform
import random
import select
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REFERENCE = "transformers-fp32"
LOG_LINES = 8


@dataclass(frozen=True)
class Arm:
    """An external command to measure; ``note`` says how it computes."""

    name: str
    command: tuple[str, ...]
    note: str = ""


def _rival(name: str, venv: str, model: str, *options: str, note: str = "") -> Arm:
    """Arm run by ``arms.py`` in a rival's own environment."""
    python = "{root}/venv/" + venv + "/bin/python"
    engine = "transformers" if venv == "weights" else venv
    run = (python, "{here}/arms.py", engine, "--model", "{root}/" + model)
    return Arm(name, (*run, "--threads", "{threads}", *options), note)


def _mirror(name: str, bundle: str, *options: str, note: str = "") -> Arm:
    """Mirror itself, on a bundle exported with the n-gram draft."""
    run = ("{python}", "-m", "mirror.bench.arm", "{root}/models/" + bundle)
    return Arm(name, (*run, "--threads", "{threads}", *options), note)


ARMS: tuple[Arm, ...] = (
    _rival(REFERENCE, "weights", "hf", note="float32 throughout"),
    _rival("genai-fp32", "genai", "models/genai-fp32", note="float32 throughout"),
    _rival("genai-int8", "genai", "models/genai-int8", note="int8 activations"),
    _rival("genai-int4", "genai", "models/genai-int4", note="int8 activations"),
    _rival("genai-fp32-ngram", "genai", "models/genai-fp32", "--lookup"),
    _rival("genai-int8-ngram", "genai", "models/genai-int8", "--lookup"),
    _rival("genai-int4-ngram", "genai", "models/genai-int4", "--lookup"),
    _rival("openvino-fp32", "openvino", "models/openvino-fp32", "--float32", note="f32 forced"),
    _rival("openvino-int8", "openvino", "models/openvino-int8", note="default precision hint"),
    _rival("openvino-int4", "openvino", "models/openvino-int4", note="default precision hint"),
    _rival("openvino-fp32-lookup", "openvino", "models/openvino-fp32", "--float32", "--lookup"),
    _rival("openvino-int8-lookup", "openvino", "models/openvino-int8", "--lookup"),
    _rival("openvino-int4-lookup", "openvino", "models/openvino-int4", "--lookup"),
    _rival("llamacpp-F32", "llamacpp", "models/llamacpp/F32.gguf", note="float16 cache"),
    _rival("llamacpp-Q8_0", "llamacpp", "models/llamacpp/Q8_0.gguf", note="float16 cache"),
    _rival("llamacpp-Q4_1", "llamacpp", "models/llamacpp/Q4_1.gguf", note="the given file"),
    _rival("llamacpp-Q4_0", "llamacpp", "models/llamacpp/Q4_0.gguf", note="float16 cache"),
    _rival("llamacpp-F32-lookup", "llamacpp", "models/llamacpp/F32.gguf", "--lookup"),
    _rival("llamacpp-Q4_0-lookup", "llamacpp", "models/llamacpp/Q4_0.gguf", "--lookup"),
    _mirror("mirror-fp32", "mirror-fp32", note="float32 throughout"),
    _mirror("mirror-int8", "mirror-int8", note="int8 activations"),
    _mirror("mirror-int4", "mirror-int4", note="int8 activations"),
    _mirror("mirror-fp32-ngram", "mirror-fp32", "--mode", "serial"),
    _mirror("mirror-int8-ngram", "mirror-int8", "--mode", "serial"),
    _mirror("mirror-int4-ngram", "mirror-int4", "--mode", "serial"),
)


@dataclass(frozen=True)
class Sample:
    """One answer of one arm; token ids are kept to compare texts."""

    arm: str
    threads: int
    round_index: int
    prompt: str
    token_ids: list[int]
    ttft_s: float
    decode_tokens_per_s: float | None
    stats: dict[str, Any]


class ArmError(Exception):
    """An arm broke the protocol, died or was too slow."""


class Process:
    """A started arm: its ready line, and one request at a time."""

    def __init__(self, arm: Arm, values: dict[str, str], timeout_s: float) -> None:
        self.arm = arm
        self.ready: dict[str, Any] = {}
        self._timeout_s = timeout_s
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed in close()
        self._child = subprocess.Popen(
            [part.format(**values) for part in arm.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._child.stdin is not None  # a pipe was asked for
        assert self._child.stdout is not None
        self._requests, self._answers = self._child.stdin, self._child.stdout

    def wait_ready(self) -> None:
        """Wait for the ready line."""
        self.ready = self._read("ready", True, {"versions"})

    def ask(self, prompt: dict[str, Any], max_new_tokens: int) -> dict[str, Any]:
        """The answer to one prompt."""
        request = {"id": prompt["name"], "prompt_ids": prompt["prompt_ids"]}
        line = json.dumps(request | {"max_new_tokens": max_new_tokens})
        with suppress(BrokenPipeError):  # reading tells better what became of the arm
            print(line, file=self._requests, flush=True)
        return self._read("id", prompt["name"], {"token_ids", "ttft_s", "decode_tokens_per_s"})

    def _read(self, key: str, expected: object, others: set[str]) -> dict[str, Any]:
        # One answer is under way at most, so nothing waits in the text buffer.
        readable, _, _ = select.select([self._answers], [], [], self._timeout_s)
        if not readable:
            raise self._error(f"no answer within {self._timeout_s:g} s")
        line = self._answers.readline()
        if not line:
            raise self._error(f"ended with exit status {self._child.wait()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._error(f"expected a JSON line, found {line!r}") from None
        if answer.get(key) != expected or others - answer.keys():
            wanted = ", ".join([f"{key}={expected!r}", *sorted(others)])
            raise self._error(f"expected {wanted}, found {line.strip()}")
        return answer

    def _error(self, found: str) -> ArmError:
        self._log.seek(0)
        last = self._log.read().splitlines()[-LOG_LINES:]
        return ArmError("\n  ".join([f"{self.arm.name}: {found}", *last]))

    def peak_memory_bytes(self) -> int | None:
        """Largest resident size so far, where the system tells."""
        try:
            status = Path(f"/proc/{self._child.pid}/status").read_text()
        except OSError:
            return None
        lines = (line.split() for line in status.splitlines())
        return next((int(words[1]) * 1024 for words in lines if words[0] == "VmHWM:"), None)

    def close(self) -> None:
        """End the input, give the arm a moment, then stop it."""
        with suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._log.close()


@contextmanager
def started(arm: Arm, values: dict[str, str], timeout_s: float) -> Iterator[Process]:
    """A loaded arm that is stopped at the end."""
    process = Process(arm, values, timeout_s)
    try:
        process.wait_ready()
        yield process
    finally:
        process.close()


def measure(
    processes: Sequence[Process],
    prompts: Sequence[dict[str, Any]],
    threads: int,
    options: argparse.Namespace,
) -> list[Sample]:
    """Samples of all measured rounds, warm-up left out."""
    samples: list[Sample] = []
    order = list(processes)
    shuffler = random.Random(options.seed)
    for round_index in range(-options.warmup, options.repeats):
        shuffler.shuffle(order)
        for process in order:
            answers = [process.ask(prompt, options.max_new_tokens) for prompt in prompts]
            if round_index >= 0:
                samples += [_sample(process.arm, threads, round_index, each) for each in answers]
        _say(f"threads {threads}: round {round_index + 1} of {options.repeats}")
    return samples


def _sample(arm: Arm, threads: int, round_index: int, answer: dict[str, Any]) -> Sample:
    return Sample(
        arm=arm.name,
        threads=threads,
        round_index=round_index,
        prompt=answer["id"],
        token_ids=answer["token_ids"],
        ttft_s=answer["ttft_s"],
        decode_tokens_per_s=answer["decode_tokens_per_s"],
        stats=answer.get("stats", {}),
    )


def run_threads(
    arms: Sequence[Arm],
    prompts: Sequence[dict[str, Any]],
    threads: int,
    options: argparse.Namespace,
) -> tuple[list[Sample], dict[str, Any]]:
    """Samples at one thread count, and what each arm said about itself."""
    values = {
        "root": str(options.root.resolve()),
        "threads": str(threads),
        "here": str(HERE),
        "python": sys.executable,
    }
    with ExitStack() as stack:
        processes = []
        for arm in arms:
            _say(f"threads {threads}: loading {arm.name}")
            processes.append(stack.enter_context(started(arm, values, options.timeout_s)))
        samples = measure(processes, prompts, threads, options)
        about = {each.arm.name: each.ready | {"peak_memory_bytes": each.peak_memory_bytes()} for each in processes}
    return samples, about


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile (interpolated between samples)."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p10", "p90"), values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[8]}


def later_tokens(sample: Sample) -> int:
    """Tokens after the first: the one place where tokens are counted."""
    return len(sample.token_ids) - 1


def decode_rate(samples: Sequence[Sample]) -> float | None:
    """Tokens per second over several prompts: all later tokens over all their time."""
    tokens, seconds = 0, 0.0
    for each in samples:
        if each.decode_tokens_per_s:
            tokens += later_tokens(each)
            seconds += later_tokens(each) / each.decode_tokens_per_s
    return tokens / seconds if tokens else None


def summarise(samples: Sequence[Sample], arms: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """One row per thread count and arm, in the order of ``arms``; spreads are over rounds."""
    keys = sorted({(each.threads, arms.index(each.arm), each.arm) for each in samples})
    # The reference's text comes from its own first round at the lowest thread count.
    expected: dict[str, list[int]] = {}
    for each in samples:
        if each.arm == reference:
            expected.setdefault(each.prompt, each.token_ids)
    rows = []
    for threads, _, arm in keys:
        own = [each for each in samples if (each.threads, each.arm) == (threads, arm)]
        rows.append({"arm": arm, "threads": threads, **_row(own, expected)})
    return rows


def _row(samples: Sequence[Sample], expected: dict[str, list[int]]) -> dict[str, Any]:
    """Figures of one arm at one thread count."""
    by_round: dict[int, list[Sample]] = {}
    by_prompt: dict[str, list[Sample]] = {}
    for each in samples:
        by_round.setdefault(each.round_index, []).append(each)
        by_prompt.setdefault(each.prompt, []).append(each)
    rates = [rate for group in by_round.values() if (rate := decode_rate(group)) is not None]
    ttfts = [statistics.mean(each.ttft_s for each in group) for group in by_round.values()]
    return {
        "decode_tokens_per_s": spread(rates) if rates else None,
        "ttft_s": spread(ttfts),
        "stable": all(_one_text(group) for group in by_prompt.values()),
        "prompts": {name: _prompt_row(group, expected) for name, group in by_prompt.items()},
    }


def _one_text(samples: Sequence[Sample]) -> bool:
    return all(each.token_ids == samples[0].token_ids for each in samples)


def _prompt_row(samples: Sequence[Sample], expected: dict[str, list[int]]) -> dict[str, Any]:
    """One prompt: speed, length, and where its text leaves the reference (None: nowhere)."""
    rates = [each.decode_tokens_per_s for each in samples if each.decode_tokens_per_s]
    reference = expected.get(samples[0].prompt)
    row: dict[str, Any] = {
        "decode_tokens_per_s": spread(rates) if rates else None,
        "new_tokens": later_tokens(samples[0]) + 1,
    }
    if reference is not None:
        places = [first_difference(each.token_ids, reference) for each in samples]
        differing = [place for place in places if place is not None]
        row["first_difference"] = min(differing, default=None)
    return row


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None for equal texts."""
    if list(ours) == list(theirs):
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    shorter = min(len(ours), len(theirs))
    return next((index for index, (our, their) in pairs if our != their), shorter)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown table of the rows: text first, then speed."""
    heads = ("arm", "threads", "same text", "stable", "tokens/s (p10-p90)", "TTFT ms (p10-p90)")
    cells = [_cells(row) for row in rows]
    lines = [heads, ("---", "--:", "--:", "---", "--:", "--:"), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    places = [each.get("first_difference", "?") for each in row["prompts"].values()]
    same = "?" if "?" in places else f"{places.count(None)} of {len(places)}"
    rate, ttft = row["decode_tokens_per_s"], row["ttft_s"]
    speed = f"{rate['median']:.1f} ({rate['p10']:.1f}-{rate['p90']:.1f})" if rate else "-"
    milliseconds = {name: value * 1000 for name, value in ttft.items()}
    wait = "{median:.0f} ({p10:.0f}-{p90:.0f})".format(**milliseconds)
    return row["arm"], str(row["threads"]), same, "yes" if row["stable"] else "no", speed, wait


def machine() -> dict[str, Any]:
    """Machine, CPU and system of this run."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_flags": _cpu_flags(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def _cpu_information() -> dict[str, str]:
    """First processor's lines of the system's CPU file, empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_name() -> str:
    return _cpu_information().get("model name") or platform.processor()


def _cpu_flags() -> list[str]:
    """The flags that decide which matmul kernels an engine picks."""
    wanted = ("avx2", "fma", "avx512", "amx", "avx_vnni")
    flags = _cpu_information().get("flags", "").split()
    return [flag for flag in flags if flag.startswith(wanted)]


def commit() -> str | None:
    """Commit of the checkout that holds this file, if it is one."""
    command = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def select_arms(options: argparse.Namespace) -> list[Arm]:
    """Arms of the table that match ``--arms``, then those of ``--arm``."""
    chosen = [a for a in ARMS if any(fnmatch.fnmatch(a.name, p) for p in options.arms)]
    for text in options.arm:
        name, found, command = text.partition("=")
        if not found:
            raise SystemExit(f"--arm {text!r}: expected NAME=COMMAND")
        chosen.append(Arm(name, tuple(shlex.split(command)), "from the command line"))
    if not chosen:
        names = ", ".join(arm.name for arm in ARMS)
        raise SystemExit(f"no arm matches {' '.join(options.arms)}; there are {names}")
    return chosen


def select_prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The tokenised prompts, all or the first ``--prompts``."""
    path = options.root / "prompts.json"
    if not path.exists():
        raise SystemExit(f"{path} not found; run setup.sh {options.root} first")
    return json.loads(path.read_text())[: options.prompts]


def parse_arguments() -> argparse.Namespace:
    """The run's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder that setup.sh prepared")
    parser.add_argument("--out", type=Path, required=True, help="JSON result to write")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--arms", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--reference", default=REFERENCE, help="arm whose text is compared with")
    parser.add_argument("--prompts", type=int, help="use only the first so many")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=1, help="rounds thrown away")
    parser.add_argument("--repeats", type=int, default=5, help="rounds measured")
    parser.add_argument("--timeout-s", type=float, default=300, help="per answer")
    parser.add_argument("--seed", type=int, default=0, help="of the order of arms")
    return parser.parse_args()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result, ready to be written."""
    arms, prompts = select_arms(options), select_prompts(options)
    load_before, start_s = os.getloadavg(), time.time()
    samples: list[Sample] = []
    about: dict[str, Any] = {}
    for threads in sorted(options.threads):
        more, about[str(threads)] = run_threads(arms, prompts, threads, options)
        samples += more
    return {
        "benchmark": "rivals",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start_s)),
        "duration_s": time.time() - start_s,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "machine": machine() | {"load_before": load_before, "load_after": os.getloadavg()},
        "options": {name: _plain(value) for name, value in vars(options).items()},
        "arms": [asdict(arm) for arm in arms],
        "about": about,
        "summary": summarise(samples, [arm.name for arm in arms], options.reference),
        "samples": [asdict(sample) for sample in samples],
    }


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    """Run, write the result, print the table."""
    options = parse_arguments()
    try:
        result = run(options)
    except ArmError as error:
        raise SystemExit(f"error: {error}") from None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(format_table(result["summary"]))
    print(f"\nresult: {options.out}")


if __name__ == "__main__":
    main()
