"""C++ against Python on other devices: `python -m hosts.devices BUNDLE RESULT.json --place cuda:0/cpu ...`.

For every placement TARGET/DRAFT both hosts answer the same prompts in plain and mirror mode, and their tokens are
compared. Placements on openvino devices take ONNX Runtime's plugin (`--plugin`, the library; by default that of the
installed package `onnxruntime-ep-openvino`). Build `hosts/cpp` with its tests first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mirror
from hosts.answering import PYTHON, Host, HostError, mode_number
from hosts.toolchain import DEFAULT_FOLDER
from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import provenance
from mirror.runtime.text import TextCodec

PROGRAM = DEFAULT_FOLDER / "cpp" / "tests" / "mirror_speed"
PLUGIN = "libonnxruntime_providers_openvino_plugin.so"


def find_plugin() -> Path | None:
    """Return the installed plugin's library, None if there is none."""
    spec = importlib.util.find_spec("onnxruntime_ep_openvino")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / PLUGIN
    return path if path.is_file() else None


def answers(program: Sequence[str], bundle: Path, settings: Mapping[str, str], prompts: Sequence[Sequence[int]]) -> Any:
    """Return a host's answers, or what it refused or failed with as a text."""
    with Host(program, bundle, settings) as host:
        try:
            host.answer(prompts[0])  # warms up
            return [host.answer(prompt) for prompt in prompts]
        except HostError as error:
            return str(error)


def compare_place(
    options: argparse.Namespace, place: str, mode: str, prompts: Sequence[Sequence[int]]
) -> Mapping[str, Any]:
    """Return both hosts' answers on one placement, and whether their tokens agree."""
    target, _, draft = place.partition("/")
    settings = {"mode": mode_number(mode), "tokens": str(options.tokens), "target": target, "draft": draft or "cpu"}
    settings["pinned"] = "0" if options.free_widths else "1"
    extra = {"plugin": str(options.plugin)} if "openvino" in place and options.plugin else {}
    python = answers(PYTHON, options.bundle, settings, prompts)
    cpp = answers([str(options.program)], options.bundle, {**settings, **extra}, prompts)
    both = not isinstance(python, str) and not isinstance(cpp, str)
    same = [a["tokens"] == b["tokens"] for a, b in zip(cpp, python, strict=True)] if both else None
    return {"place": place, "mode": mode, "same_tokens": same, "cpp": brief(cpp), "python": brief(python)}


def brief(found: Any) -> Any:
    """Return the numbers of some answers without their tokens, or the text that stands for them."""
    if isinstance(found, str):
        return found
    return [{key: value for key, value in item.items() if key != "tokens"} for item in found]


def main() -> None:
    """Compare and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--place", action="append", required=True, help="TARGET/DRAFT; again for more")
    parser.add_argument("--plugin", type=Path, default=find_plugin())
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--free-widths", action="store_true", help="without pinned widths; texts may then differ")
    options = parser.parse_args()
    codec = TextCodec.load(options.bundle)
    prompts = [codec.encode_prompt(prompt.text, True) for prompt in load_prompts()[: options.prompts]]
    found = []
    for place in options.place:
        for mode in ("plain", "mirror"):
            found.append(compare_place(options, place, mode, prompts))
            sys.stdout.write(json.dumps(found[-1]) + "\n")
            sys.stdout.flush()
    content = {
        "what": "C++ host against Python on other devices, greedy; events are lost drafts",
        "mirror": mirror.__version__,
        "tokens": options.tokens,
        "pinned": not options.free_widths,
        "places": found,
        **provenance("hosts.devices"),
    }
    options.result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
