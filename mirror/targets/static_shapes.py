"""Which shapes a device that compiles ahead is compiled for.

Such a device takes a few fixed widths, and per width a fixed number of logit rows. A pass that wants
fewer rows gets padding. The widest width is prefill's, which wants the logits of one row only;
compiling it for all of them would cost a prompt's length times the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mirror.bundle import Graph, TensorSpec
from mirror.errors import DeviceError

PAST_PREFIX = "past_key_values."
PRESENT_PREFIX = "present."


@dataclass(frozen=True, order=True)
class PassShape:
    """The free sizes of one pass.

    Attributes:
        width: rows of the pass.
        rows: rows whose logits are wanted; 0 for a graph that doesn't ask.
    """

    width: int
    rows: int = 0

    def sizes(self, capacity: int) -> Mapping[str, int]:
        """Return the value of every symbolic dimension."""
        return {"width": self.width, "rows": self.rows, "capacity": capacity}


def first_shapes(graph: Graph, widths: Sequence[int]) -> tuple[PassShape, ...]:
    """Return the shapes to compile before the first pass, one per width, ascending."""
    ascending = sorted(set(widths))
    if not takes_rows(graph):
        return tuple(PassShape(width) for width in ascending)
    return tuple(PassShape(width, 1 if width == ascending[-1] and len(ascending) > 1 else width) for width in ascending)


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
