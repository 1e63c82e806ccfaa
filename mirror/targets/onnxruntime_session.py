"""Segments and caches on ONNX Runtime, for any execution provider.

A segment binds everything once per width: inputs that a host computes are staged in buffers whose
address stays put, outputs land in buffers that stay put, and the KV cache is bound as it is. A pass
then copies a few small integers and runs. This module knows memory and bindings; what differs
between devices is a `Provider` and, where need be, a subclass of `OnnxRuntimeDevice`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mirror.bundle import Form, Graph, LayerKV, Segment, TensorSpec, kv_names
from mirror.errors import DeviceError
from mirror.targets.base import Array, KVCache, Tensor

# ONNX's element type numbers; numpy has no bfloat16, so those tensors never become arrays.
_ELEMENT_TYPES = {"float32": 1, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}

# Bindings kept per segment. Decoding needs one per width of a round; prefill remainders come and go.
_KEPT_BINDINGS = 32


@dataclass(frozen=True)
class Memory:
    """Where a provider keeps its tensors: `cpu`, or a device that ONNX Runtime names, with its index."""

    kind: str = "cpu"
    index: int = 0

    @property
    def is_host(self) -> bool:
        """Whether numpy can look at it."""
        return self.kind == "cpu"


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        memory: where outputs, caches and staged inputs live.
        options: the provider's own options.
        host_inputs: catalogue inputs that the provider's kernels read in host memory.
    """

    name: str
    memory: Memory = Memory()
    options: Mapping[str, str] = field(default_factory=dict)
    host_inputs: frozenset[str] = frozenset()


class Buffer:
    """A fixed tensor in a device's memory; a `DeviceTensor`.

    Attributes:
        value: the tensor as ONNX Runtime binds it.
        array: the same memory as a numpy array, where numpy can express it; else None.
    """

    __slots__ = ("array", "value")

    def __init__(self, value: ort.OrtValue, array: Array | None) -> None:
        self.value = value
        self.array = array

    def numpy(self) -> Array:
        """Return the values in host memory; a view on the host, a copy from a device."""
        if self.array is not None:
            return self.array
        copied: Array = self.value.numpy()
        return copied


def make_buffer(memory: Memory, dtype: str, shape: Sequence[int]) -> Buffer:
    """Return a zeroed tensor of a `TensorSpec` dtype in a device's memory."""
    if memory.is_host:
        return _host_buffer(dtype, shape)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _ELEMENT_TYPES[dtype], memory.kind, memory.index)
    if dtype != "bfloat16":
        value.update_inplace(np.zeros(shape, dtype))
    return Buffer(value, None)


def _host_buffer(dtype: str, shape: Sequence[int]) -> Buffer:
    if dtype == "bfloat16":
        # Two bytes per element of zeros are zeros in bfloat16 too.
        raw = np.zeros(shape, np.uint16)
        return Buffer(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _ELEMENT_TYPES[dtype]), None)
    array: Array = np.zeros(shape, dtype)
    return Buffer(ort.OrtValue.ortvalue_from_numpy(array), array)


class OnnxRuntimeCache:
    """KV buffers of some layers, `[1, heads, capacity, head_dim]` each, in one device's memory."""

    def __init__(self, layers: Sequence[LayerKV], capacity: int, memory: Memory) -> None:
        self._capacity = capacity
        self.buffers: dict[str, Buffer] = {}
        for layer in layers:
            shape = (1, layer.heads, capacity, layer.head_dim)
            for name in kv_names("past_key_values", layer.layer):
                self.buffers[name] = make_buffer(memory, layer.dtype, shape)

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self._capacity

    def write_rows(self, past_name: str, rows: Array, past_length: int) -> None:
        """Copy new rows `[1, heads, width, head_dim]` to slots `past_length..` of a host buffer."""
        array = self.buffers[past_name].array
        if array is None:
            raise DeviceError(f"{past_name} is not in host memory; a cache in rows form must be")
        array[:, :, past_length : past_length + rows.shape[2]] = rows


