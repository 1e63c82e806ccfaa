"""C++ against Python on one bundle: `python hosts/compare.py BUNDLE RESULT.json [--light BUNDLE]`.

Decodes the same prompts with both, interleaved; tokens are compared before any speed is told. With `--light`,
a bundle whose graphs cost next to nothing (`python -m tests.lookup FOLDER`), host work per round is measured
too. Build `hosts/cpp` with its tests first (`--programs` says where).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mirror
from hosts.toolchain import DEFAULT_FOLDER
from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import provenance
from mirror.runtime.text import TextCodec

MODES = ("plain", "serial", "mirror")
PROGRAMS = DEFAULT_FOLDER / "cpp" / "tests"


def run_cpp(
    programs: Path, bundle: Path, mode: str, threads: int, tokens: int, prompt: Sequence[int]
) -> dict[str, Any]:
    """Return what `mirror_speed` measured."""
    number = str(1 + MODES.index(mode))
    command = [str(programs / "mirror_speed"), str(bundle), number, str(threads), str(tokens), *map(str, prompt)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def run_python(bundle: Path, mode: str, threads: int, tokens: int, prompt: Sequence[int]) -> dict[str, Any]:
    """Return the same of this package, in a process of its own as C++ has one."""
    code = (
        "import json, sys, mirror\n"
        "bundle, mode, threads, tokens, *prompt = sys.argv[1:]\n"
        "with mirror.load(bundle, mode=mode, threads=int(threads)) as engine:\n"
        "    for _ in range(2):\n"
        "        result = engine.generate_tokens([int(t) for t in prompt], max_new_tokens=int(tokens))\n"
        "s = result.statistics\n"
        "print(json.dumps({'decode_tokens_per_s': s.decode_tokens_per_s, 'ttft_ms': 1e3 * s.ttft_s,\n"
        "    'round_ms': s.round_ms, 'host_ms': s.host_ms, 'tokens': list(result.tokens)}))\n"
    )
    command = [sys.executable, "-c", code, str(bundle), mode, str(threads), str(tokens), *map(str, prompt)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def compare(options: argparse.Namespace, prompts: Sequence[Sequence[int]], mode: str) -> Mapping[str, Any]:
    """Return both hosts' decode speeds in one mode, and the paired ratios."""
    cpp: list[dict[str, Any]] = []
    python: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        for prompt in prompts:
            cpp.append(run_cpp(options.programs, options.bundle, mode, options.threads, options.tokens, prompt))
            python.append(run_python(options.bundle, mode, options.threads, options.tokens, prompt))
            if cpp[-1]["tokens"] != python[-1]["tokens"]:
                raise SystemExit(f"error: the hosts' tokens differ in mode {mode}; nothing is compared")
    pairs = list(zip(cpp, python, strict=True))
    return {
        "cpp": summary(cpp),
        "python": summary(python),
        "cpp_to_python_decode_ratio": spread([a["decode_tokens_per_s"] / b["decode_tokens_per_s"] for a, b in pairs]),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the spread of every measured number."""
    names = ("decode_tokens_per_s", "ttft_ms", "round_ms", "host_ms")
    return {name: spread([run[name] for run in runs]) for name in names}


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
    parser.add_argument("--repeats", type=int, default=5)
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
        "repeats": options.repeats,
        "modes": {mode: compare(options, prompts, mode) for mode in MODES},
        "host_work": None if options.light is None else host_work(options.programs, options.light),
        "library_bytes_stripped": stripped_bytes(options.programs.parent / "libmirror.so"),
        **provenance("hosts.compare"),
    }
    options.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
