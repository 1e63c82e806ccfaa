"""One host that answers prompts, in a process of its own: this package, or the C++ program `mirror_speed`.

`python -m hosts.answering BUNDLE [KEY=VALUE]...` is the former: it reads prompts as token ids, one a line, maybe after
`mode=NUMBER`, and prints a JSON line for each answer, as `mirror_speed` does (keys: mode, threads, tokens, target,
draft, pinned).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MODES = ("plain", "serial", "mirror")
PYTHON = (sys.executable, "-m", "hosts.answering")


class HostError(Exception):
    """A host ended without an answer; the message is what it said."""


class Host:
    """A process that has loaded a bundle; use it as a context.

    Args:
        program: the command, to which the bundle and the settings are appended.
        settings: by key, as the module says; `mode` is a number, as in mirror.h.
    """

    def __init__(self, program: Sequence[str], bundle: Path, settings: Mapping[str, str]) -> None:
        command = [*program, str(bundle), *(f"{key}={value}" for key, value in settings.items())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def answer(self, prompt: Sequence[int], mode: str | None = None) -> dict[str, Any]:
        """Return what was measured of an answer, and its tokens.

        Args:
            mode: another one than that of the settings, if those loaded a draft.

        Raises:
            HostError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            first = [] if mode is None else [f"mode={mode_number(mode)}"]
            self._process.stdin.write(" ".join([*first, *map(str, prompt)]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            assert self._process.stderr is not None
            said = self._process.stderr.read().strip()[-1500:]
            raise HostError(f"{said or 'it said nothing'} (exit status {self._process.wait()})")
        result: dict[str, Any] = json.loads(line)
        return result


def mode_number(mode: str) -> str:
    """Return a mode as mirror.h numbers it."""
    return str(1 + MODES.index(mode))


def serve(bundle: Path, settings: Mapping[str, str]) -> None:
    """Answer prompts with this package until the input ends."""
    import mirror

    mode = MODES[int(settings["mode"]) - 1]
    with mirror.load(
        bundle,
        mode=mode,
        threads=int(settings["threads"]) if "threads" in settings else None,
        target_device=settings.get("target"),
        draft_device=settings.get("draft"),
        pinned=settings.get("pinned") == "1",
    ) as engine:
        for line in sys.stdin:
            words = line.split()
            asked = words.pop(0).partition("=")[2] if words and words[0].startswith("mode=") else settings["mode"]
            answer = engine.generate_tokens(
                [int(token) for token in words],
                max_new_tokens=int(settings["tokens"]),
                temperature=float(settings.get("temperature", "0")),
                mode=MODES[int(asked) - 1],
            )
            found = answer.statistics
            result = {
                "decode_tokens_per_s": found.decode_tokens_per_s,
                "ttft_ms": 1e3 * (found.ttft_s or 0.0),
                "round_ms": found.round_ms,
                "host_ms": found.host_ms,
                "rounds": found.rounds,
                "draft_tokens_accepted": found.draft_tokens_accepted,
                "events": len(answer.events),
                "tokens": list(answer.tokens),
            }
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


def main() -> None:
    """Serve the bundle that the command line names."""
    from mirror.errors import MirrorError

    bundle, *rest = sys.argv[1:]
    try:
        serve(Path(bundle), dict(item.split("=", 1) for item in rest))
    except MirrorError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
