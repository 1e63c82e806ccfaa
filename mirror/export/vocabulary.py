"""A trimmed vocabulary: logits over the tokens that a text mostly consists of, mapped back to the target's ids.

A small draft's LM head costs more than all its layers, and an exit head is little else. The trimmed head
is a second one on the same states: rows of the first, chosen by frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mirror.errors import ExportError
from mirror.export.graphs import constant, insert_before, is_op
from mirror.export.trace import DOMAIN, Aliases
from mirror.export.weights import Found, MemoryTensor, WeightSource

IDS = "vocabulary.ids"  # the initializer that maps a trimmed head's outputs to token ids, int64 [count]
TRIMMED_LOGITS = "exit_logits"  # the target's second output
_PREFIX = "vocabulary."


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that a trimmed head knows: int64 [count], distinct."""

    ids: NDArray[np.int64]

    def add_logits(self, graph: ir.Graph, parameters: Mapping[str, Aliases]) -> dict[str, Aliases]:
        """Add logits over these tokens to a normalised graph, as output `exit_logits`.

        Args:
            graph: a whole model's, with the output `logits`; its weights not bound yet.
            parameters: the names that each initializer may have in the checkpoint.

        Returns:
            The initializers that this adds, each with the names of the tensor whose rows it holds.

        Raises:
            ExportError: the model's logits are made in a way that can't be trimmed.
        """
        chain = _head(graph)
        added: dict[str, Aliases] = {}
        vocab = _last_size(chain[0].outputs[0])
        value: ir.Value | None = None
        for node in reversed(chain):
            inputs = [self._input(graph, item, value, chain, vocab, parameters, added) for item in node.inputs]
            value = insert_before(graph, chain[0], node.op_type, inputs, domain=node.domain)
            made = value.producer()
            assert made is not None
            made.attributes.update(node.attributes)
            _type_like(value, node.outputs[0], len(self.ids))
        assert value is not None
        value.name = TRIMMED_LOGITS
        graph.outputs.append(value)
        return added

    def add_ids(self, graph: ir.Graph) -> None:
        """Add the map from places to token ids, which only a cut graph uses."""
        constant(graph, IDS, self.ids)

    def _input(
        self,
        graph: ir.Graph,
        item: ir.Value | None,
        value: ir.Value | None,
        chain: list[ir.Node],
        vocab: int,
        parameters: Mapping[str, Aliases],
        added: dict[str, Aliases],
    ) -> ir.Value | None:
        """Return what stands for one input of a copied node."""
        if item is None or (item.producer() is not None and item.producer() in chain):
            return item if item is None else value
        if item.name is None or item.name not in parameters or item.shape is None or vocab not in item.shape:
            return item
        name = f"{_PREFIX}{item.name}"
        added[name] = parameters[item.name]
        shape = [len(self.ids), *list(item.shape)[1:]]
        graph.initializers[name] = ir.Value(name=name, type=item.type, shape=ir.Shape(shape))
        return graph.initializers[name]


def only_trimmed(graph: ir.Graph) -> None:
    """Let the trimmed logits be a model's only ones."""
    trimmed = next(value for value in graph.outputs if value.name == TRIMMED_LOGITS)
    whole = next(value for value in graph.outputs if value.name == "logits")
    whole.name = "whole_logits"
    trimmed.name = "logits"
    graph.outputs.clear()
    graph.outputs.append(trimmed)


@dataclass
class TrimmedSource:
    """A weight source that also gives the rows of some tensors that a vocabulary keeps.

    Attributes:
        rows: for each initializer of `Vocabulary.add_logits`, the names of the tensor that it takes rows of.
    """

    base: WeightSource
    ids: NDArray[np.int64]
    rows: Mapping[str, Aliases]
    _known: dict[str, Found] = field(default_factory=dict)

    def find(self, names: Aliases) -> Found | None:
        """Return the tensor that has one of these names."""
        aliases = self.rows.get(names[0])
        if aliases is None:
            return self.base.find(names)
        if names[0] not in self._known:
            whole = self.base.find(aliases)
            if whole is None:
                return None
            self._known[names[0]] = Found(f"{_PREFIX}{whole.key}", MemoryTensor(whole.tensor.numpy()[self.ids]))
        return self._known[names[0]]


def _head(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes that make the logits, the last first and the LM head's product last."""
    value = next(item for item in graph.outputs if item.name == "logits")
    vocab, chain = _last_size(value), []
    while (node := value.producer()) is not None:
        chain.append(node)
        if is_op(node, "Linear", DOMAIN):
            return chain
        wide = [item for item in node.inputs if item is not None and item.producer() is not None]
        wide = [item for item in wide if item.shape is not None and item.shape[-1:] == (vocab,)]
        if len(wide) != 1:
            break
        value = wide[0]
    raise ExportError(
        "the model's logits don't come from one linear layer, so its vocabulary can't be trimmed; export it with "
        "--draft-vocabulary 0"
    )


def _last_size(value: ir.Value) -> int:
    assert value.shape is not None
    size = value.shape[-1]
    assert isinstance(size, int)
    return size


def _type_like(value: ir.Value, like: ir.Value, count: int) -> None:
    assert like.shape is not None
    value.type, value.shape = like.type, ir.Shape([*list(like.shape)[:-1], count])
