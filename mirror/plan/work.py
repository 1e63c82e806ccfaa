"""What passes have to move and to multiply, counted before any device is known. Pure.

A pass over some rows reads every matrix once, however many rows there are, and multiplies each row with all of
them; attention reads the cache of the context once. The embedding is looked up, not multiplied with, so it is not
counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The work of a part of a model; parts add up.

    Attributes:
        matrices: numbers in its matrices, which is the multiply-adds of a row.
        matrix_bytes: what these take as stored, scales of quantised blocks included.
        slot_bytes: cache for each token of the context.
        attention: multiply-adds of a row for each token of the context.
        kernels: operators that a device starts one by one.
    """

    matrices: float = 0.0
    matrix_bytes: float = 0.0
    slot_bytes: float = 0.0
    attention: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(
            self.matrices + other.matrices,
            self.matrix_bytes + other.matrix_bytes,
            self.slot_bytes + other.slot_bytes,
            self.attention + other.attention,
            self.kernels + other.kernels,
        )

    def times(self, count: float) -> Work:
        """Return so many of it."""
        return Work(
            self.matrices * count,
            self.matrix_bytes * count,
            self.slot_bytes * count,
            self.attention * count,
            self.kernels * count,
        )


@dataclass(frozen=True)
class SegmentWork:
    """A segment: what every row goes through, and what only rows whose logits are wanted do."""

    name: str
    body: Work
    head: Work
    precision: str


@dataclass(frozen=True)
class ModelWork:
    """A model as equal layers and a head.

    Attributes:
        name: what it is, in words.
        precision: how its matrices are stored, as in `mirror export --precision` without the float type.
        layers: how many of `layer` there are.
        layer, head: the work of one layer, and of final norm and LM head.
        exit_head: what turns a state between two layers into candidates.
        once: kernels that a pass starts beside its layers: embedding, masks.
        capacity_slots: slots of its cache, for devices that the whole cache travels to.
    """

    name: str
    precision: str
    layers: int
    layer: Work
    head: Work
    exit_head: Work
    once: Work = Work()
    capacity_slots: int = 2048

    def prefix(self, exit_layer: int) -> SegmentWork:
        """Return the layers below the cut."""
        return SegmentWork("target_prefix", self.layer.times(exit_layer) + self.once, Work(), self.precision)

    def exit(self) -> SegmentWork:
        """Return the exit head; every row has candidates."""
        return SegmentWork("exit_head", Work(), self.exit_head, self.precision)

    def suffix(self, exit_layer: int) -> SegmentWork:
        """Return the layers from the cut on, and the LM head."""
        body = self.layer.times(self.layers - exit_layer)
        return SegmentWork("target_suffix", body, self.head, self.precision)

    def whole(self, name: str = "draft") -> SegmentWork:
        """Return all layers and the LM head."""
        return SegmentWork(name, self.layer.times(self.layers) + self.once, self.head, self.precision)

    def with_layers(self, layers: int) -> ModelWork:
        """Return the same model with another number of layers."""
        return ModelWork(
            f"{layers} layers of {self.name}",
            self.precision,
            layers,
            self.layer,
            self.head,
            self.exit_head,
            self.once,
            self.capacity_slots,
        )

    @property
    def parameters(self) -> float:
        """Numbers in its matrices, the embedding left out."""
        return self.layer.matrices * self.layers + self.head.matrices
