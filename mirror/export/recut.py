"""`mirror recut`: another exit layer, kappa or gamma for a bundle, without tracing or copying weights."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mirror.bundle import (
    INT8_SEGMENTS,
    MANIFEST_NAME,
    VOCABULARY_FILE,
    Decoding,
    FileFacts,
    Form,
    Graph,
    LayerKV,
    Manifest,
    Segment,
    Settings,
    TensorSpec,
    check_files,
    file_sha256,
    read_manifest,
    write_manifest,
)
from mirror.errors import ExportError
from mirror.export.cut import Piece, cut_draft, cut_int8_draft, cut_target, exit_layer_of, trimmed_vocabulary
from mirror.export.graphs import dtype_of
from mirror.export.program import draft_program

_SYMBOLS = {"width", "capacity", "rows"}
INT8_SOURCE = "draft_int8.source.onnx"  # the draft whose products are of integers
PROGRAM_FILE = "draft_int8.json"  # where its tensors lie, for kernels that run its whole pass
COMPILED_FOLDER = "compiled"  # where `mirror compile` puts what it makes


def recut_bundle(
    bundle: Path,
    *,
    exit_layer: str | None = None,
    gamma: int | None = None,
    kappa: int | None = None,
    output: Path | None = None,
) -> Manifest:
    """Cut a bundle anew; in place, or into `output`, which shares the weights by hard links.

    Raises:
        BundleError: the bundle is not whole.
        ExportError: a value is out of range, or `output` exists.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    decoding = _decoding(manifest, exit_layer, gamma, kappa)
    place = output or bundle
    if output is not None and output.exists():
        raise ExportError(f"{output} exists; choose another folder")
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.absolute().parent))
    try:
        _share(bundle, folder, manifest)
        segments = write_segments(folder, decoding)
        files = {name: facts for name, facts in manifest.files.items() if not _is_made_anew(name)}
        for path in sorted([*folder.glob("*.onnx"), *folder.glob(VOCABULARY_FILE), *folder.glob(PROGRAM_FILE)]):
            if _is_segment(path.name) or path.name not in files:
                files[path.name] = FileFacts(path.stat().st_size, file_sha256(path))
        settings = _settings(manifest, decoding)
        renewed = dataclasses.replace(manifest, decoding=decoding, segments=segments, files=files, settings=settings)
        write_manifest(folder, renewed)
        _replace_folder(folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return renewed


def write_segments(folder: Path, decoding: Decoding) -> dict[str, Segment]:
    """Cut and lower the source graphs of a folder; write every segment's files and return their records."""
    program = None
    pieces = list(cut_target(ir.load(folder / "target.source.onnx"), decoding.exit_layer, decoding.kappa))
    if (folder / "draft.source.onnx").is_file():
        draft = ir.load(folder / "draft.source.onnx")
        pieces += cut_draft(draft, decoding.kappa)
        if (folder / INT8_SOURCE).is_file():
            int8_draft = ir.load(folder / INT8_SOURCE)
            program = draft_program(int8_draft)
            pieces += cut_int8_draft(int8_draft, decoding.kappa)
        tokens = trimmed_vocabulary(draft)
        if tokens is not None and not (folder / VOCABULARY_FILE).exists():
            np.save(folder / VOCABULARY_FILE, tokens)
    graphs: dict[str, dict[Form, Graph]] = {}
    caches: dict[str, tuple[LayerKV, ...]] = {}
    for piece in pieces:
        graphs.setdefault(piece.segment, {})[piece.form] = _save(folder, piece)
        caches[piece.segment] = piece.kv
    described = INT8_SEGMENTS.values() if _save_program(folder, program) else ()
    return {
        name: Segment(name, caches[name], forms, program=PROGRAM_FILE if name in described else None)
        for name, forms in graphs.items()
    }


def _save_program(folder: Path, program: Mapping[str, Any] | None) -> bool:
    """Write a draft's program in place of the one that is there; return whether it has one."""
    path = folder / PROGRAM_FILE
    path.unlink(missing_ok=True)
    if program is None:
        return False
    path.write_text(json.dumps(program, separators=(",", ":")) + "\n", encoding="utf-8")
    return True


def _save(folder: Path, piece: Piece) -> Graph:
    name = f"{piece.segment}.onnx" if piece.form is Form.INPLACE else f"{piece.segment}.rows.onnx"
    ir.save(piece.model, folder / name)
    graph = piece.model.graph
    return Graph(name, _specs(list(graph.inputs)), _specs(list(graph.outputs)))


def _specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    unknown = [size for size in shape if isinstance(size, str) and size not in _SYMBOLS]
    if unknown:
        raise ExportError(
            f"graph tensor {value.name} has an unknown dimension {unknown[0]}; this model can't be exported"
        )
    return TensorSpec(value.name, str(dtype_of(value).numpy()), shape)


def _decoding(manifest: Manifest, exit_layer: str | None, gamma: int | None, kappa: int | None) -> Decoding:
    old = manifest.decoding
    for name, number in (("gamma", gamma), ("kappa", kappa)):
        if number is not None and not 1 <= number <= 64:
            raise ExportError(f"--{name} is {number}; give 1..64")
    try:
        layer = old.exit_layer if exit_layer is None else exit_layer_of(exit_layer, manifest.model.layers)
    except ValueError as error:
        raise ExportError(f"--exit-layer: {error}") from error
    fed = manifest.draft.feature_layer if manifest.draft is not None else None
    if fed is not None and layer != fed:
        raise ExportError(
            f"--exit-layer is {layer} and the bundle's draft is fed by the state after layer {fed}; "
            "keep that layer, or export with another draft"
        )
    return dataclasses.replace(old, exit_layer=layer, gamma=gamma or old.gamma, kappa=kappa or old.kappa)


def _settings(manifest: Manifest, decoding: Decoding) -> Settings:
    """Return the settings as far as they fit the new cut."""
    old = manifest.settings
    fits = old.fanout is not None and len(old.fanout) == decoding.gamma + 1 and max(old.fanout) <= decoding.kappa
    gamma = None if old.gamma is not None and old.gamma > decoding.gamma else old.gamma
    return dataclasses.replace(old, gamma=gamma, fanout=old.fanout if fits else None)


def _is_segment(name: str) -> bool:
    return name.endswith(".onnx") and not name.endswith(".source.onnx")


def _is_made_anew(name: str) -> bool:
    """Whether a file of the bundle belongs to the old cut: its graphs, a program, and what was compiled from them."""
    return _is_segment(name) or name == PROGRAM_FILE or name.startswith(f"{COMPILED_FOLDER}/")


def _share(bundle: Path, folder: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if _is_made_anew(name):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle / name, folder / name)
        except OSError:
            shutil.copyfile(bundle / name, folder / name)


def _replace_folder(folder: Path, place: Path) -> None:
    folder.chmod(0o755)
    if not place.exists():
        os.replace(folder, place)
        return
    # In place only what belongs to the cut changes; the manifest goes last.
    names = sorted(path.name for path in folder.iterdir() if _is_made_anew(path.name))
    program_is_old = PROGRAM_FILE not in names
    if (folder / VOCABULARY_FILE).exists() and not (place / VOCABULARY_FILE).exists():
        names.append(VOCABULARY_FILE)
    for name in [*names, MANIFEST_NAME]:
        os.replace(folder / name, place / name)
    if program_is_old:
        (place / PROGRAM_FILE).unlink(missing_ok=True)
    shutil.rmtree(place / COMPILED_FOLDER, ignore_errors=True)
