"""Which shapes a device that compiles ahead is compiled for.

Such a device takes a few fixed widths, and per width a fixed number of logit rows: computing them all
would cost a prompt's length times the vocabulary. A pass that wants fewer rows gets padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mirror.bundle import Graph, TensorSpec
from mirror.errors import DeviceError
from mirror.targets.base import PassShape

PAST_PREFIX = "past_key_values."
BRANCH_MAP = "slot_branch"
PRESENT_PREFIX = "present."
# Up to so many rows an NPU takes little longer than for one: it waits for its weights, and multiplies in tiles.
NPU_ROWS = 64


def first_shapes(graph: Graph, shapes: Iterable[PassShape]) -> tuple[PassShape, ...]:
    """Return the shapes to compile before the first pass, ascending, with the rows that the graph computes."""
    asks = takes_rows(graph)
    return tuple(sorted({PassShape(shape.width, (shape.rows or shape.width) if asks else 0) for shape in shapes}))


def widths_of(shapes: Iterable[PassShape]) -> tuple[int, ...]:
    """Return the distinct widths of some shapes, ascending."""
    return tuple(sorted({shape.width for shape in shapes}))


def rows_outputs(graph: Graph) -> frozenset[str]:
    """Return the outputs that have a row per wanted logit row, not per row of the pass."""
    return frozenset(spec.name for spec in graph.outputs if "rows" in spec.shape)


def covering_shape(shapes: Iterable[PassShape], wanted: PassShape) -> PassShape:
    """Return the compiled shape that a pass should use, or the one to compile for it.

    Any compiled shape of the width with rows enough will do, the smallest first. If there is none,
    the whole width is compiled, so that a width is compiled twice at most.
    """
    fitting = [shape for shape in shapes if shape.width == wanted.width and shape.rows >= wanted.rows]
    return min(fitting, default=PassShape(wanted.width, wanted.width if wanted.rows else 0))


def takes_rows(graph: Graph) -> bool:
    """Return whether a graph asks which rows' logits are wanted."""
    return any("rows" in spec.shape for spec in graph.inputs)


def host_inputs(graph: Graph) -> tuple[TensorSpec, ...]:
    """Return the inputs that a host computes: all but the cache."""
    return tuple(spec for spec in graph.inputs if not spec.name.startswith(PAST_PREFIX))


def past_name(present_name: str) -> str:
    """Return the cache input that a `present` output belongs to."""
    return present_name.replace(PRESENT_PREFIX, PAST_PREFIX, 1)


def concrete(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a tensor's shape with its symbolic dimensions filled in."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def width_input(graph: Graph) -> tuple[str, int]:
    """Return an input that shows a pass's width, and the axis of its shape that is the width.

    Raises:
        DeviceError: no input does.
    """
    for spec in host_inputs(graph):
        if "width" in spec.shape:
            return spec.name, spec.shape.index("width")
    raise DeviceError(f"{graph.file} has no input of the pass's width; export the bundle again")
