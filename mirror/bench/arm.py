"""Mirror as one arm of `benchmarks/rivals/compare.py`, which documents the protocol: JSON lines, tokens only.

python -m mirror.bench.arm BUNDLE --mode plain --threads 2
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

import mirror
from mirror.bench.provenance import provenance
from mirror.bundle import read_manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--mode", default="plain")
@click.option("--threads", type=int, default=None)
@click.option("--draft-device", default="cpu")
@click.option("--candidates", default="both")
@click.option("--pinned", is_flag=True)
def main(bundle: Path, mode: str, threads: int | None, draft_device: str, candidates: str, pinned: bool) -> None:
    """Answer the requests on standard input with BUNDLE."""
    start_s = time.perf_counter()
    weights = [facts.bytes for name, facts in read_manifest(bundle).files.items() if name.startswith("weights/")]
    with mirror.load(
        bundle, mode=mode, threads=threads, draft_device=draft_device, candidates=candidates, pinned=pinned
    ) as engine:
        ready = {"ready": True, "load_s": time.perf_counter() - start_s, "model_bytes": sum(weights)}
        _say({**ready, "versions": provenance("mirror.bench.arm")["versions"]})
        for line in sys.stdin:
            request = json.loads(line)
            result = engine.generate_tokens(request["prompt_ids"], max_new_tokens=request["max_new_tokens"])
            numbers = result.statistics
            answer = {
                "id": request["id"],
                "token_ids": list(result.tokens),
                "ttft_s": numbers.ttft_s,
                "decode_tokens_per_s": numbers.decode_tokens_per_s,
                "stats": {"tokens_per_round": numbers.tokens_per_round, "acceptance_rate": numbers.acceptance_rate},
            }
            _say(answer)


def _say(line: dict[str, object]) -> None:
    click.echo(json.dumps(line))  # flushes at each line


if __name__ == "__main__":
    main()
