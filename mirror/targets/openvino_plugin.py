"""Intel devices by OpenVINO's plugin for ONNX Runtime, where it is installed and lists them.

A thin layer over `onnxruntime_session`: the plugin compiles for fixed sizes (a draft's slots on a CPU
apart), so a segment is one session per compiled shape, chosen as `static_shapes` says.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from mirror.bundle import Form, Graph, Segment
from mirror.errors import DeviceError
from mirror.targets.base import Array, LoadRequest, PassShape, StoredWeights, Tensor, to_host
from mirror.targets.cores import allowed_cpus
from mirror.targets.names import Precision
from mirror.targets.onnxruntime_session import (
    Bound,
    OnnxRuntimeCache,
    OnnxRuntimeDevice,
    OnnxRuntimeSegment,
    Provider,
)
from mirror.targets.openvino_settings import (
    check_precision,
    compile_settings,
    default_precision,
    held_bytes,
    kernel_cache,
    padded_width,
    rows_graph,
    settle_precision,
    slots_for,
    takes_any_slots,
)
from mirror.targets.shaped_segment import ShapedSegment
from mirror.targets.static_shapes import BRANCH_MAP, past_name, widths_of

PROVIDER = "OpenVINOExecutionProvider"
_REGISTRATION = "OpenVINO"
_VIRTUAL = "OpenVINO.virtual"


class FedSegment(OnnxRuntimeSegment):
    """One session that is given its inputs anew at every pass, of the cache the filled slots where it takes any number.

    With inputs bound once, as ONNX Runtime's own providers read them, drafts on an Intel CPU guessed next to
    no token right, although a first pass without binding computed what it should.
    """

    def __init__(
        self, name: str, session: ort.InferenceSession, graph: Graph, provider: Provider, *, any_slots: bool
    ) -> None:
        """Take a session of a graph in rows form; with `any_slots` its capacity is left open."""
        super().__init__(name, session, graph, Form.ROWS, provider)
        self._any_slots = any_slots

    def _launch(self, bound: Bound, feeds: Mapping[str, Tensor]) -> None:
        for name, array in bound.staging.items():
            array[...] = to_host(feeds[name])
        given = dict(bound.staging)
        if isinstance(bound.cache, OnnxRuntimeCache):
            given |= {name: buffer.numpy() for name, buffer in bound.cache.buffers.items()}
            if self._any_slots:
                given |= self._filled(given, bound.cache.capacity)
        names = [spec.name for spec in self._outputs]
        try:
            results = self.session.run(names, given)
        except Exception as error:
            raise DeviceError(f"{self.name} failed on {self._provider.name}: {error}") from error
        for name, result in zip(names, results, strict=True):
            rows = bound.new_rows.get(past_name(name))
            to_host(bound.outputs[name] if rows is None else rows)[...] = result

    def _filled(self, given: Mapping[str, Array], capacity: int) -> dict[str, Array]:
        """Return the branch map and the cache up to the slots that a pass needs."""
        slots = slots_for(int(given["past_length"][0]) + given["input_ids"].shape[1], capacity)
        return {BRANCH_MAP: given[BRANCH_MAP][:slots], **{name: given[name][:, :, :slots] for name in self._past}}


class OpenVinoPluginDevice(OnnxRuntimeDevice):
    """One device of OpenVINO's plugin.

    Attributes:
        precision: the arithmetic it computes in, None for OpenVINO's own choice.
    """

    def __init__(self, unit: str, device: Any, precision: Precision | None) -> None:
        """Take a device that ONNX Runtime listed, an `OrtEpDevice`."""
        super().__init__(f"openvino:{unit}", Provider(PROVIDER), Form.ROWS)
        self.precision = precision
        self._unit = unit
        self._device = device

    @property
    def padded_width(self) -> int:
        """See `openvino_settings.padded_width`."""
        return padded_width(self._unit)

    def weight_bytes(self, segment: Segment, stored: StoredWeights, shapes: Sequence[PassShape]) -> int:
        """See `openvino_settings.held_bytes`: each width is a session."""
        return held_bytes(self._unit, stored, len(widths_of(shapes)), self.precision)

    def load_segment(self, request: LoadRequest) -> ShapedSegment:
        """Load a segment; see `base.Device.load_segment`.

        Raises:
            DeviceError: the bundle lacks the rows form, or the plugin can't take the whole graph.
        """
        name, graph = request.segment.name, rows_graph(request.segment, self.name)
        any_slots = takes_any_slots(self._unit, graph)

        def load(shape: PassShape) -> OnnxRuntimeSegment:
            options = self.session_options(name, request.threads)
            for dimension, size in shape.sizes(request.capacity).items():
                if not (any_slots and dimension == "capacity"):
                    options.add_free_dimension_override_by_name(dimension, size)
            session = self._open_listed(request.folder / graph.file, options, request.threads)
            return FedSegment(name, session, graph, self._provider, any_slots=any_slots)

        return ShapedSegment(name, graph, request.shapes, load, request.later)

    def _open_listed(self, path: Path, options: ort.SessionOptions, threads: int) -> ort.InferenceSession:
        # Without this, nodes that the plugin leaves out would run on the CPU, unsaid.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([self._device], plugin_options(self._unit, self.precision, threads))
        try:
            return ort.InferenceSession(path, options)
        except Exception as error:
            raise DeviceError(f"{self.name} can't load {path.name}: {error}") from error


def open_plugin_device(unit: str, precision: Precision | None, *, background: bool = False) -> OpenVinoPluginDevice:
    """Return a device that the plugin lists under `unit`.

    Args:
        background: whether it is for a draft, which takes bfloat16 on a CPU that has it unless told otherwise.

    Raises:
        DeviceError: it can't compute in that precision.
    """
    check_precision(unit, precision)
    chosen = plugin_precision(unit, precision, background=background)
    return OpenVinoPluginDevice(
        unit, registered_devices()[unit], settle_precision(unit, precision, chosen, allowed_cpus())
    )


@functools.cache
def registered_devices() -> dict[str, Any]:
    """Return the plugin's devices, each an `OrtEpDevice`, by OpenVINO's names; empty where it supports none."""
    plugin = importlib.import_module("onnxruntime_ep_openvino")
    ort.register_execution_provider_library(_REGISTRATION, plugin.get_library_path())
    listed = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return {str(device.ep_metadata["ov_device"]): device for device in listed}


def virtual_platforms() -> tuple[str, ...]:
    """Return the Intel NPUs that the plugin knows how to compile for without having one, by Intel's numbers, ascending.

    It lists them under a registration whose name ends so; that is undone, since they run nothing.
    """
    plugin = importlib.import_module("onnxruntime_ep_openvino")
    ort.register_execution_provider_library(_VIRTUAL, plugin.get_library_path())
    try:
        listed = [device.ep_metadata.get("npu_platform") for device in ort.get_ep_devices()]
    finally:
        ort.unregister_execution_provider_library(_VIRTUAL)
    return tuple(sorted(platform for platform in listed if platform))


def plugin_precision(unit: str, asked: Precision | None, *, background: bool) -> Precision | None:
    """Return what a device computes in; None leaves it to OpenVINO, which knows whether a CPU has bfloat16."""
    if asked is None and background and unit == "CPU":
        return None
    return asked or default_precision(unit)


def plugin_options(unit: str, precision: Precision | None, threads: int) -> dict[str, str]:
    """Return the plugin's options: OpenVINO's own properties, as JSON by device kind."""
    kind = unit.partition(".")[0]
    settings = compile_settings(unit, precision, threads, kernel_cache(unit))
    return {"load_config": json.dumps({kind: {key: _text(value) for key, value in settings.items()}})}


def _text(value: Any) -> str:
    return ("YES" if value else "NO") if isinstance(value, bool) else str(value)
