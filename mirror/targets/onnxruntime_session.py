"""Segments and caches on ONNX Runtime, for any execution provider.

A segment binds everything once per width: inputs that a host computes are staged in buffers whose
address stays put, outputs land in buffers that stay put, and the KV cache is bound as it is. A pass
then copies a few small integers and runs. On a device with a stream of its own a pass is only
launched, and who reads an output waits for it. This module knows memory and bindings; what differs
between devices is a `Provider` and, where need be, a subclass of `OnnxRuntimeDevice`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort

from mirror.bundle import Form, Graph, LayerKV, Segment, TensorSpec, kv_names
from mirror.errors import DeviceError
from mirror.targets.base import (
    Array,
    Copier,
    Fetched,
    FollowOn,
    GivenIds,
    KVCache,
    LoadedSegment,
    LoadRequest,
    Mark,
    PassShape,
    StoredWeights,
    Tensor,
    to_host,
)
from mirror.targets.static_shapes import BRANCH_MAP, widths_of

# ONNX's element type numbers; numpy has no bfloat16, so those tensors never become arrays.
_ELEMENT_TYPES = {"float32": 1, "uint8": 2, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
_ITEM_BYTES = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2}

# Passes of a binding before one is recorded: they allocate, plan and choose kernels.
_BEFORE_RECORDING = 2

_TOTAL = "total_sequence_length"

_ALIGNMENT_BYTES = 256  # of each input in a device's staging block, as its own allocator would do

# Slots by which the total grows that sized kernels of branches get: they look at all of them.
_TOTAL_STEP = 256

# Bindings kept per segment. Decoding needs one per width of a round, and where totals grow in steps, one per step;
# prefill remainders come and go.
_KEPT_BINDINGS = 128


@dataclass(frozen=True)
class Memory:
    """Where a provider keeps its tensors: `cpu`, or a device that ONNX Runtime names, with its index."""

    kind: str = "cpu"
    index: int = 0

    @property
    def is_host(self) -> bool:
        """Whether numpy can look at it."""
        return self.kind == "cpu"


class Recording(Protocol):
    """A recorded pass."""

    def replay(self) -> None:
        """Launch it again, on the memory that it was recorded with."""
        ...


class DeviceStream(Protocol):
    """The order in which a device copies and computes."""

    @property
    def handle(self) -> int:
        """Its address."""
        ...

    def pinned(self, dtype: str, shape: Sequence[int]) -> Array:
        """Return a zeroed host array that copies go to and from."""
        ...

    def clear(self, address: int, size: int) -> None:
        """Write zeros over device memory."""
        ...

    def uploader(self, address: int, source: Array) -> Copier:
        """Return what copies a pinned array to the device, in order."""
        ...

    def downloader(self, target: Array, address: int) -> Copier:
        """Return what copies device memory to a pinned array, in order; nothing waits for it."""
        ...

    def download(self, target: Array, address: int) -> None:
        """Copy device memory to a pinned array, in order, and wait for it."""
        ...

    def spreader(self, target: int, pitch: int, source: int, size: int, count: int) -> Copier:
        """Return what copies pieces within device memory, in order: each of `size` bytes, to every `pitch` bytes."""
        ...

    def wait(self) -> None:
        """Wait for all that was launched."""
        ...

    def after(self, mark: Mark) -> None:
        """Let all that is launched from now on wait for a mark, which may be another stream's."""
        ...

    def record(self, launch: Callable[[], None]) -> Recording | None:
        """Record what a call launches, without running it; return None where that can't be replayed."""
        ...

    def mark(self) -> Mark:
        """Return a new mark."""
        ...


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        memory: where outputs, caches and staged inputs live.
        options: the provider's own options.
        sized_inputs: catalogue inputs that the provider's kernels read in host memory to choose themselves, the
            total among them. A binding gets one number, for good: another could mean another kernel. It is the
            cache's capacity, or where every slot below it costs time, in graphs that take branches, a little
            more than is filled.
        stream: what sessions compute on, None where the provider waits at the end of each pass.
        replays: whether passes are recorded once and replayed.
        fixed_widths: whether a segment takes the widths that it was loaded for and no others.
    """

    name: str
    memory: Memory = Memory()
    options: Mapping[str, str] = field(default_factory=dict)
    sized_inputs: frozenset[str] = frozenset()
    stream: DeviceStream | None = None
    replays: bool = False
    fixed_widths: bool = False


class Buffer:
    """A fixed tensor in a device's memory; a `DeviceTensor`.

    Attributes:
        value: the tensor as ONNX Runtime binds it.
        array: the same memory as a numpy array, where numpy can express it; else None.
        stream: what orders the work on it, None where nothing is pending after a pass.
    """

    __slots__ = ("_dtype", "_host", "_places", "array", "stream", "value")

    def __init__(
        self, value: ort.OrtValue, array: Array | None, stream: DeviceStream | None = None, dtype: str = ""
    ) -> None:
        self.value = value
        self.array = array
        self.stream = stream
        self._dtype = dtype
        self._host: Array | None = None
        self._places: list[tuple[Array, Copier, Mark]] = []  # where fetched values may land

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        return tuple(self.value.shape())

    def numpy(self) -> Array:
        """Return the values in host memory; a view on the host, else a copy that the next call writes over."""
        if self.array is not None:
            return self.array
        if self.stream is None or self._dtype == "bfloat16":
            copied: Array = self.value.numpy()
            return copied
        host = self._on_host(self.stream)
        self.stream.download(host, self.value.data_ptr())
        return host

    def numpy_part(self, start: int, count: int) -> Array:
        """Return `count` values from the `start`-th on; a view on the host, else a copy as `numpy` makes it."""
        if self.array is not None or self.stream is None or self._dtype == "bfloat16":
            return self.numpy().reshape(-1)[start : start + count]
        # Each part has its own place, so that one doesn't write over another.
        part = self._on_host(self.stream).reshape(-1)[start : start + count]
        self.stream.download(part, self.value.data_ptr() + start * part.itemsize)
        return part

    def _on_host(self, stream: DeviceStream) -> Array:
        """Return the pinned array that copies go to."""
        if self._host is None:
            self._host = stream.pinned(self._dtype, self.value.shape())
        return self._host

    def wait(self) -> None:
        """Wait until the values are there."""
        if self.stream is not None:
            self.stream.wait()

    def fetch(self) -> Fetched:
        """Start to bring the values to host memory; see `base.DeviceTensor.fetch`."""
        if self.stream is None or self._dtype == "bfloat16":
            values = self.numpy().copy()
            return lambda: values
        place, download, mark = self._places.pop() if self._places else self._new_place(self.stream)
        download()
        mark.renew()
        return _Arriving(place, mark, lambda: self._places.append((place, download, mark)))

    def _new_place(self, stream: DeviceStream) -> tuple[Array, Copier, Mark]:
        place = stream.pinned(self._dtype, self.value.shape())
        return place, stream.downloader(place, self.value.data_ptr()), stream.mark()


class _Arriving:
    """Values on their way to a pinned array, which is theirs for as long as anyone may ask for them; a `Fetched`.

    Attributes:
        place: the array.
        mark: behind their copy.
    """

    __slots__ = ("_give_back", "mark", "place")

    def __init__(self, place: Array, mark: Mark, give_back: Callable[[], None]) -> None:
        self.place = place
        self.mark = mark
        self._give_back = give_back

    def __call__(self) -> Array:
        """Wait for the values and return a copy."""
        self.mark.wait()
        return self.place.copy()

    def __del__(self) -> None:
        self._give_back()


def make_buffer(memory: Memory, dtype: str, shape: Sequence[int], stream: DeviceStream | None = None) -> Buffer:
    """Return a zeroed tensor of a `TensorSpec` dtype in a device's memory."""
    if memory.is_host:
        return _host_buffer(dtype, shape)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _ELEMENT_TYPES[dtype], memory.kind, memory.index)
    if stream is not None:
        # Bits that mean no number, in a slot that no row sees, would still spoil a product with zero.
        stream.clear(value.data_ptr(), int(np.prod(shape)) * _ITEM_BYTES[dtype])
    elif dtype != "bfloat16":
        value.update_inplace(np.zeros(shape, dtype))
    return Buffer(value, None, stream, dtype)


