"""Name what a draft's pass makes of its small inputs, for our own kernels for GPUs.

A pass turns ids into rows of the embedding or of the streams' vectors, and who sees what into a mask: a dozen operators
of a microsecond each, as long as a layer takes. In float16 each of the two is one node, by a function that the graph
declares, as in `products.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mirror.export.draft_inputs import STREAMS
from mirror.export.graphs import is_op, replace
from mirror.export.products import declare
from mirror.export.trace import DOMAIN

_MASK_INPUTS = ("total_sequence_length", "slot_branch", "row_visible", "row_branch")


def name_pass_inputs(model: ir.Model) -> None:
    """Turn the mask and the streamed embedding of a lowered draft in float16 into one node each."""
    given = {value.name: value for value in model.graph.inputs}
    for node in list(model.graph):
        if is_op(node, "Unsqueeze") and _chooses_floats(node.inputs[0]):
            _outline(model, node, "BranchMask", [given.get(name) for name in _MASK_INPUTS], [])
        elif (vocabulary := _streamed(node)) is not None:
            inputs = [given.get("input_ids"), node.inputs[2], _vectors(node)]
            _outline(model, node, "StreamEmbedding", inputs, [ir.AttrInt64("vocabulary", vocabulary)])


def _chooses_floats(value: ir.Value | None) -> bool:
    """Whether a value is chosen between two constants in float16, as a mask's."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Where"):
        return False
    shown, hidden = node.inputs[1:]
    return all(
        side is not None and side.const_value is not None and side.const_value.dtype is ir.DataType.FLOAT16
        for side in (shown, hidden)
    )


def _streamed(node: ir.Node) -> int | None:
    """Return how many tokens there are before the streams' ids, None where a node doesn't choose between the two."""
    if not is_op(node, "Where") or _vectors(node) is None or node.outputs[0].dtype is not ir.DataType.FLOAT16:
        return None
    past = next((part for part in _behind(node, []) if is_op(part, "Sub")), None)
    first = past.inputs[1] if past is not None else None
    return None if first is None or first.const_value is None else int(first.const_value.numpy())


def _vectors(node: ir.Node) -> ir.Value | None:
    """Return the streams' vectors that a node chooses from, None if it doesn't."""
    gather = node.inputs[1].producer() if node.inputs[1] is not None else None
    found = gather.inputs[0] if gather is not None and is_op(gather, "Gather") else None
    return found if found is not None and found.name == STREAMS else None


def _behind(node: ir.Node, inputs: Sequence[ir.Value | None]) -> list[ir.Node]:
    """Return a node and all that it is computed by from some inputs, in an order that computes it."""
    found: list[ir.Node] = []
    for value in node.inputs:
        producer = value.producer() if value is not None and value not in inputs else None
        if producer is not None:
            found += [part for part in _behind(producer, inputs) if part not in found]
    return [*found, node]


def _outline(
    model: ir.Model, node: ir.Node, name: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr]
) -> None:
    """Let one node of a function take the place of what computes a node from some inputs and constants.

    Nothing is changed where it takes something else. What others use as well stays beside it.
    """
    if any(value is None for value in inputs):
        return
    parts = _behind(node, inputs)
    copied: dict[ir.Value | None, ir.Value | None] = {None: None}
    copied.update((value, ir.Value(name=f"input_{index}")) for index, value in enumerate(inputs))
    body: list[ir.Node] = []
    for part in parts:
        for value in part.inputs:
            if value in copied:
                continue
            if value is None or value.const_value is None:
                return
            constant = ir.node("Constant", [], {"value": value.const_value})
            body.append(constant)
            copied[value] = constant.outputs[0]
        facts = [ir.Attr(key, attribute.type, attribute.value) for key, attribute in part.attributes.items()]
        body.append(
            ir.Node(
                part.domain,
                part.op_type,
                [copied[value] for value in part.inputs],
                facts,
                num_outputs=len(part.outputs),
            )
        )
        copied.update(zip(part.outputs, body[-1].outputs, strict=True))
    named = ir.Node(DOMAIN, name, list(inputs), attributes)
    named.outputs[0].type, named.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    if not any(key[:2] == (DOMAIN, name) for key in model.functions):
        declare(model, named, [value for given in inputs if (value := copied[given]) is not None], body)
    model.graph.insert_before(node, named)
    replace(model.graph, node, named.outputs[0])
    for part in reversed(parts[:-1]):
        if not any(value.uses() or value.is_graph_output() for value in part.outputs):
            model.graph.remove(part, safe=True)
