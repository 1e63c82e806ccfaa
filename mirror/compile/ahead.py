"""Compile what an engine would compile at loading, once, into the bundle.

The sizes are never worked out here: the runtime loads its draft on a device that compiles instead of
loading, so what lies in the bundle is what loading asks for.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mirror.bundle import (
    MANIFEST_NAME,
    Compiled,
    FileFacts,
    Form,
    LayerKV,
    Manifest,
    Segment,
    check_files,
    file_sha256,
    read_manifest,
    write_manifest,
)
from mirror.errors import DeviceError, RequestError
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.options import EngineOptions
from mirror.targets.artefacts import AS_IS, Quantized
from mirror.targets.base import AheadCompiler, KVCache, LoadRequest, PassShape, RowTable, StoredWeights, Tensor, is_cpu
from mirror.targets.static_shapes import first_shapes, widths_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class CompileReport:
    """What `compile_bundle` did.

    Attributes:
        device: as artefacts name it: `qnn:v73`.
        made, kept: artefacts compiled now, and those that were there and fit.
        bytes: of all of them, with the files beside them.
    """

    device: str
    made: tuple[Compiled, ...]
    kept: tuple[Compiled, ...]
    bytes: int


def compile_bundle(
    bundle: Path, compiler: AheadCompiler, options: EngineOptions, say: Say, weights: str = AS_IS
) -> CompileReport:
    """Compile the draft of a bundle for the passes that an engine with these options makes.

    Artefacts lie under `compiled/` and are recorded in `mirror.json` at the end, in one step. Those that are
    there already and fit are kept.

    Args:
        say: is told what is being done, a line at a time.
        weights: `AS_IS`, or how the draft's linear layers are stored on an NPU: `int8`, `int4`.

    Raises:
        BundleError: the bundle is not whole.
        DeviceError: the device can't take the draft.
        RequestError: the bundle has no draft with graphs.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    if manifest.draft is None or manifest.draft.kind != "model":
        raise RequestError("this bundle has no draft with graphs, and nothing else is compiled; export it with --draft")
    with tempfile.TemporaryDirectory(prefix=f".{bundle.name}.compile-", dir=bundle.absolute().parent) as scratch:
        recorder = _Recorder(bundle, compiler, say, weights, Path(scratch))
        # A CPU's programs are for so many threads, which depends on where the target runs.
        shared = compiler.compiles_for == "openvino:CPU" and is_cpu(manifest.settings.target_device or "cpu")
        load_draft(bundle, manifest, recorder, make_plan(manifest, options, shared_cpu=shared))
    if recorder.made:
        _record(bundle, manifest, compiler.compiles_for, recorder.found)
    kept = [item for items in recorder.found.values() for item in items if item not in recorder.made]
    size = sum(path.stat().st_size for item in [*recorder.made, *kept] for path in _files(bundle, item))
    return CompileReport(compiler.compiles_for, tuple(recorder.made), tuple(kept), size)


class _Recorder:
    """A device that compiles each segment it is asked to load, and runs nothing."""

    def __init__(self, folder: Path, compiler: AheadCompiler, say: Say, weights: str, scratch: Path) -> None:
        self._folder = folder
        self._compiler = compiler
        self._say = say
        self._weights = weights
        self._scratch = scratch
        self._quantized: Quantized | None = None
        self.made: list[Compiled] = []
        self.found: dict[str, list[Compiled]] = {}

    @property
    def name(self) -> str:
        """The device in artefacts' records."""
        return self._compiler.compiles_for

    @property
    def form(self) -> Form:
        """Compiled graphs hand their rows to the host."""
        return Form.ROWS

    @property
    def int8_drafts(self) -> bool:
        """Its operators don't round products so."""
        return False

    @property
    def padded_width(self) -> int:
        """As the device that will load them."""
        return self._compiler.padded_width

    def weight_bytes(self, segment: Segment, stored: StoredWeights, shapes: Sequence[PassShape]) -> int:
        """Nothing is held."""
        return 0

    @property
    def launches(self) -> bool:
        """Nothing is run."""
        return False

    def load_segment(self, request: LoadRequest) -> _Unloaded:
        """Compile a segment for the shapes of its first passes; `later` ones stay for when they come."""
        name, graph = request.segment.name, request.segment.graphs.get(Form.ROWS)
        if graph is None:
            raise DeviceError(f"{self.name} needs {name} in rows form; export the bundle again")
        for shape in first_shapes(graph, request.shapes):
            item = self._compiler.fitting(request, shape, self._weights)
            if item is None:
                self._quantized = self._quantized or self._quantize()
                self._say(f"compiling {name} for {self.name}: {shape.width} rows, {request.capacity} slots")
                item = self._compiler.compile_segment(request, shape, self._quantized)
                self.made.append(item)
            self.found.setdefault(name, []).append(item)
        return _Unloaded(widths_of(request.shapes))

    def _quantize(self) -> Quantized | None:
        """Make the draft with quantized weights, None where they stay as they are."""
        if self._weights == AS_IS:
            return None
        from mirror.compile.calibration import calibration_passes
        from mirror.export.npu_quantize import WeightBits, quantize_draft

        self._say(f"quantizing the draft's weights to {self._weights}")
        folder = self._scratch / self._weights
        quantize_draft(self._folder, folder, WeightBits(self._weights), calibration_passes(self._folder))
        return Quantized(folder, read_manifest(folder).segments, self._weights)

    def make_table(self, rows: int, columns: int) -> RowTable:
        """Refuse; see `base.Device.make_table`."""
        raise DeviceError(f"{self.name} runs nothing here; tables are for devices that launch passes")

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> _NoCache:
        """Return a cache of no memory."""
        return _NoCache(capacity)


@dataclass(frozen=True)
class _Unloaded:
    """A segment that was compiled and not loaded."""

    widths: tuple[int, ...] | None
    input_names: frozenset[str] = field(default_factory=frozenset)

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        raise DeviceError("this segment was compiled for another machine and can't run here; load the bundle instead")


@dataclass(frozen=True)
class _NoCache:
    capacity: int


def _record(bundle: Path, manifest: Manifest, device: str, found: Mapping[str, Sequence[Compiled]]) -> None:
    """Write what was found into `mirror.json`, in place of what it says of the same device and sizes."""
    segments, dropped = dict(manifest.segments), []
    for name, items in found.items():
        places = {(item.device, item.width, item.rows, item.capacity) for item in items}
        old = manifest.segments[name].compiled
        kept = [item for item in old if (item.device, item.width, item.rows, item.capacity) not in places]
        dropped += [item for item in old if item not in kept]
        segments[name] = dataclasses.replace(manifest.segments[name], compiled=(*kept, *items))
    gone = {path for item in dropped for path in _files(bundle, item)}
    files = {name: facts for name, facts in manifest.files.items() if bundle / name not in gone}
    for path in (path for items in found.values() for item in items for path in _files(bundle, item)):
        files[path.relative_to(bundle).as_posix()] = FileFacts(path.stat().st_size, file_sha256(path))
    # Written beside it and renamed: a half-written one never exists.
    with tempfile.TemporaryDirectory(prefix=f".{bundle.name}.compile-", dir=bundle.absolute().parent) as scratch:
        write_manifest(Path(scratch), dataclasses.replace(manifest, segments=segments, files=files))
        os.replace(Path(scratch) / MANIFEST_NAME, bundle / MANIFEST_NAME)


def _files(bundle: Path, item: Compiled) -> list[Path]:
    """Return an artefact's file and those that it refers to, which share its stem."""
    path = bundle / item.file
    return sorted(other for other in path.parent.glob(f"{path.stem}[._]*") if other.is_file())