def _host_buffer(dtype: str, shape: Sequence[int]) -> Buffer:
    if dtype == "bfloat16":
        # Two bytes per element of zeros are zeros in bfloat16 too.
        raw = np.zeros(shape, np.uint16)
        return Buffer(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, _ELEMENT_TYPES[dtype]), None)
    array: Array = np.zeros(shape, dtype)
    return Buffer(ort.OrtValue.ortvalue_from_numpy(array), array)


class OnnxRuntimeCache:
    """KV buffers of some layers, `[1, heads, capacity, head_dim]` each, in one device's memory."""

    def __init__(
        self, layers: Sequence[LayerKV], capacity: int, memory: Memory, stream: DeviceStream | None = None
    ) -> None:
        self._capacity = capacity
        self.buffers: dict[str, Buffer] = {}
        for layer in layers:
            shape = (1, layer.heads, capacity, layer.head_dim)
            for name in kv_names("past_key_values", layer.layer):
                buffer = self.buffers[name] = make_buffer(memory, layer.dtype, shape, stream)
                if buffer.array is not None:
                    # Here, not by the first answer: pages that the system hands out at their first touch cost it 80 ms
                    # for each 16 tokens of a draft of 30 layers, on a virtual machine whose own memory comes so.
                    buffer.array.fill(0)

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self._capacity

    def address(self, past_name: str) -> int:
        """Return where a buffer lies in its device's memory."""
        return int(self.buffers[past_name].value.data_ptr())

    def write_rows(self, past_name: str, rows: Array, past_length: int) -> None:
        """Copy new rows `[1, heads, width, head_dim]` to slots `past_length..` of a host buffer."""
        array = self.buffers[past_name].array
        if array is None:
            raise DeviceError(f"{past_name} is not in host memory; a cache in rows form must be")
        array[:, :, past_length : past_length + rows.shape[2]] = rows


