"""A graph as it is given to OpenVINO: its cache in the type that it is kept in, its weights where they are.

On a CPU, OpenVINO turns a graph in float16 into one in float32 each time that it compiles it, and every program then
holds all weights in float32 beside what its products have packed: 327 MB for one of the default draft, 81 where
the weights stay in float16 in the file and are widened on the way. So such a graph is turned here, once, and computes
the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mirror.targets.openvino_package import ov
from mirror.targets.static_shapes import PAST_PREFIX, PRESENT_PREFIX

# OpenVINO's name for a conversion that belongs to a stored weight: it is done where the weight is read.
_WIDENS_A_WEIGHT = "decompression_0"
# Smaller constants are widened at once.
_WEIGHT_BYTES = 4096
_QUANTIZED = {"i4", "u4", "i8", "u8"}


def read_model(core: Any, path: Path, unit: str, cache_type: Any = None) -> Any:
    """Return the model in a graph's file.

    Args:
        core: an `ov.Core`.
        unit: OpenVINO's name of the device that it will be compiled for.
        cache_type: the `ov.Type` that the cache goes in and out in, None for the graph's own.

    Raises:
        RuntimeError: OpenVINO can't read it.
    """
    model = core.read_model(path)
    edges = {port.get_any_name(): port.get_element_type() for port in (*model.inputs, *model.outputs)}
    if unit == "CPU" and not _is_quantized(model):
        _compute_in_float32(model)
    if cache_type is not None:
        edges.update((name, cache_type) for name in edges if name.startswith((PAST_PREFIX, PRESENT_PREFIX)))
    return _with_edges(model, edges)


def _is_quantized(model: Any) -> bool:
    """Return whether weights are integers, which have ways of their own to be read."""
    constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return any(
        node.get_element_type().to_string() in _QUANTIZED and node.get_byte_size() > _WEIGHT_BYTES for node in constants
    )


def _compute_in_float32(model: Any) -> None:
    """Turn a graph in float16 into one in float32 on the same weights."""
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Constant", "Convert", "Parameter"):
            continue
        if node.get_element_type() != ov.Type.f16:
            continue
        if node.get_type_name() == "Parameter":
            node.set_element_type(ov.Type.f32)
        else:
            _widen(node)
    model.validate_nodes_and_infer_types()


def _widen(node: Any) -> None:
    """Give the readers of a constant, or of a conversion, float32 in place of float16."""
    readers = list(node.output(0).get_target_inputs())
    if node.get_type_name() == "Convert":
        wide = ov.opset13.convert(node.input_value(0), "f32")
    elif node.get_byte_size() > _WEIGHT_BYTES:
        wide = ov.opset13.convert(node, "f32")
        wide.get_rt_info()[_WIDENS_A_WEIGHT] = ""
    else:
        wide = ov.opset13.constant(node.get_data().astype(np.float32))
    for reader in readers:
        reader.replace_source_output(wide.output(0))


def _with_edges(model: Any, types: dict[str, Any]) -> Any:
    """Return a model whose inputs and outputs have the given types, by name."""
    edges, changed = ov.preprocess.PrePostProcessor(model), False
    for ports, edge in ((model.inputs, edges.input), (model.outputs, edges.output)):
        for port in ports:
            name = port.get_any_name()
            if port.get_element_type() != types[name]:
                edge(name).tensor().set_element_type(types[name])
                changed = True
    return edges.build() if changed else model
