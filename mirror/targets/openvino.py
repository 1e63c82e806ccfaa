"""Intel CPUs, GPUs and NPUs (and other x86 CPUs) by OpenVINO itself.

OpenVINO keeps no cache in place: a graph in rows form reads the cache and returns the new rows, and
this module writes them to their slots, in host memory that the graph reads without a copy. It knows
shapes, tensors and requests; what to compile for is decided in `static_shapes`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mirror.bundle import Compiled, Form, Graph, LayerKV, Segment, TensorSpec, kv_names
from mirror.errors import DeviceError
from mirror.targets.artefacts import Quantized, Wanted, artefact_stem, compiled_for, graph_sha256
from mirror.targets.base import Array, KVCache, LoadRequest, PassShape, RowTable, StoredWeights, Tensor, to_host
from mirror.targets.names import Precision
from mirror.targets.openvino_model import read_model
from mirror.targets.openvino_package import ov
from mirror.targets.openvino_settings import (
    check_precision,
    compile_settings,
    default_precision,
    held_bytes,
    kernel_cache,
    least_threads,
    padded_width,
    rows_graph,
    settle_precision,
    slots_for,
    takes_any_slots,
)
from mirror.targets.static_shapes import (
    BRANCH_MAP,
    PRESENT_PREFIX,
    concrete,
    covering_shape,
    first_shapes,
    host_inputs,
    past_name,
    rows_outputs,
    width_input,
    widths_of,
)
from mirror.targets.survey import no_such_unit, virtual_npus

_LOG = logging.getLogger("mirror")

_ELEMENT_TYPES = {
    "float32": ov.Type.f32,
    "float16": ov.Type.f16,
    "bfloat16": ov.Type.bf16,
    "int64": ov.Type.i64,
    "int32": ov.Type.i32,
}

# Each static width holds its own copy of the weights, laid out for its kernels. Up to this much in
# all, a segment gets static widths (2 to 10% faster); past it, one program of free width serves all.
_STATIC_WEIGHTS_BYTES = 1 << 30


class OpenVinoCache:
    """KV buffers of some layers, `[1, heads, slots, head_dim]` each, in host memory.

    Attributes:
        slots: how many the buffers have now, the capacity at most.
        tensors: each buffer as a request takes it, by its `past_key_values` name; a new mapping when `fit` makes
            new buffers.
    """

    def __init__(self, layers: Sequence[LayerKV], capacity: int, stored_as: Any = None) -> None:
        """Make zeroed buffers of the bundle's types, or all of one, an `ov.Type`."""
        self._capacity = capacity
        self._layout: dict[str, tuple[Any, int, int]] = {}  # type, heads, head_dim
        for layer in layers:
            for name in kv_names("past_key_values", layer.layer):
                self._layout[name] = (stored_as or _ELEMENT_TYPES[layer.dtype], layer.heads, layer.head_dim)
        self._make(capacity)

    @property
    def capacity(self) -> int:
        """The most slots that it may have."""
        return self._capacity

    def fit(self, slots: int, past_length: int) -> None:
        """Have `slots` slots at least, and no more where none is filled; the first `past_length` keep their rows."""
        if slots > self.slots or (past_length == 0 and slots < self.slots):
            old, kept = self._arrays, min(past_length, self.slots)
            self._make(slots)
            for name, array in self._arrays.items():
                array[:, :, :kept] = old[name][:, :, :kept]

    def write_rows(self, name: str, rows: Array, past_length: int) -> None:
        """Copy new rows `[1, heads, width, head_dim]` to slots `past_length..`; those past the end are dropped."""
        kept = min(rows.shape[2], self.slots - past_length)
        self._arrays[name][:, :, past_length : past_length + kept] = rows[:, :, :kept]

    def _make(self, slots: int) -> None:
        self.slots = slots
        self.tensors: dict[str, Any] = {}
        for name, (element_type, heads, head_dim) in self._layout.items():
            tensor = ov.Tensor(element_type, ov.Shape((1, heads, slots, head_dim)))
            tensor.data[...] = 0  # a hidden slot counts nothing times its value, which must be a number
            self.tensors[name] = tensor
        self._arrays = {name: tensor.data for name, tensor in self.tensors.items()}


