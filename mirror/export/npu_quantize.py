"""A draft whose linear layers are whole numbers, for NPUs: weights in 8 or 4 bits, what they multiply in 16.

The rows form gets quantize/dequantize pairs around each product with a weight, by ONNX Runtime's own quantizer;
ranges come from passes that the caller recorded on real text. Everything else (norms, rotary, attention, the choice
of tokens) stays in floating point, which an NPU computes in float16: squares in a norm span too much for 16 bits,
and a mask that hides would leave nothing of a score's range.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mirror.bundle import FileFacts, Form, check_files, file_sha256, read_manifest, write_manifest
from mirror.errors import ExportError

Feeds = Mapping[str, NDArray[Any]]
DRAFT_SEGMENTS = ("draft", "draft_trunk")


class WeightBits(Enum):
    """How a weight is stored: whole numbers with one scale per output channel."""

    INT8 = "int8"
    INT4 = "int4"


def quantize_draft(bundle: Path, output: Path, bits: WeightBits, passes: Mapping[str, Sequence[Feeds]]) -> None:
    """Write a bundle like another whose draft, in rows form, computes with whole numbers.

    Files that stay as they are are linked where the file system lets them be.

    Args:
        passes: for each draft segment, the inputs of some passes over real text, caches included.

    Raises:
        ExportError: the output is there already, or the bundle has no draft with graphs.
    """
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    if not set(DRAFT_SEGMENTS) <= set(manifest.segments):
        raise ExportError(
            "this bundle has no draft with graphs, so there is nothing to quantize; export it with --draft"
        )
    if output.exists():
        raise ExportError(f"{output} is there already; give another folder")
    shutil.copytree(bundle, output, copy_function=_link)
    segments, files = dict(manifest.segments), dict(manifest.files)
    for name in DRAFT_SEGMENTS:
        graph = manifest.segments[name].graphs[Form.ROWS]
        file = f"{name}.rows.{bits.value}.onnx"
        _quantize_graph(bundle / graph.file, output / file, bits, passes[name])
        forms = {**manifest.segments[name].graphs, Form.ROWS: dataclasses.replace(graph, file=file)}
        segments[name] = dataclasses.replace(manifest.segments[name], graphs=forms, compiled=())
        for path in (output / file, output / f"{file}.data"):
            files[path.name] = FileFacts(path.stat().st_size, file_sha256(path))
    (output / "mirror.json").unlink()  # it may be a link to the other bundle's
    write_manifest(output, dataclasses.replace(manifest, segments=segments, files=files))


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _quantize_graph(source: Path, target: Path, bits: WeightBits, passes: Sequence[Feeds]) -> None:
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    folded = target.with_suffix(".folded.onnx")
    _fold(source, folded)
    weights, others = _products(folded)
    precise = {name: [{"quant_type": QuantType.QInt4, "axis": 1, "symmetric": True}] for name in weights}
    config = get_qnn_qdq_config(
        folded,
        _Recorded(passes),
        activation_type=QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        weight_symmetric=True,
        per_channel=True,
        init_overrides=precise if bits is WeightBits.INT4 else None,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=others,
    )
    config.use_external_data_format = True
    quantize(folded, target, config)
    for path in target.parent.glob(f"{folded.name}*"):
        path.unlink()


def _fold(source: Path, target: Path) -> None:
    """Write a graph with what is constant computed: weights lie as their products take them."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}.data")
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    model = onnx.load(target, load_external_data=False)
    add_pre_process_metadata(model)  # else the quantizer asks for what was just done
    onnx.save(model, target)


def _products(path: Path) -> tuple[list[str], list[str]]:
    """Return the weights that a graph multiplies with, and the names of its products without one."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    known = {item.name for item in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    weights = sorted({node.input[1] for node in products if node.input[1] in known})
    return weights, [node.name for node in products if node.input[1] not in known]


class _Recorded:
    """Recorded passes, in the form of the quantizer's `CalibrationDataReader`."""

    def __init__(self, passes: Sequence[Feeds]) -> None:
        self._passes = passes
        self._left: Iterator[Feeds] = iter(passes)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the inputs of the next pass, None after the last."""
        feeds = next(self._left, None)
        return None if feeds is None else {name: np.asarray(array) for name, array in feeds.items()}

    def __len__(self) -> int:
        return len(self._passes)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Begin at a pass, and end before another."""
        self._left = iter(self._passes[start_index:end_index])

    def rewind(self) -> None:
        """Begin anew."""
        self._left = iter(self._passes)