@dataclass(frozen=True)
class _Bound:
    """One width's binding: what it reads, what it writes.

    Attributes:
        staging: host-computed inputs by name, copied into on every pass.
        outputs: catalogue outputs by name, as `run` returns them.
        new_rows: in rows form, the new KV rows by the name of the past they belong to.
        passed: the OrtValue that each directly bound input holds now, by name.
    """

    binding: ort.IOBinding
    staging: Mapping[str, Buffer]
    outputs: Mapping[str, Tensor]
    new_rows: Mapping[str, Array]
    passed: dict[str, ort.OrtValue]
    cache: KVCache | None


class OnnxRuntimeSegment:
    """One graph in one session, with a binding per width."""

    def __init__(self, name: str, session: ort.InferenceSession, graph: Graph, form: Form, provider: Provider) -> None:
        self.name = name
        self.session = session
        self._form = form
        self._provider = provider
        self._inputs = tuple(spec for spec in graph.inputs if not spec.name.startswith("past_key_values."))
        self._outputs = graph.outputs
        self._past = tuple(spec.name for spec in graph.inputs if spec.name.startswith("past_key_values."))
        self._names = frozenset(spec.name for spec in self._inputs)
        self._bound: OrderedDict[tuple[int, int, int], _Bound] = OrderedDict()

    @property
    def widths(self) -> tuple[int, ...] | None:
        """None: any width runs."""
        return None

    @property
    def input_names(self) -> frozenset[str]:
        """The catalogue inputs that the graph declares."""
        return self._names

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        """Run one pass; see `base.LoadedSegment.run`.

        Raises:
            DeviceError: the runtime refused or failed the pass.
        """
        bound = self._binding(feeds, cache)
        for name, buffer in bound.staging.items():
            self._stage(bound, name, buffer, feeds[name])
        try:
            self.session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise DeviceError(f"{self.name} failed on {self._provider.name}: {error}") from error
        if bound.new_rows:
            assert isinstance(cache, OnnxRuntimeCache)
            for past_name, rows in bound.new_rows.items():
                cache.write_rows(past_name, rows, past_length)
        return bound.outputs

    def _stage(self, bound: _Bound, name: str, buffer: Buffer, tensor: Tensor) -> None:
        """Put one input where the binding reads it: copy host values, bind device ones as they are."""
        if isinstance(tensor, Buffer):
            if bound.passed.get(name) is not tensor.value:
                bound.binding.bind_ortvalue_input(name, tensor.value)
                bound.passed[name] = tensor.value
            return
        values = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        if buffer.array is not None:
            buffer.array[...] = values
        else:
            buffer.value.update_inplace(np.ascontiguousarray(values))
        # Where the graph reads an input in another memory than the buffer's (a size that a GPU's graph
        # wants on the host, say), binding makes a copy, which later writes to the buffer don't reach.
        if not self._provider.memory.is_host or bound.passed.get(name) is not buffer.value:
            bound.binding.bind_ortvalue_input(name, buffer.value)
            bound.passed[name] = buffer.value

    def _binding(self, feeds: Mapping[str, Tensor], cache: KVCache | None) -> _Bound:
        positions = feeds["position_ids"]
        rows = feeds.get("logit_rows")
        key = (
            positions.shape[1] if isinstance(positions, np.ndarray) else 0,
            rows.shape[0] if isinstance(rows, np.ndarray) else 0,
            0 if cache is None else id(cache),
        )
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(key[0], key[1], cache)
            if len(self._bound) > _KEPT_BINDINGS:
                self._bound.popitem(last=False)
        else:
            self._bound.move_to_end(key)
        return bound

    def _bind(self, width: int, rows: int, cache: KVCache | None) -> _Bound:
        if self._past and not isinstance(cache, OnnxRuntimeCache):
            raise DeviceError(f"{self.name} keeps a KV cache; run it with one that its own device made")
        binding = self.session.io_binding()
        sizes = {"width": width, "rows": rows, "capacity": 0 if cache is None else cache.capacity}
        staging = {spec.name: self._staging(spec, sizes) for spec in self._inputs}
        outputs: dict[str, Tensor] = {}
        new_rows: dict[str, Array] = {}
        past = cache.buffers if isinstance(cache, OnnxRuntimeCache) else {}
        for name in self._past:
            binding.bind_ortvalue_input(name, past[name].value)
        for spec in self._outputs:
            past_name = spec.name.replace("present.", "past_key_values.", 1)
            if past_name in past and self._form is Form.INPLACE:
                binding.bind_ortvalue_output(spec.name, past[past_name].value)
                continue
            buffer = make_buffer(self._provider.memory, spec.dtype, _shape(spec, sizes))
            binding.bind_ortvalue_output(spec.name, buffer.value)
            if past_name in past:
                new_rows[past_name] = buffer.numpy()
            else:
                outputs[spec.name] = buffer if buffer.array is None else buffer.array
        return _Bound(binding, staging, outputs, new_rows, {}, cache)

    def _staging(self, spec: TensorSpec, sizes: Mapping[str, int]) -> Buffer:
        memory = Memory() if spec.name in self._provider.host_inputs else self._provider.memory
        return make_buffer(memory, spec.dtype, _shape(spec, sizes))


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


