"""C++ against Python on other devices: `python -m hosts.devices BUNDLE RESULT.json --place cuda:0/cpu ...`.

For every placement TARGET/DRAFT both hosts load the bundle once and answer the same prompts in each mode. Their tokens
are compared; a line for each mode says tokens per second, and how many passes the C++ host had recorded on GPUs.
Placements on openvino devices take ONNX Runtime's plugin (`--plugin`, the library; by default that of the installed
package `onnxruntime-ep-openvino`). Build `hosts/cpp` with its tests first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mirror
from hosts.answering import MODES, PYTHON, Host, HostError, mode_number
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


def answers(
    program: Sequence[str], options: argparse.Namespace, settings: Mapping[str, str], prompts: Sequence[Sequence[int]]
) -> Mapping[str, Any]:
    """Return a host's answers by mode, or what it refused or failed with as a text."""
    modes: Sequence[str] = options.mode or MODES
    found: dict[str, Any] = {}
    with Host(program, options.bundle, {**settings, "mode": mode_number(modes[-1])}) as host:
        for mode in modes:
            try:
                host.answer(prompts[0], mode)  # warms up
                found[mode] = [host.answer(prompt, mode) for prompt in prompts]
            except HostError as error:
                return {**dict.fromkeys(modes, str(error)), **found}
    return found


def compare_place(
    options: argparse.Namespace, place: str, prompts: Sequence[Sequence[int]]
) -> Iterator[Mapping[str, Any]]:
    """Yield both hosts' answers on one placement by mode, and whether their tokens agree."""
    target, _, draft = place.partition("/")
    settings = {"tokens": str(options.tokens), "target": target, "draft": draft or "cpu"}
    settings["pinned"] = "0" if options.free_widths else "1"
    extra = {"plugin": str(options.plugin)} if "openvino" in place and options.plugin else {}
    pythons = answers(PYTHON, options, settings, prompts)
    for mode, cpp in answers([str(options.program)], options, {**settings, **extra}, prompts).items():
        python = pythons[mode]
        both = not isinstance(python, str) and not isinstance(cpp, str)
        same = [a["tokens"] == b["tokens"] for a, b in zip(cpp, python, strict=True)] if both else None
        yield {"place": place, "mode": mode, "same_tokens": same, "cpp": brief(cpp), "python": brief(python)}


def brief(found: Any) -> Any:
    """Return the numbers of some answers without their tokens, or the text that stands for them."""
    if isinstance(found, str):
        return found
    return [{key: value for key, value in item.items() if key != "tokens"} for item in found]


def said(item: Mapping[str, Any]) -> str:
    """Return one comparison as a line."""
    parts = [f"{item['place']} {item['mode']}: same_tokens {item['same_tokens']}"]
    for host in ("cpp", "python"):
        found = item[host]
        parts.append(f"{host} {found if isinstance(found, str) else round(found[-1]['decode_tokens_per_s'])}")
    if not isinstance(item["cpp"], str):
        parts.append(f"{item['cpp'][-1]['recorded_passes']} passes recorded")
        parts.append(f"{sum(answer['events'] for answer in item['cpp'])} events")
    return ", ".join(parts)


def main() -> None:
    """Compare and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--place", action="append", required=True, help="TARGET/DRAFT; again for more")
    parser.add_argument("--mode", action="append", choices=MODES, help="again for more; all if none")
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
        for item in compare_place(options, place, prompts):
            found.append(item)
            sys.stdout.write(said(item) + "\n")
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