class BufferTable:
    """Rows of float32 in a device's memory, written from pinned memory in the order of its stream."""

    def __init__(self, rows: int, columns: int, memory: Memory, stream: DeviceStream) -> None:
        self.tensor = make_buffer(memory, "float32", (rows, columns), stream)
        self._host = stream.pinned("float32", (rows, columns))
        self._stream = stream

    def write(self, row: int, values: Array) -> None:
        """Write one row; see `base.RowTable.write`."""
        self._host[row] = values
        self._stream.uploader(self.tensor.value.data_ptr() + row * self._host[row].nbytes, self._host[row])()

    def wait(self) -> None:
        """Wait until the rows written so far have arrived."""
        self._stream.wait()


class _StagingBlock:
    """Host-computed inputs of one binding in one pinned block, and its copy on the device.

    One copy per pass moves them all.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], sizes: Mapping[str, int], memory: Memory, stream: DeviceStream
    ) -> None:
        places = list(_places(specs, sizes))
        size = max((end for _, _, _, end in places), default=0)
        self._pinned = stream.pinned("uint8", (size,))
        self._device = make_buffer_of_bytes(memory, size)
        self._stream = stream
        self._upload = stream.uploader(self._device.data_ptr(), self._pinned)
        self._follow: dict[tuple[object, ...], Copier] = {}
        self._mark = stream.mark()
        self.arrays: dict[str, Array] = {}
        self.addresses: dict[str, int] = {}
        for spec, shape, start, end in places:
            view: Array = self._pinned[start:end].view(spec.dtype).reshape(shape)
            self.arrays[spec.name] = view
            self.addresses[spec.name] = self._device.data_ptr() + start

    def wait(self) -> None:
        """Wait until the last upload has left the host's block."""
        self._mark.wait()

    def upload(self) -> None:
        """Copy the block to the device, in order."""
        self._upload()
        self._mark.renew()

    def follow(self, name: str, part: GivenIds) -> None:
        """Copy ids that an earlier pass gives over those of the block, in order; see `_can_follow`."""
        given = part.given
        if isinstance(given, _Arriving):
            self._stream.after(given.mark)
            source = given.place.ctypes.data
        else:
            assert isinstance(given, Buffer)
            source = given.value.data_ptr()
        key = name, source, part.first, part.place, part.groups, part.count, part.stride
        copy = self._follow.get(key)
        if copy is None:
            copy = self._follow[key] = self._copier(name, part)
        copy()

    def _copier(self, name: str, part: GivenIds) -> Copier:
        given, size = part.given, self.arrays[name].itemsize
        target = self.addresses[name] + part.place * size
        if isinstance(given, _Arriving):
            return self._stream.uploader(target, given.place[0, part.first : part.first + part.count])
        assert isinstance(given, Buffer)
        source = given.value.data_ptr() + part.first * size
        return self._stream.spreader(target, part.stride * size, source, part.count * size, part.groups)


