"""A segment that is one session per compiled shape, for providers that compile for fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mirror.bundle import Graph
from mirror.errors import DeviceError
from mirror.targets.base import Array, KVCache, LoadedSegment, PassShape, Tensor, to_host
from mirror.targets.static_shapes import (
    covering_shape,
    first_shapes,
    host_inputs,
    rows_outputs,
    width_input,
    widths_of,
)


class ShapedSegment:
    """One graph as a session per compiled shape; each behaves like any ONNX Runtime segment."""

    def __init__(
        self,
        name: str,
        graph: Graph,
        shapes: Sequence[PassShape],
        load: Callable[[PassShape], LoadedSegment],
        later: Sequence[PassShape] = (),
    ) -> None:
        """Load the first shapes; `load` makes the segment of one shape."""
        self.name = name
        self._load = load
        self._widths = widths_of(shapes)
        self._shapes = first_shapes(graph, [*shapes, *later])
        self._width_input = width_input(graph)
        self._names = frozenset(spec.name for spec in host_inputs(graph))
        self._by_row = rows_outputs(graph)
        self._sessions = {shape: load(shape) for shape in first_shapes(graph, shapes)}

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
            DeviceError: the width was not compiled, or the pass failed.
        """
        name, axis = self._width_input
        width = to_host(feeds[name]).shape[axis]
        if width not in widths_of(self._shapes):
            raise DeviceError(
                f"{self.name} is compiled for widths {widths_of(self._shapes)}, asked for {width}; load it with that"
            )
        if "logit_rows" not in self._names:
            return self._at(PassShape(width)).run(feeds, cache, past_length)
        rows = to_host(feeds["logit_rows"])
        shape = covering_shape(self._shapes, PassShape(width, rows.shape[0]))
        outputs = self._at(shape).run({**feeds, "logit_rows": _padded(rows, shape.rows)}, cache, past_length)
        return {**outputs, **{name: to_host(outputs[name])[:, : rows.shape[0]] for name in self._by_row}}

    def _at(self, shape: PassShape) -> LoadedSegment:
        if shape not in self._sessions:
            self._sessions[shape] = self._load(shape)
        return self._sessions[shape]


def _padded(rows: Array, count: int) -> Array:
    """Return logit rows, int64 [n], with the last one repeated up to `count`."""
    return np.concatenate([rows, np.repeat(rows[-1:], count - rows.shape[0])])