class OnnxRuntimeDevice:
    """A device that one execution provider serves. Subclass it to change session options."""

    def __init__(self, name: str, provider: Provider, form: Form = Form.INPLACE) -> None:
        self._name = name
        self._provider = provider
        self._form = form

    @property
    def name(self) -> str:
        """As the user writes it."""
        return self._name

    @property
    def form(self) -> Form:
        """The cache form of the graphs that this device takes."""
        return self._form

    def load_segment(
        self, folder: Path, segment: Segment, *, capacity: int, widths: Sequence[int], threads: int
    ) -> OnnxRuntimeSegment:
        """Load a segment of the bundle at `folder`; see `base.Device.load_segment`.

        Raises:
            DeviceError: the bundle lacks this cache form, or the provider can't take the graph.
        """
        graph = segment.graphs.get(self._form)
        if graph is None:
            raise DeviceError(
                f"{self._name} needs {segment.name} in {self._form.value} form, the bundle has "
                f"{', '.join(sorted(form.value for form in segment.graphs))}; export the bundle again"
            )
        session = self._open_session(folder / graph.file, segment.name, threads)
        return OnnxRuntimeSegment(segment.name, session, graph, self._form, self._provider)

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> OnnxRuntimeCache:
        """Return a zeroed cache for these layers."""
        return OnnxRuntimeCache(layers, capacity, self._provider.memory)

    def session_options(self, segment_name: str, threads: int) -> ort.SessionOptions:
        """Return the options of one segment's session; subclasses add theirs."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Every session owns a pool. Its threads may spin within a run, which spares a wake-up at each of
        # hundreds of operators, but not past its end: there they would hold the core that the next
        # segment's pool needs. Decoding 135M parameters in int4 on 2 idle cores: 305 tokens/s so,
        # 185 without spinning, 125 with spinning left alone.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _open_session(self, path: Path, segment_name: str, threads: int) -> ort.InferenceSession:
        provider = self._provider
        if provider.name not in ort.get_available_providers():
            raise DeviceError(
                f"{self._name} needs {provider.name}, this onnxruntime offers "
                f"{', '.join(ort.get_available_providers())}; install the build that has it"
            )
        try:
            session = ort.InferenceSession(
                path,
                self.session_options(segment_name, threads),
                providers=[(provider.name, dict(provider.options))],
            )
        except Exception as error:
            raise DeviceError(f"{self._name} can't load {path.name}: {error}") from error
        found = session.get_providers()[0]
        if found != provider.name:
            # ONNX Runtime replaces a provider that fails to start by the CPU, with only a warning.
            raise DeviceError(f"{path.name} was asked to run on {provider.name} but got {found}; check its driver")
        return session