class _Program:
    """One compiled shape: a request whose buffers stay bound from pass to pass.

    Attributes:
        outputs: catalogue outputs by name, written by every run.
    """

    def __init__(
        self, request: Any, graph: Graph, sizes: Mapping[str, int], cache_type: Any, *, any_slots: bool
    ) -> None:
        """Bind a request.

        Args:
            cache_type: the `ov.Type` that the cache is kept in, None for the bundle's.
            any_slots: whether it takes a cache of any number of slots, not the capacity's alone.
        """
        self._request = request
        self._sizes = sizes
        self._any_slots = any_slots
        self._per_slot = [spec for spec in host_inputs(graph) if "capacity" in spec.shape]
        self._staging = {spec.name: _bound_buffer(request, spec, sizes) for spec in host_inputs(graph)}
        buffers = {spec.name: _bound_buffer(request, spec, sizes, cache_type) for spec in graph.outputs}
        self.outputs = {name: array for name, array in buffers.items() if not name.startswith(PRESENT_PREFIX)}
        self._new_rows = {past_name(name): array for name, array in buffers.items() if name not in self.outputs}
        self._past: Mapping[str, Any] | None = None

    def run(self, host: Mapping[str, Array], cache: OpenVinoCache | None, past_length: int) -> None:
        """Run one pass over host-computed inputs and write its new rows to the cache."""
        if cache is not None:
            cache.fit(self._slots(past_length), past_length)
            if cache.tensors is not self._past:
                self._read_from(cache)
        for name, buffer in self._staging.items():
            _stage(name, buffer, host[name])
        self._request.start_async()  # `infer` would do the same and then collect all outputs, for 0.07 ms
        self._request.wait()  # until the last output is written
        if cache is not None:
            for name, rows in self._new_rows.items():
                cache.write_rows(name, rows, past_length)

    def _slots(self, past_length: int) -> int:
        """Return the slots of the cache that a pass needs."""
        capacity = self._sizes["capacity"]
        return slots_for(past_length + self._sizes["width"], capacity) if self._any_slots else capacity

    def _read_from(self, cache: OpenVinoCache) -> None:
        for name in self._new_rows:
            self._request.set_tensor(name, cache.tensors[name])
        for spec in self._per_slot:
            self._staging[spec.name] = _bound_buffer(self._request, spec, {**self._sizes, "capacity": cache.slots})
        self._past = cache.tensors


