"""A draft whose linear layers are whole numbers, for NPUs: weights in 8 bits and what they multiply in 16, or in 4.

In 8 bits the rows form gets quantize/dequantize pairs around each product with a weight, by ONNX Runtime's own
quantizer; ranges come from passes that the caller recorded on real text. Everything else (norms, rotary, attention,
the choice of tokens) stays in floating point, which an NPU computes in float16: squares in a norm span too much for
16 bits, and a mask that hides would leave nothing of a score's range. 4 bits are `npu_blocks`.
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
from mirror.export.npu_blocks import Feeds, round_graphs

DRAFT_SEGMENTS = ("draft", "draft_trunk")


class WeightBits(Enum):
    """How a weight is stored: in 8 bits with a scale per output, in 4 with a scale per output and 16 inputs."""

    INT8 = "int8"
    INT4 = "int4"


def quantize_draft(bundle: Path, output: Path, bits: WeightBits, passes: Mapping[str, Sequence[Feeds]]) -> None:
    """Write a bundle like another whose draft, in rows form, computes with whole numbers.

    Files that stay as they are are linked where the file system lets them be.

    Args:
        passes: for each draft segment, the inputs of some passes over real text, caches included.

    Raises:
        ExportError: the output is there already, or the bundle has no draft with graphs, or not in float32.
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
    written = {name: f"{name}.rows.{bits.value}.onnx" for name in DRAFT_SEGMENTS}
    sources = {name: bundle / manifest.segments[name].graphs[Form.ROWS].file for name in DRAFT_SEGMENTS}
    _quantize_graphs(sources, {name: output / file for name, file in written.items()}, bits, passes)
    for name, file in written.items():
        graph = dataclasses.replace(manifest.segments[name].graphs[Form.ROWS], file=file)
        forms = {**manifest.segments[name].graphs, Form.ROWS: graph}
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


def _quantize_graphs(
    sources: Mapping[str, Path], targets: Mapping[str, Path], bits: WeightBits, passes: Mapping[str, Sequence[Feeds]]
) -> None:
    folded = {name: target.with_suffix(".folded.onnx") for name, target in targets.items()}
    for name, source in sources.items():
        _fold(source, folded[name])
    if not all(map(_multiplies_weights, folded.values())):
        raise ExportError(
            f"the draft's weights are not in float32, which is what {bits.value} is made from; export the bundle with "
            "--precision fp32, or compile it with --weights as-is"
        )
    if bits is WeightBits.INT4:
        round_graphs(folded, targets, passes)
    else:
        for name, target in targets.items():
            _quantize_products(folded[name], target, passes[name])
    for path in (path for one in folded.values() for path in one.parent.glob(f"{one.name}*")):
        path.unlink()


def _quantize_products(source: Path, target: Path, passes: Sequence[Feeds]) -> None:
    """Write a graph whose products with a weight compute in 8 and 16 bits."""
    from onnxruntime.quantization import QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    config = get_qnn_qdq_config(
        source,
        _Recorded(passes),
        activation_type=QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        weight_symmetric=True,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=_weightless_products(source),
    )
    config.use_external_data_format = True
    quantize(source, target, config)


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


def _multiplies_weights(path: Path) -> bool:
    """Return whether a graph has a product with a weight; others than float32 are cast or in blocks before theirs."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    known = {item.name for item in graph.initializer}
    return any(node.op_type == "MatMul" and node.input[1] in known for node in graph.node)


def _weightless_products(path: Path) -> list[str]:
    """Return the names of a graph's products of two computed values."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    known = {item.name for item in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in known]


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
