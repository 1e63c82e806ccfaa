"""A draft's passes by rows, on devices beside each other: `python -m mirror.bench.draft_passes BUNDLE --out FILE`.

Passes follow each other in turns over all arms, so that what else the machine does meets all of them alike. Rows are a
window's (`8`, with candidates), or branches': `20x4` is 20 of four rows each, of which three are streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from mirror.bench.provenance import provenance
from mirror.bundle import INT8_SEGMENTS, Manifest, read_manifest
from mirror.runtime.feeds import FeedPool, PassFeeds
from mirror.runtime.records import Ints
from mirror.targets import open_device
from mirror.targets.base import KVCache, LoadedSegment, LoadRequest, PassShape, to_host
from mirror.targets.kernel_library import VARIABLE

_BETWEEN_ARMS_S = 0.005  # until the last arm's threads sleep


@dataclass(frozen=True)
class Rows:
    """The rows of a pass: a window of `each` if there are no branches."""

    branches: int
    each: int

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.branches}x{self.each}" if self.branches else str(self.each)

    @property
    def width(self) -> int:
        """All of them."""
        return max(self.branches, 1) * self.each

    @property
    def shape(self) -> PassShape:
        """The pass: every row's token is wanted."""
        return PassShape(self.width, self.width if self.branches else 0)


def read_rows(text: str) -> Rows:
    """Return what `8` or `20x4` means."""
    branches, _, each = text.rpartition("x")
    return Rows(int(branches or 0), int(each))


@dataclass
class Arm:
    """A device, for `cpu` with its choice of kernels: `cpu/off`, `cpu/avx2`."""

    name: str
    trunk: LoadedSegment
    branch: LoadedSegment
    cache: KVCache
    pool: FeedPool
    times_s: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rows: Rows, context: int, streams_from: int) -> None:
        """Run a pass behind a context, and note its time."""
        feeds, wanted = self._feeds(rows, context, streams_from)
        segment = self.branch if rows.branches else self.trunk
        start_s = time.perf_counter()
        outputs = segment.run({**feeds.tensors, "logit_rows": wanted}, self.cache, context)
        to_host(outputs["token_ids"])
        self.times_s.setdefault(rows.name, []).append(time.perf_counter() - start_s)

    def _feeds(self, rows: Rows, context: int, streams_from: int) -> tuple[PassFeeds, Ints]:
        widths = (self.branch if rows.branches else self.trunk).widths or (rows.width,)
        feeds = self.pool.at(min(width for width in widths if width >= rows.width))
        self.pool.slot_branch[:] = -1
        ids = np.arange(rows.width) * 7 % 1000
        if not rows.branches:
            feeds.fill_causal(ids, context)
        else:
            ids.reshape(-1, rows.each)[:, 1:] = streams_from + np.arange(rows.each - 1)
            owners = np.repeat(np.arange(rows.branches), rows.each)
            places = context + np.tile(np.arange(rows.each), rows.branches)
            self.pool.slot_branch[context : context + rows.width] = owners
            feeds.fill_rows(ids, places, np.full(rows.width, context), owners, context)
        return feeds, np.arange(rows.width)


def load_arm(name: str, bundle: Path, manifest: Manifest, shapes: Sequence[Rows], capacity: int, threads: int) -> Arm:
    """Load a draft on a device."""
    device_name, _, kernels = name.partition("/")
    device = open_device(device_name, background=True)

    def load(segment_name: str, wanted: list[PassShape]) -> LoadedSegment:
        int8 = manifest.segments.get(INT8_SEGMENTS[segment_name]) if device.int8_drafts else None
        segment = int8 or manifest.segments[segment_name]
        return device.load_segment(LoadRequest(bundle, segment, wanted, capacity, threads))

    with _kernels(kernels):
        trunk = load("draft_trunk", sorted({rows.shape for rows in shapes if not rows.branches} or {PassShape(8)}))
        branch = load("draft", sorted({rows.shape for rows in shapes if rows.branches} or {PassShape(1, 1)}))
    cache = device.make_cache(manifest.segments["draft"].kv, capacity)
    return Arm(name, trunk, branch, cache, FeedPool(capacity, manifest.model.max_positions))


@contextlib.contextmanager
def _kernels(chosen: str) -> Iterator[None]:
    """Let segments be loaded with some kernels, the best if none are named."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = chosen
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--arm", "names", multiple=True, default=["cpu", "cpu/off"], show_default=True)
@click.option("--rows", "texts", default="1,8,16x4,64x1,20x4,64x4", show_default=True)
@click.option("--context", default=500, show_default=True, help="Filled slots before the pass.")
@click.option("--threads", default=2, show_default=True)
@click.option("--turns", default=40, show_default=True)
@click.option("--pause-ms", default=0.0, show_default=True, help="Sleep before each pass.")
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(
    bundle: Path,
    names: Sequence[str],
    texts: str,
    context: int,
    threads: int,
    turns: int,
    pause_ms: float,
    out: Path | None,
) -> None:
    """Time the passes of BUNDLE's draft."""
    manifest, shapes = read_manifest(bundle), [read_rows(text) for text in texts.split(",")]
    most = max(rows.width for rows in shapes)
    capacity = -(-(context + most + 8) // 256) * 256
    arms = [load_arm(name, bundle, manifest, shapes, capacity, threads) for name in names]
    streams_from = manifest.draft.vocab_size if manifest.draft is not None else 0
    for turn in range(turns + 3):
        for arm in arms:
            time.sleep(_BETWEEN_ARMS_S)
            for rows in shapes:
                time.sleep(pause_ms / 1e3)
                arm.run(rows, context, streams_from)
            if turn == 2:
                arm.times_s.clear()  # the first passes plan
    passes = {
        arm.name: {rows: round(1e3 * statistics.median(times), 3) for rows, times in arm.times_s.items()}
        for arm in arms
    }
    for name, found in passes.items():
        click.echo(json.dumps({"arm": name, "ms": found}))
    if out is not None:
        facts = {"bundle": bundle.name, "context": context, "threads": threads, "pause_ms": pause_ms, "ms": passes}
        out.write_text(json.dumps({**provenance("mirror.bench.draft_passes"), **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