class OpenVinoSegment:
    """One graph on one OpenVINO device, a program per compiled shape."""

    def __init__(
        self, name: str, compiler: _Compiler, graph: Graph, shapes: Sequence[PassShape], later: Sequence[PassShape]
    ) -> None:
        self.name = name
        self._compiler = compiler
        self._widths = widths_of(shapes)
        self._shapes = first_shapes(graph, [*shapes, *later])
        self._by_row = rows_outputs(graph)
        self._width_input = width_input(graph)
        self._names = frozenset(spec.name for spec in host_inputs(graph))
        self._keeps_cache = len(self._names) < len(graph.inputs)
        self._programs = {shape: compiler.program(shape) for shape in first_shapes(graph, shapes)}

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The widths that it was compiled for at first."""
        return self._widths

    @property
    def input_names(self) -> frozenset[str]:
        """The catalogue inputs that the graph declares."""
        return self._names

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        """Run one pass; see `base.LoadedSegment.run`.

        Raises:
            DeviceError: the width was not compiled, the cache is another device's, or the pass failed.
        """
        host = {name: to_host(feeds[name]) for name in self._names}
        name, axis = self._width_input
        rows = host["logit_rows"].shape[0] if "logit_rows" in host else 0
        program = self._program(PassShape(host[name].shape[axis], rows))
        try:
            program.run(host, self._own(cache), past_length)
        except RuntimeError as error:
            raise DeviceError(f"{self.name} failed on {self._compiler.name}: {_plain(error)}") from error
        if not rows:
            return program.outputs
        return {**program.outputs, **{name: program.outputs[name][:, :rows] for name in self._by_row}}

    def _program(self, wanted: PassShape) -> _Program:
        if wanted.width not in widths_of(self._shapes):
            raise DeviceError(
                f"{self.name} is loaded for widths {widths_of(self._shapes)}, asked for {wanted.width}; load it for it"
            )
        shape = covering_shape(self._shapes, wanted)
        if shape not in self._programs:
            self._programs[shape] = self._compiler.program(shape)
        return self._programs[shape]

    def _own(self, cache: KVCache | None) -> OpenVinoCache | None:
        if not self._keeps_cache:
            return None
        slots = self._compiler.capacity
        if isinstance(cache, OpenVinoCache) and cache.capacity == slots:
            return cache
        raise DeviceError(f"{self.name} needs a cache of {slots} slots made by {self._compiler.name}, got {cache!r}")


class _Compiler:
    """One read model, compiled for one shape after another, or once for every width."""

    def __init__(
        self,
        name: str,
        unit: str,
        path: Path,
        graph: Graph,
        capacity: int,
        settings: Mapping[str, Any],
        cache_type: Any,
        ready: Callable[[PassShape], Path | None] = lambda shape: None,
    ) -> None:
        """Read a model.

        Args:
            name: the device's, for messages.
            cache_type: the `ov.Type` that the cache is kept in, None for the bundle's.
            ready: knows what was compiled ahead of time.
        """
        self.name = name
        self.capacity = capacity
        self._unit = unit
        self._path = path
        self._graph = graph
        self._settings = settings
        self._ready = ready
        self._cache_type = cache_type
        self._any_slots = takes_any_slots(unit, graph)
        self._core = ov.Core()
        self._model = self._read()
        self._shared: Any = None

    @property
    def weights_bytes(self) -> int:
        """The bytes of the model's weights, once."""
        constants = (node for node in self._model.get_ops() if node.get_type_name() == "Constant")
        return sum(int(node.get_byte_size()) for node in constants)

    def share(self) -> None:
        """Compile once, with the width left free, for all requests from now on."""
        self._shared = self._compile(self._open({"width": -1, "rows": -1, "capacity": self.capacity}))

    def program(self, shape: PassShape) -> _Program:
        """Return a program of a shape: compiled for it, or a request of the shared one."""
        sizes = shape.sizes(self.capacity)
        imported = None if self._shared else self._imported(shape)
        compiled = self._shared or imported or self._compile(self._open(sizes))
        any_slots = self._any_slots and imported is None
        return _Program(compiled.create_infer_request(), self._graph, sizes, self._cache_type, any_slots=any_slots)

    def _open(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """Leave the number of slots free where passes take the filled ones only."""
        return {**sizes, "capacity": -1} if self._any_slots else sizes

    def export(self, shape: PassShape, path: Path) -> None:
        """Compile for a shape and write the program to a file."""
        compiled = self._compile(shape.sizes(self.capacity))
        try:
            path.write_bytes(compiled.export_model().getvalue())
        except RuntimeError as error:
            raise DeviceError(f"{self.name} can't export {path.name}: {_plain(error)}") from error

    def _imported(self, shape: PassShape) -> Any:
        """Return a program that was compiled ahead of time, None where there is none that loads."""
        path = self._ready(shape)
        if path is None:
            return None
        try:
            return self._core.import_model(path.read_bytes(), self._unit, dict(self._settings))
        except RuntimeError as error:
            _LOG.warning("%s is not used: %s; compiling %s anew", path.name, _plain(error), self._path.name)
            return None

    def _read(self) -> Any:
        try:
            return read_model(self._core, self._path, self._unit, self._cache_type)
        except RuntimeError as error:
            raise DeviceError(f"OpenVINO can't read {self._path.name}: {_plain(error)}") from error

    def _compile(self, sizes: Mapping[str, int]) -> Any:
        shapes = {spec.name: ov.PartialShape(list(concrete(spec, sizes))) for spec in self._graph.inputs}
        try:
            self._model.reshape(shapes)
            return self._core.compile_model(self._model, self._unit, dict(self._settings))
        except RuntimeError as error:
            raise DeviceError(f"{self.name} can't compile {self._path.name}: {_plain(error)}") from error


class OpenVinoDevice:
    """One OpenVINO device.

    Attributes:
        precision: the arithmetic it computes in.
    """

    def __init__(self, unit: str, precision: Precision, kernel_cache: Path | None) -> None:
        """Take a device as it is; `open_native_device` checks that it is there.

        Args:
            unit: OpenVINO's name for it, such as `CPU` or `GPU.0`.
            kernel_cache: where compiled programs are kept for the next start, None for nowhere.
        """
        self.precision = precision
        self._unit = unit
        self._kernel_cache = kernel_cache

    @property
    def name(self) -> str:
        """As the user writes it, without the precision."""
        return f"openvino:{self._unit}"

    @property
    def form(self) -> Form:
        """The cache form of the graphs that this device takes."""
        return Form.ROWS

    @property
    def int8_drafts(self) -> bool:
        """Its operators don't round products so."""
        return False

    @property
    def padded_width(self) -> int:
        """See `openvino_settings.padded_width`."""
        return padded_width(self._unit)

    def weight_bytes(self, segment: Segment, stored: StoredWeights, shapes: Sequence[PassShape]) -> int:
        """See `openvino_settings.held_bytes`."""
        widths = len(widths_of(shapes))
        programs = 1 if self._shares(stored.bytes, widths) else widths
        return held_bytes(self._unit, stored, programs, self.precision)

    def _shares(self, weights_bytes: int, widths: int) -> bool:
        """Return whether one program of free width serves all of a segment's."""
        return self._unit != "NPU" and weights_bytes * widths > _STATIC_WEIGHTS_BYTES

    def load_segment(self, request: LoadRequest) -> OpenVinoSegment:
        """Load a segment; see `base.Device.load_segment`.

        Raises:
            DeviceError: the bundle lacks the rows form, or OpenVINO can't take the graph.
        """

        def ready(shape: PassShape) -> Path | None:
            item = self.fitting(request, shape)
            return None if item is None else request.folder / item.file

        graph = rows_graph(request.segment, self.name)
        compiler = self._compiler(request, graph, self._kernel_cache, ready)
        if self._shares(compiler.weights_bytes, len(widths_of(request.shapes))):
            compiler.share()
        return OpenVinoSegment(request.segment.name, compiler, graph, request.shapes, request.later)

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> OpenVinoCache:
        """Return a zeroed cache for these layers."""
        return OpenVinoCache(layers, capacity, self._cache_type)

    @property
    def launches(self) -> bool:
        """A pass has ended when it returns."""
        return False

    def make_table(self, rows: int, columns: int) -> RowTable:
        """Refuse; see `base.Device.make_table`."""
        raise DeviceError(f"{self.name} waits for each pass; tables are for devices that only launch them")

    @property
    def _cache_type(self) -> Any:
        """Keys and values that a CPU reads in bfloat16 are kept so: else each pass would convert the whole cache."""
        return ov.Type.bf16 if self._unit == "CPU" and self.precision is Precision.BF16 else None

    @property
    def compiles_for(self) -> str:
        """The device in artefacts' records."""
        return self.name

    def fitting(self, request: LoadRequest, shape: PassShape, weights: str | None = None) -> Compiled | None:
        """Return the artefact that serves a pass; see `base.AheadCompiler`."""
        wanted = Wanted(self.name, self._runtime(), self._told(request.threads), request.capacity, weights)
        return compiled_for(request.folder, request.segment, shape, wanted)

    def compile_segment(self, request: LoadRequest, shape: PassShape, quantized: Quantized | None = None) -> Compiled:
        """Compile a segment for one pass into the bundle's folder; see `base.AheadCompiler`.

        Raises:
            DeviceError: OpenVINO can't take the graph, or quantized weights were asked for.
        """
        if quantized is not None:
            raise DeviceError(
                f"quantized weights are made for Hexagon NPUs and can't be compiled for {self.name}; leave --weights "
                "out, or export the bundle with --precision int8"
            )
        file = f"{artefact_stem(self.name, request.segment.name, shape, request.capacity)}.blob"
        path = request.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        self._compiler(request, rows_graph(request.segment, self.name), None).export(shape, path)
        made_with = (self._runtime(), self._told(request.threads), graph_sha256(request.folder, request.segment))
        return Compiled(self.name, shape.width, shape.rows, request.capacity, file, *made_with)

    def _compiler(
        self,
        request: LoadRequest,
        graph: Graph,
        kernel_cache: Path | None,
        ready: Callable[[PassShape], Path | None] = lambda shape: None,
    ) -> _Compiler:
        settings = compile_settings(self._unit, self.precision, request.threads, kernel_cache)
        path, kept = request.folder / graph.file, self._cache_type
        return _Compiler(self.name, self._unit, path, graph, request.capacity, settings, kept, ready)

    def _told(self, threads: int) -> dict[str, str]:
        settings = compile_settings(self._unit, self.precision, threads, None)
        kept = {} if self._cache_type is None else {"cache": str(self._cache_type.to_string())}
        return {name: str(value) for name, value in settings.items()} | kept

    def _runtime(self) -> str:
        """Return the compiler, and the hardware that it compiles for: it doesn't check that on import."""
        return f"openvino {ov.get_version()} for {available_units().get(self._unit, self._unit)}"


def open_native_device(unit: str, precision: Precision | None, *, background: bool = False) -> OpenVinoDevice:
    """Return a device by OpenVINO's name for it.

    Args:
        background: whether it is for a draft, which takes bfloat16 on a CPU that has it unless told otherwise.

    Raises:
        DeviceError: OpenVINO doesn't see it, or it can't compute in that precision.
    """
    units = list(available_units())
    if unit not in units and f"{unit}.0" not in units:
        raise DeviceError(f"openvino:{unit} isn't there: {no_such_unit(unit, units)}")
    check_precision(unit, precision)
    default = default_precision(unit, background=background, has_bf16=_has_bf16())
    settled = settle_precision(unit, precision, default, _most_threads(unit, precision or default))
    return OpenVinoDevice(unit, settled or default, kernel_cache(unit))


def open_native_compiler(unit: str, precision: Precision | None) -> OpenVinoDevice:
    """Return a device to compile for: this machine's, or an NPU that isn't here where its compiler is.

    Raises:
        DeviceError: neither is here, or it can't compute in that precision.
    """
    if unit != "NPU" or unit in available_units():
        return open_native_device(unit, precision, background=True)  # only drafts are compiled ahead
    check_precision(unit, precision)
    if not has_npu_compiler():
        known = virtual_npus()
        platforms = f" (ONNX Runtime's plugin could name it platforms {', '.join(known)})" if known else ""
        raise DeviceError(
            "openvino:NPU can't be compiled for here: OpenVINO sees no NPU, and its compiler for NPUs "
            f"(libopenvino_intel_npu_compiler), which no package on PyPI carries, is not beside it{platforms}; run "
            "this on the machine with the NPU, or put the compiler from Intel's NPU driver into openvino/libs"
        )
    return OpenVinoDevice(unit, Precision.F16, None)


def has_npu_compiler() -> bool:
    """Return whether Intel's compiler for NPUs lies beside OpenVINO."""
    return any(Path(ov.__file__).parent.rglob("libopenvino_intel_npu_compiler*"))


def available_units() -> dict[str, str]:
    """Return the devices that OpenVINO sees, with the hardware's own names."""
    core = ov.Core()
    return {unit: str(core.get_property(unit, "FULL_DEVICE_NAME")) for unit in core.available_devices}


def _has_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16."""
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _most_threads(unit: str, precision: Precision) -> int:
    """Return how many threads OpenVINO takes on a CPU, as many as a precision needs at least if it can.

    It caps what it is told at the CPUs that the process may use, by rules of its own: a program that does
    nothing shows the number.
    """
    needed = least_threads(unit, precision)
    if needed == 1:
        return needed
    nothing = ov.opset13.parameter([1], ov.Type.f32)
    settings = compile_settings(unit, precision, needed, None)
    compiled = ov.Core().compile_model(ov.Model([ov.opset13.relu(nothing)], [nothing]), unit, settings)
    return int(compiled.get_property("INFERENCE_NUM_THREADS"))


def device_memory_bytes(unit: str) -> int | None:
    """Return a GPU's memory in bytes, None where OpenVINO doesn't see it."""
    core = ov.Core()
    if not {unit, f"{unit}.0"} & set(core.available_devices):
        return None
    return int(core.get_property(unit, "GPU_DEVICE_TOTAL_MEM_SIZE"))


def _bound_buffer(request: Any, spec: TensorSpec, sizes: Mapping[str, int], cache_type: Any = None) -> Array:
    """Give a request a buffer for one input or output; return it as an array of the spec's shape and dtype.

    numpy has no bfloat16: rows of the cache in `cache_type`, an `ov.Type`, come as float16 and are only copied.
    """
    kept_apart = cache_type is not None and spec.name.startswith(PRESENT_PREFIX)
    element_type = cache_type if kept_apart else _ELEMENT_TYPES[spec.dtype]
    tensor = ov.Tensor(element_type, ov.Shape(concrete(spec, sizes)))
    request.set_tensor(spec.name, tensor)
    array: Array = tensor.data
    return array


def _stage(name: str, buffer: Array, values: Array) -> None:
    """Copy one input to where the request reads it; fewer `logit_rows` repeat the last, a longer branch map is cut."""
    if name == "logit_rows":
        buffer[: values.shape[0]] = values
        buffer[values.shape[0] :] = values[-1]
    elif name == BRANCH_MAP:
        buffer[...] = values[: buffer.shape[0]]
    else:
        buffer[...] = values


def _plain(error: RuntimeError) -> str:
    """Return what an OpenVINO error says, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(said[:4]) or repr(error)
