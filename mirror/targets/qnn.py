"""Hexagon NPUs by Qualcomm's provider for ONNX Runtime: the NPU itself, or its emulator on x86-64 machines.

The provider compiles for fixed sizes, so a segment is one session per compiled shape. Nothing is left to the
CPU: a graph that the NPU can't take whole is refused, node by node. This module knows sessions and options;
chips are in `hexagon`, artefacts compiled ahead in `artefacts`, the reasons of a refusal in `qnn_refusal`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from mirror.bundle import Compiled, Form, Segment
from mirror.errors import DeviceError
from mirror.targets.artefacts import WEIGHTS, Quantized, Wanted, artefact_stem, compiled_for, graph_sha256
from mirror.targets.base import LoadRequest, PassShape
from mirror.targets.hexagon import DEFAULT_ARCHITECTURE, Chip, chip
from mirror.targets.onnxruntime_session import OnnxRuntimeDevice, OnnxRuntimeSegment, Provider
from mirror.targets.openvino_settings import rows_graph
from mirror.targets.qnn_refusal import refused_nodes, sentence
from mirror.targets.shaped_segment import ShapedSegment
from mirror.targets.static_shapes import NPU_ROWS
from mirror.targets.survey import INSTALL_QNN

_LOG = logging.getLogger("mirror")

PROVIDER = "QNN"
PACKAGE = "onnxruntime_qnn"


class QnnDevice(OnnxRuntimeDevice):
    """One Hexagon NPU, or the emulator.

    Attributes:
        chip: what to compile for; None lets the NPU of this machine say.
    """

    def __init__(self, device: Any, backend: str, chip: Chip | None) -> None:
        """Take a device that ONNX Runtime listed, an `OrtEpDevice`; `backend` is Qualcomm's library for it."""
        super().__init__(f"qnn:{'emulator' if is_emulated() else 'htp'}", Provider(PROVIDER), Form.ROWS)
        self.chip = chip
        self._device = device
        self._backend = backend

    @property
    def compiles_for(self) -> str:
        """The device in an artefact's record: `qnn:v73`."""
        return _compiled_for(self.chip)

    @property
    def padded_width(self) -> int:
        """Each shape takes seconds, and an artefact that holds all weights."""
        return NPU_ROWS

    def load_segment(self, request: LoadRequest) -> ShapedSegment:
        """Load a segment; see `base.Device.load_segment`.

        Raises:
            DeviceError: the bundle lacks the rows form, or the NPU can't take the whole graph.
        """
        name, graph = request.segment.name, rows_graph(request.segment, self.name)

        def load(shape: PassShape) -> OnnxRuntimeSegment:
            session = self._ready_session(request, shape)
            if session is None:
                options, sizes = self._options(name, request.threads), shape.sizes(request.capacity)
                session = self._open(request.folder / graph.file, options, sizes)
            return OnnxRuntimeSegment(name, session, graph, Form.ROWS, self._provider)

        return ShapedSegment(name, graph, request.shapes, load, request.later)

    def fitting(self, request: LoadRequest, shape: PassShape, weights: str | None = None) -> Compiled | None:
        """Return the artefact that serves a pass; see `base.AheadCompiler`. An NPU that wasn't named takes any."""
        named = [self.chip] if self.chip is not None else _chips(request.segment)
        for one in named:
            wanted = Wanted(_compiled_for(one), runtime_version(), compile_options(one), request.capacity, weights)
            found = compiled_for(request.folder, request.segment, shape, wanted)
            if found is not None:
                return found
        return None

    def compile_segment(self, request: LoadRequest, shape: PassShape, quantized: Quantized | None = None) -> Compiled:
        """Compile a segment for one pass into the bundle's folder; see `base.AheadCompiler`.

        Raises:
            DeviceError: the NPU can't take the whole graph.
        """
        segment, told = request.segment, compile_options(self.chip)
        source = request.folder / rows_graph(segment, self.name).file
        if quantized is not None:
            source = quantized.folder / rows_graph(quantized.segments[segment.name], self.name).file
            told |= {WEIGHTS: quantized.weights}
        file = f"{artefact_stem(self.compiles_for, segment.name, shape, request.capacity)}.onnx"
        target = request.folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # ONNX Runtime writes over none
        options = self._options(segment.name, request.threads)
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(target))
        options.add_session_config_entry("ep.context_embed_mode", "0")
        self._open(source, options, shape.sizes(request.capacity))
        made_with = (runtime_version(), told, graph_sha256(request.folder, segment))
        return Compiled(self.compiles_for, shape.width, shape.rows, request.capacity, file, *made_with)

    def _ready_session(self, request: LoadRequest, shape: PassShape) -> ort.InferenceSession | None:
        """Return a session over an artefact of the bundle, None where none fits or the NPU refuses it."""
        item = self.fitting(request, shape)
        if item is None:
            return None
        name = request.segment.name
        try:
            return self._open(request.folder / item.file, self._options(name, request.threads), {})
        except DeviceError as error:
            _LOG.warning("%s is not used: %s; compiling %s anew", item.file, error, name)
            return None

    def _options(self, name: str, threads: int) -> ort.SessionOptions:
        options = self.session_options(name, threads)
        options.log_severity_level = 4  # a refusal is told by the error, once
        # Without this, nodes that the NPU can't take would run on the CPU, unsaid.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([self._device], self._provider_options())
        return options

    def _provider_options(self) -> dict[str, str]:
        speed = {} if is_emulated() else {"htp_performance_mode": "burst"}
        return {"backend_path": self._backend, **compile_options(self.chip), **speed}

    def _open(self, path: Path, options: ort.SessionOptions, sizes: Mapping[str, int]) -> ort.InferenceSession:
        """Return a session over a graph, its symbolic dimensions fixed to `sizes`."""
        for dimension, size in sizes.items():
            options.add_free_dimension_override_by_name(dimension, size)
        try:
            session = ort.InferenceSession(path, options)
        except Exception as error:
            nodes = refused_nodes(path, sizes, self._provider_options())
            if nodes:
                raise DeviceError(f"{self.name} can't take {path.name} whole: {sentence(nodes)}") from error
            raise DeviceError(f"{self.name} can't load {path.name}: {error}") from error
        if session.get_providers()[0] != PROVIDER:
            raise DeviceError(f"{path.name} was asked to run on {PROVIDER} but got {session.get_providers()[0]}")
        session.disable_fallback()
        return session