def make_buffer_of_bytes(memory: Memory, size: int) -> ort.OrtValue:
    """Return uninitialised device memory of some bytes."""
    return ort.OrtValue.ortvalue_from_shape_and_type([max(size, 1)], _ELEMENT_TYPES["uint8"], memory.kind, memory.index)


def _places(
    specs: Sequence[TensorSpec], sizes: Mapping[str, int]
) -> Iterator[tuple[TensorSpec, tuple[int, ...], int, int]]:
    """Yield each input's shape, and where it starts and ends in a block of bytes."""
    start = 0
    for spec in specs:
        shape = _shape(spec, sizes)
        end = start + int(np.prod(shape)) * _ITEM_BYTES[spec.dtype]
        yield spec, shape, start, end
        start = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@dataclass
class Bound:
    """One width's binding: what it reads, what it writes.

    Attributes:
        staging: host-computed inputs by name, copied into on every pass.
        block: what brings `staging` to the device; None where the graph reads it where it is.
        outputs: catalogue outputs by name, as `run` returns them.
        new_rows: in rows form, the new KV rows by the name of the past they belong to.
        cache: what the pass reads and writes.
        held: what must outlive the binding besides.
        passes: how many it has run, replayed ones left out.
        recording: its recorded pass, once there is one.
    """

    binding: ort.IOBinding
    staging: Mapping[str, Array]
    block: _StagingBlock | None
    outputs: Mapping[str, Tensor]
    new_rows: Mapping[str, Array]
    cache: KVCache | None
    held: tuple[object, ...]
    passes: int = 0
    recording: Recording | None = None


