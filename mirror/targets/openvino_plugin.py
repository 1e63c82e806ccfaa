"""Intel devices by OpenVINO's plugin for ONNX Runtime, where it is installed and lists them.

A thin layer over `onnxruntime_session`: the plugin compiles for fixed sizes, so a segment is one
session per compiled shape, chosen as `static_shapes` says.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mirror.bundle import Form, Graph, Segment
from mirror.errors import DeviceError
from mirror.targets.base import Array, KVCache, LoadedSegment, Tensor, to_host
from mirror.targets.names import Precision
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, OnnxRuntimeSegment, Provider
from mirror.targets.openvino_settings import (
    check_precision,
    compile_settings,
    default_precision,
    kernel_cache,
    rows_graph,
)
from mirror.targets.static_shapes import PassShape, covering_shape, first_shapes, host_inputs, width_input

PROVIDER = "OpenVINOExecutionProvider"
_REGISTRATION = "OpenVINO"


class ShapedSegment:
    """One graph as a session per compiled shape; each behaves like any ONNX Runtime segment."""

    def __init__(
        self, name: str, graph: Graph, widths: Sequence[int], load: Callable[[PassShape], LoadedSegment]
    ) -> None:
        """Load the first shapes; `load` makes the segment of one shape."""
        self.name = name
        self._load = load
        self._widths = tuple(sorted(set(widths)))
        self._width_input = width_input(graph)
        self._names = frozenset(spec.name for spec in host_inputs(graph))
        self._sessions = {shape: load(shape) for shape in first_shapes(graph, widths)}

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The widths that it was compiled for."""
        return self._widths

    @property
    def input_names(self) -> frozenset[str]:
        """The catalogue inputs that the graph declares."""
        return self._names

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        """Run one pass; see `base.LoadedSegment.run`.

        Raises:
            DeviceError: the width was not compiled, or the pass failed.
        """
        name, axis = self._width_input
        width = to_host(feeds[name]).shape[axis]
        if width not in self._widths:
            raise DeviceError(
                f"{self.name} is compiled for widths {self._widths}, asked for {width}; load it with that"
            )
        if "logit_rows" not in self._names:
            return self._at(PassShape(width)).run(feeds, cache, past_length)
        rows = to_host(feeds["logit_rows"])
        shape = covering_shape(self._sessions, PassShape(width, rows.shape[0]))
        outputs = self._at(shape).run({**feeds, "logit_rows": _padded(rows, shape.rows)}, cache, past_length)
        return {**outputs, "logits": to_host(outputs["logits"])[:, : rows.shape[0]]}

    def _at(self, shape: PassShape) -> LoadedSegment:
        if shape not in self._sessions:
            self._sessions[shape] = self._load(shape)
        return self._sessions[shape]


class OpenVinoPluginDevice(OnnxRuntimeDevice):
    """One device of OpenVINO's plugin.

    Attributes:
        precision: the arithmetic it computes in.
    """

    def __init__(self, unit: str, device: Any, precision: Precision) -> None:
        """Take a device that ONNX Runtime listed, an `OrtEpDevice`."""
        super().__init__(f"openvino:{unit}", Provider(PROVIDER), Form.ROWS)
        self.precision = precision
        self._unit = unit
        self._device = device

    def load_segment(  # type: ignore[override]  # any LoadedSegment serves the protocol
        self, folder: Path, segment: Segment, *, capacity: int, widths: Sequence[int], threads: int
    ) -> ShapedSegment:
        """Load a segment of the bundle at `folder`; see `base.Device.load_segment`.

        Raises:
            DeviceError: the bundle lacks the rows form, or the plugin can't take the whole graph.
        """
        graph = rows_graph(segment, self.name)

        def load(shape: PassShape) -> OnnxRuntimeSegment:
            options = self.session_options(segment.name, threads)
            for dimension, size in shape.sizes(capacity).items():
                options.add_free_dimension_override_by_name(dimension, size)
            session = self._open_listed(folder / graph.file, options, threads)
            return OnnxRuntimeSegment(segment.name, session, graph, Form.ROWS, self._provider)

        return ShapedSegment(segment.name, graph, widths, load)

    def _open_listed(self, path: Path, options: ort.SessionOptions, threads: int) -> ort.InferenceSession:
        # Without this, nodes that the plugin leaves out would run on the CPU, unsaid.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([self._device], plugin_options(self._unit, self.precision, threads))
        try:
            return ort.InferenceSession(path, options)
        except Exception as error:
            raise DeviceError(f"{self.name} can't load {path.name}: {error}") from error


def open_plugin_device(unit: str, precision: Precision | None) -> OpenVinoPluginDevice:
    """Return a device that the plugin lists under `unit`.

    Raises:
        DeviceError: it can't compute in that precision.
    """
    check_precision(unit, precision)
    return OpenVinoPluginDevice(unit, registered_devices()[unit], precision or default_precision(unit))


@functools.cache
def registered_devices() -> dict[str, Any]:
    """Return the plugin's devices, each an `OrtEpDevice`, by OpenVINO's names; empty where it supports none."""
    plugin = importlib.import_module("onnxruntime_ep_openvino")
    ort.register_execution_provider_library(_REGISTRATION, plugin.get_library_path())
    listed = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return {str(device.ep_metadata["ov_device"]): device for device in listed}


def plugin_options(unit: str, precision: Precision, threads: int) -> dict[str, str]:
    """Return the plugin's options: OpenVINO's own properties, as JSON by device kind."""
    kind = unit.partition(".")[0]
    settings = compile_settings(unit, precision, threads, kernel_cache(unit))
    return {"load_config": json.dumps({kind: {key: _text(value) for key, value in settings.items()}})}


def _text(value: Any) -> str:
    return ("YES" if value else "NO") if isinstance(value, bool) else str(value)


def _padded(rows: Array, count: int) -> Array:
    """Return logit rows, int64 [n], with the last one repeated up to `count`."""
    return np.concatenate([rows, np.repeat(rows[-1:], count - rows.shape[0])])