def open_qnn(unit: str, chip_name: str | None) -> QnnDevice:
    """Return the Hexagon NPU of this machine, or its emulator where there is none.

    Args:
        unit: `htp`, or `emulator` to insist on it.
        chip_name: architecture or architecture and chip, None for the machine's own.

    Raises:
        DeviceError: the provider isn't installed, this machine has neither, or the chip isn't known.
    """
    if (missing := qnn_missing()) is not None:
        raise DeviceError(f"qnn:{unit} isn't there: {missing}")
    if unit == "emulator" and not is_emulated():
        raise DeviceError("qnn:emulator isn't there: only x86-64 machines have it; this one's NPU is qnn:htp")
    chosen = chip(chip_name or DEFAULT_ARCHITECTURE) if chip_name or is_emulated() else None
    return QnnDevice(registered_device(), backend_path(), chosen)


def open_qnn_compiler(chip_name: str) -> QnnDevice:
    """Return a compiler for a Hexagon NPU, which need not be here.

    Raises:
        DeviceError: the provider isn't installed, or the chip isn't known.
    """
    if (missing := qnn_missing()) is not None:
        raise DeviceError(f"qnn:{chip_name} can't be compiled for: {missing}")
    return QnnDevice(registered_device(), backend_path(), chip(chip_name))


def is_emulated() -> bool:
    """Return whether this machine runs the NPU's programs in Qualcomm's emulator, on its CPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


def qnn_missing() -> str | None:
    """Return why there is no Hexagon device here and what to do, None if there is one."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package onnxruntime-qnn is not installed; run: {INSTALL_QNN}"
    if not Path(backend_path()).is_file():
        return f"{Path(backend_path()).name} is not in the package onnxruntime-qnn; reinstall it: {INSTALL_QNN}"
    if registered_device() is None:
        return "ONNX Runtime's QNN provider lists no Hexagon NPU on this machine; it takes a Snapdragon and its driver"
    return None


def backend_path() -> str:
    """Return the file of Qualcomm's library for the NPU."""
    return str(importlib.import_module(PACKAGE).get_qnn_htp_path())


@functools.cache
def registered_device() -> Any:
    """Return the provider's device, an `OrtEpDevice`: an NPU, or the CPU that emulates one; None without either."""
    if not any(device.ep_name == PROVIDER for device in ort.get_ep_devices()):
        ort.register_execution_provider_library(PROVIDER, importlib.import_module(PACKAGE).get_library_path())
    kind = "CPU" if is_emulated() else "NPU"
    listed = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    return next((device for device in listed if device.device.type.name == kind), None)


def compile_options(chip: Chip | None) -> dict[str, str]:
    """Return what the compiler is told; an artefact made with other options is not used."""
    told = {"enable_htp_fp16_precision": "1"}
    return told | (chip.options if chip is not None else {})


def _compiled_for(chip: Chip | None) -> str:
    return f"qnn:{chip.architecture}" if chip is not None else "qnn:htp"


def _chips(segment: Segment) -> list[Chip | None]:
    """Return what a segment's artefacts were made for: chips, and None for "this machine's own"."""
    found: dict[str, Chip | None] = {}
    for item in segment.compiled:
        family, _, architecture = item.device.partition(":")
        if family == "qnn":
            soc = item.options.get("soc_model")
            found[item.device] = None if soc is None else Chip(architecture, int(soc))
    return list(found.values())


@functools.cache
def runtime_version() -> str:
    """Return the libraries that compile and read artefacts, with their versions."""
    return f"onnxruntime-qnn {importlib.metadata.version('onnxruntime-qnn')}, onnxruntime {ort.__version__}"