class OnnxRuntimeSegment:
    """One graph in one session, with a binding per width."""

    def __init__(
        self,
        name: str,
        session: ort.InferenceSession,
        graph: Graph,
        form: Form,
        provider: Provider,
        widths: tuple[int, ...] | None = None,
    ) -> None:
        self.name = name
        self.session = session
        self._form = form
        self._provider = provider
        self._widths = widths
        self._inputs = tuple(spec for spec in graph.inputs if not spec.name.startswith("past_key_values."))
        self._outputs = graph.outputs
        self._past = tuple(spec.name for spec in graph.inputs if spec.name.startswith("past_key_values."))
        self._names = frozenset(spec.name for spec in self._inputs)
        self._sized = provider.sized_inputs & self._names
        self._bound: OrderedDict[tuple[int, ...], Bound] = OrderedDict()
        self._options = _run_options(provider)

    @property
    def widths(self) -> tuple[int, ...] | None:
        """The widths that it was loaded for, where it takes no others; else None."""
        return self._widths

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
        self._launch(bound, feeds)
        if bound.new_rows:
            assert isinstance(cache, OnnxRuntimeCache)
            for past_name, rows in bound.new_rows.items():
                cache.write_rows(past_name, rows, past_length)
        return bound.outputs

    def _launch(self, bound: Bound, feeds: Mapping[str, Tensor]) -> None:
        """Stage the inputs and start the pass; without a stream, wait for its end."""
        if bound.block is not None:
            bound.block.wait()  # what a pass before this one reads must have left the block
        following: list[tuple[str, GivenIds]] = []
        for name, array in bound.staging.items():
            feed = feeds[name]
            if isinstance(feed, np.ndarray):
                array[...] = feed
            elif isinstance(feed, FollowOn) and all(map(self._can_follow, feed.parts)):
                array[...] = feed.ids
                following += [(name, part) for part in feed.parts]
            else:
                array[...] = to_host(feed)
        if bound.block is not None:
            bound.block.upload()
            for name, part in following:
                bound.block.follow(name, part)
        if bound.recording is not None:
            bound.recording.replay()
        else:
            self._compute(bound)

    def _can_follow(self, part: GivenIds) -> bool:
        """Return whether this device's stream can take given ids: from its own work, or on their way to the host."""
        stream, given = self._provider.stream, part.given
        if isinstance(given, _Arriving):
            return stream is not None and part.groups == 1
        return isinstance(given, Buffer) and given.stream is stream and stream is not None

    def _compute(self, bound: Bound) -> None:
        """Start the pass, recording it if the time for that has come."""
        stream = self._provider.stream
        bound.passes += 1
        if self._provider.replays and stream is not None and bound.passes == _BEFORE_RECORDING + 1:
            bound.recording = stream.record(lambda: self._run_session(bound))
        if bound.recording is not None:
            bound.recording.replay()
        else:
            self._run_session(bound)

    def _run_session(self, bound: Bound) -> None:
        try:
            self.session.run_with_iobinding(bound.binding, self._options)
        except Exception as error:
            raise DeviceError(f"{self.name} failed on {self._provider.name}: {error}") from error

    def _binding(self, feeds: Mapping[str, Tensor], cache: KVCache | None) -> Bound:
        positions = feeds["position_ids"]
        rows = feeds.get("logit_rows")
        given = self._given(feeds)
        key = (
            positions.shape[1] if isinstance(positions, np.ndarray) else 0,
            rows.shape[0] if isinstance(rows, np.ndarray) else 0,
            self._total(feeds, cache),
            0 if cache is None else id(cache),
            *(id(buffer.value) for buffer in given.values()),
        )
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(key[0], key[1], key[2], cache, given)
            if len(self._bound) > _KEPT_BINDINGS:
                self._bound.popitem(last=False)
        else:
            self._bound.move_to_end(key)
        return bound

    def _total(self, feeds: Mapping[str, Tensor], cache: KVCache | None) -> int:
        """Return the total that the binding of a pass is for; 0 where each pass brings its own."""
        if cache is None or _TOTAL not in self._sized:
            return 0
        if BRANCH_MAP not in self._names:
            return cache.capacity
        needed = int(to_host(feeds[_TOTAL]))
        return min(-(-needed // _TOTAL_STEP) * _TOTAL_STEP, cache.capacity)

    def _given(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Buffer]:
        """Return the inputs that are bound as they are: tensors of this device, ordered by its own stream."""
        stream = self._provider.stream
        return {
            name: tensor
            for name, tensor in feeds.items()
            if isinstance(tensor, Buffer) and tensor.stream is stream and name in self._names
        }

    def _bind(self, width: int, rows: int, total: int, cache: KVCache | None, given: Mapping[str, Buffer]) -> Bound:
        if self._past and not isinstance(cache, OnnxRuntimeCache):
            raise DeviceError(f"{self.name} keeps a KV cache; run it with one that its own device made")
        binding = self.session.io_binding()
        sizes = {"width": width, "rows": rows, "capacity": 0 if cache is None else cache.capacity}
        past = cache.buffers if isinstance(cache, OnnxRuntimeCache) else {}
        known = {name: buffer.value for name, buffer in given.items()}
        known |= {name: past[name].value for name in self._past}
        for name in self._sized:
            known[name] = ort.OrtValue.ortvalue_from_numpy(np.array(total, np.int32))
        for name, value in known.items():
            binding.bind_ortvalue_input(name, value)
        staging, block = self._stage(binding, [spec for spec in self._inputs if spec.name not in known], sizes)
        outputs, new_rows = self._bind_outputs(binding, sizes, past)
        return Bound(binding, staging, block, outputs, new_rows, cache, tuple(known.values()))

    def _stage(
        self, binding: ort.IOBinding, specs: Sequence[TensorSpec], sizes: Mapping[str, int]
    ) -> tuple[Mapping[str, Array], _StagingBlock | None]:
        """Bind buffers that a host fills; return their arrays, and what brings them to the device."""
        memory, stream = self._provider.memory, self._provider.stream
        for spec in specs:
            if spec.dtype == "bfloat16":
                raise DeviceError(
                    f"{self.name} takes {spec.name} in bfloat16, which can't pass through host memory; keep the "
                    "segments on one device, or export in fp16"
                )
        if stream is None:
            return dict(self._bind_staged(binding, spec, sizes) for spec in specs), None
        block = _StagingBlock(specs, sizes, memory, stream)
        for spec in specs:
            shape, address = block.arrays[spec.name].shape, block.addresses[spec.name]
            binding.bind_input(spec.name, memory.kind, memory.index, _ELEMENT_TYPES[spec.dtype], shape, address)
        return block.arrays, block

    def _bind_staged(self, binding: ort.IOBinding, spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[str, Array]:
        buffer = make_buffer(Memory(), spec.dtype, _shape(spec, sizes))
        assert buffer.array is not None
        binding.bind_ortvalue_input(spec.name, buffer.value)
        return spec.name, buffer.array

    def _bind_outputs(
        self, binding: ort.IOBinding, sizes: Mapping[str, int], past: Mapping[str, Buffer]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Array]]:
        """Bind outputs; return the catalogue ones, and in rows form the new KV rows by their past's name."""
        outputs: dict[str, Tensor] = {}
        new_rows: dict[str, Array] = {}
        for spec in self._outputs:
            past_name = spec.name.replace("present.", "past_key_values.", 1)
            if past_name in past and self._form is Form.INPLACE:
                binding.bind_ortvalue_output(spec.name, past[past_name].value)
                continue
            buffer = make_buffer(self._provider.memory, spec.dtype, _shape(spec, sizes), self._provider.stream)
            binding.bind_ortvalue_output(spec.name, buffer.value)
            if past_name in past:
                new_rows[past_name] = buffer.numpy()
            else:
                outputs[spec.name] = buffer if buffer.array is None else buffer.array
        return outputs, new_rows


def _run_options(provider: Provider) -> ort.RunOptions | None:
    if provider.stream is None:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


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

    @property
    def int8_drafts(self) -> bool:
        """Most providers have no kernel for products that round what they multiply."""
        return False

    @property
    def padded_width(self) -> int:
        """A session takes every shape."""
        return 1

    def weight_bytes(self, segment: Segment, stored: StoredWeights, shapes: Sequence[PassShape]) -> int:
        """One session holds them once."""
        return stored.bytes

    def load_segment(self, request: LoadRequest) -> LoadedSegment:
        """Load a segment; see `base.Device.load_segment`.

        Raises:
            DeviceError: the bundle lacks this cache form, or the provider can't take the graph.
        """
        segment = request.segment
        graph = segment.graphs.get(self._form)
        if graph is None:
            raise DeviceError(
                f"{self._name} needs {segment.name} in {self._form.value} form, the bundle has "
                f"{', '.join(sorted(form.value for form in segment.graphs))}; export the bundle again"
            )
        session, provider = self._open_session(request.folder / graph.file, request)
        widths = widths_of(request.shapes) if provider.fixed_widths else None
        return OnnxRuntimeSegment(segment.name, session, graph, self._form, provider, widths)

    def make_cache(self, layers: Sequence[LayerKV], capacity: int) -> OnnxRuntimeCache:
        """Return a zeroed cache for these layers."""
        return OnnxRuntimeCache(layers, capacity, self._provider.memory, self._provider.stream)

    @property
    def launches(self) -> bool:
        """Whether it has a stream."""
        return self._provider.stream is not None

    def make_table(self, rows: int, columns: int) -> BufferTable:
        """Return a zeroed table; see `base.Device.make_table`."""
        if self._provider.stream is None:
            raise DeviceError(f"{self._name} waits for each pass; tables are for devices that only launch them")
        return BufferTable(rows, columns, self._provider.memory, self._provider.stream)

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

    def _open_session(self, path: Path, request: LoadRequest) -> tuple[ort.InferenceSession, Provider]:
        """Return a session on this device's provider, and the provider as the session has it."""
        options = self.session_options(request.segment.name, request.threads)
        return self._session_on(self._provider, path, options), self._provider

    def _session_on(self, provider: Provider, path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
        if provider.name not in ort.get_available_providers():
            raise DeviceError(
                f"{self._name} needs {provider.name}, this onnxruntime offers "
                f"{', '.join(ort.get_available_providers())}; install the build that has it"
            )
        try:
            session = ort.InferenceSession(path, options, providers=[(provider.name, dict(provider.options))])
        except Exception as error:
            raise DeviceError(f"{self._name} can't load {path.name}: {error}") from error
        found = session.get_providers()[0]
        if found != provider.name:
            # ONNX Runtime replaces a provider that fails to start by the CPU, with only a warning.
            raise DeviceError(f"{path.name} was asked to run on {provider.name} but got {found}; check its driver")
        # Nor may a pass that fails be tried again on the CPU.
        session.disable_fallback()
        return session
