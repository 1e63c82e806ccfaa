"""C++ against Python on one bundle: `python -m hosts.compare BUNDLE RESULT.json [--light BUNDLE]`.

Each host loads the bundle in a process of its own; then both answer the same prompts in turn, so that a pair of
answers is seconds apart. Tokens are compared before any speed is told. Where a process's weights lie in memory
moves its speed by some percent, so the processes are started anew several times (`--loads`): the result is the
median over loads of each load's median ratio, with a bootstrap interval over loads. Loads during which other
processes used more of the machine than `--others` allows are left out, and counted. With `--light`, a bundle
whose graphs cost next to nothing (`python -m tests.lookup FOLDER`), host work per round is measured too. Build
`hosts/cpp` with its tests first (`--programs` says where).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mirror
from hosts.answering import MODES, PYTHON, Host, mode_number
from hosts.toolchain import DEFAULT_FOLDER
from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import provenance
from mirror.bundle import read_manifest
from mirror.runtime.text import TextCodec

PROGRAMS = DEFAULT_FOLDER / "cpp" / "tests"
FIELDS = ("decode_tokens_per_s", "ttft_ms", "round_ms", "host_ms")
RESAMPLES = 2000
LOOK_S = 1.0  # how long a quiet moment is
Pairs = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def compare(options: argparse.Namespace, prompts: Sequence[Sequence[int]], mode: str) -> Mapping[str, Any]:
    """Return both hosts' decode speeds in one mode, and their paired ratios."""
    loads, shares, left_out = quiet_loads(options, prompts, mode)
    ratios = [statistics.median(ratio(*pair) for pair in pairs) for pairs in loads]
    flat = [pair for pairs in loads for pair in pairs]
    return {
        "cpp": summary([cpp for cpp, _ in flat]),
        "python": summary([python for _, python in flat]),
        "cpp_to_python_decode_ratio": {
            "median_of_loads": round(statistics.median(ratios), 4),
            "interval_95": interval(ratios),
            "loads": [round(value, 4) for value in ratios],
            "pairs": spread([ratio(*pair) for pair in flat]),
        },
        "others_share_of_cpu": [round(share, 3) for share in shares],
        "loads_left_out": left_out,
    }


def quiet_loads(
    options: argparse.Namespace, prompts: Sequence[Sequence[int]], mode: str
) -> tuple[list[Pairs], list[float], int]:
    """Return the pairs of quiet loads, the share of all cores that others took in each, and how many were not quiet."""
    loads: list[Pairs] = []
    shares: list[float] = []
    left_out, deadline = 0, time.monotonic() + options.patience_s
    while len(loads) < options.loads and (time.monotonic() < deadline or not loads):
        wait_for_quiet(options.others, deadline)
        before = (time.monotonic(), busy_s(), own_s())
        pairs = pairs_of_load(options, prompts, mode, len(loads))
        elapsed, busy, own = (b - a for a, b in zip(before, (time.monotonic(), busy_s(), own_s()), strict=True))
        share = max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))
        if share <= options.others or time.monotonic() >= deadline:
            loads.append(pairs)
            shares.append(share)
        else:
            left_out += 1
    return loads, shares, left_out


def wait_for_quiet(most: float, deadline: float) -> None:
    """Wait until the cores have been quiet for a moment, or patience ends."""
    while time.monotonic() < deadline:
        before = busy_s()
        time.sleep(LOOK_S)
        if busy_s() - before <= most * LOOK_S * (os.cpu_count() or 1):
            return
        time.sleep(LOOK_S)


def busy_s() -> float:
    """Return the seconds that all cores together have worked since the machine started; Linux alone tells."""
    user, nice, system, _, _, interrupts, soft, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """Return the seconds that this process and its ended children have worked."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pairs_of_load(options: argparse.Namespace, prompts: Sequence[Sequence[int]], mode: str, number: int) -> Pairs:
    """Return pairs of answers, C++ and Python, of two processes that take turns in going first."""
    settings = {"mode": mode_number(mode), "threads": str(options.threads), "tokens": str(options.tokens)}
    programs = ([str(options.programs / "mirror_speed")], PYTHON)
    pairs = []
    with contextlib.ExitStack() as stack:
        order = (0, 1) if number % 2 else (1, 0)
        hosts = {place: stack.enter_context(Host(programs[place], options.bundle, settings)) for place in order}
        for place in order:
            hosts[place].answer(prompts[0])  # warms up
        for repeat in range(options.repeats):
            prompt = prompts[repeat % len(prompts)]
            found = {place: hosts[place].answer(prompt) for place in ((0, 1) if repeat % 2 else (1, 0))}
            if found[0]["tokens"] != found[1]["tokens"]:
                raise SystemExit(f"error: the hosts' tokens differ in mode {mode}; nothing is compared")
            pairs.append((found[0], found[1]))
    return pairs


def ratio(cpp: Mapping[str, Any], python: Mapping[str, Any]) -> float:
    """Return C++'s decode speed as a multiple of Python's."""
    return float(cpp["decode_tokens_per_s"] / python["decode_tokens_per_s"])


def interval(values: Sequence[float]) -> Sequence[float]:
    """Return the 95% bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [round(medians[RESAMPLES // 40], 4), round(medians[-1 - RESAMPLES // 40], 4)]


def summary(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the spread of every measured number."""
    return {name: spread([run[name] for run in runs]) for name in FIELDS}


def spread(values: Sequence[float]) -> Mapping[str, float]:
    """Return median, p10 and p90."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    p10, p90 = ordered[tenth], ordered[-1 - tenth]
    return {"p10": round(p10, 4), "median": round(statistics.median(ordered), 4), "p90": round(p90, 4)}


def host_work(programs: Path, bundle: Path) -> Mapping[str, Any]:
    """Return what `mirror_host_work` measured."""
    command = [str(programs / "mirror_host_work"), str(bundle), "300"]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def stripped_bytes(library: Path) -> int:
    """Return the size of a library without its symbols."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / library.name
        subprocess.run(["strip", "-o", str(copy), str(library)], check=True)
        return copy.stat().st_size


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--light", type=Path, help="a bundle for host work per round")
    parser.add_argument("--programs", type=Path, default=PROGRAMS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--loads", type=int, default=10, help="how often both processes are started")
    parser.add_argument("--repeats", type=int, default=4, help="pairs of answers per load")
    parser.add_argument("--others", type=float, default=1.0, help="the most of all cores that others may use in a load")
    parser.add_argument("--patience-s", type=float, default=600.0, help="per mode, until a busy machine must do")
    parser.add_argument("--mode", action="append", choices=MODES, help="one mode; again for more; all by default")
    parser.add_argument("--prompts", type=int, default=3)
    options = parser.parse_args()
    codec = TextCodec.load(options.bundle)
    prompts = [codec.encode_prompt(prompt.text, True) for prompt in load_prompts()[: options.prompts]]
    content = {
        "what": "C++ host against Python, greedy; the same tokens in every run",
        "mirror": mirror.__version__,
        "threads": options.threads,
        "tokens": options.tokens,
        "prompts": len(prompts),
        "loads": options.loads,
        "repeats": options.repeats,
        "precision": read_manifest(options.bundle).model.precision,
        "load_average": os.getloadavg(),
        "modes": {mode: compare(options, prompts, mode) for mode in options.mode or MODES},
        "host_work": None if options.light is None else host_work(options.programs, options.light),
        "library_bytes_stripped": stripped_bytes(options.programs.parent / "libmirror.so"),
        **provenance("hosts.compare"),
    }
    options.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
