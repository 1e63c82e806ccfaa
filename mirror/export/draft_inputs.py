"""What a trained draft takes besides tokens: lookahead streams, and the exit layer's state (the feature channel).

Both change the embedding of a row and nothing else:

    a stream:  input_ids of vocab_size + s - 1 means the s-th learned vector instead of a token's
    features:  embedding + (feature_rows ? W rms_norm(features) : absent)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mirror.export.emit import Emitter
from mirror.export.graphs import dimension, dtype_of, is_op
from mirror.export.trace import DOMAIN

STREAMS = "streams.weight"  # [streams, hidden]
FEATURE_NORM = "features.norm.weight"  # [target hidden]
FEATURE_WEIGHT = "features.weight"  # [hidden, target hidden]
FEATURE_ABSENT = "features.absent"  # [hidden]
INPUT_TENSORS = (STREAMS, FEATURE_NORM, FEATURE_WEIGHT, FEATURE_ABSENT)


def extend_embedding(source: ir.Graph, graph: ir.Graph, epsilon: float) -> None:
    """Put what a draft was trained with around its embedding lookup.

    Args:
        source: the draft's source graph, which holds the tensors above where there are any.
        graph: the copy to change, not lowered yet.
        epsilon: of the features' norm.
    """
    lookup = next(node for node in graph if any(value is graph.inputs[0] for value in node.inputs))
    embedding = _widened(lookup.outputs[0])
    uses = list(embedding.uses())
    emit = Emitter(graph, graph.inputs[0], uses[0].node)
    result = embedding
    if STREAMS in source.initializers:
        result = _with_streams(emit, _copied(source, graph, STREAMS), lookup, result)
    if FEATURE_WEIGHT in source.initializers:
        # The target's states are of the type that its embedding has.
        result = _with_features(emit, source, graph, result, epsilon, dtype_of(lookup.outputs[0]))
    for use in uses:
        use.node.replace_input_with(use.idx, result)


def _with_streams(emit: Emitter, streams: ir.Value, lookup: ir.Node, embedding: ir.Value) -> ir.Value:
    """Return the embedding with the streams' vectors where the ids lie past the vocabulary."""
    ids = emit.input("input_ids")
    vocab = _rows(lookup)
    last = emit.constant(f"int64_scalar_{vocab - 1}", np.array(vocab - 1, np.int64))
    place = next(index for index, value in enumerate(lookup.inputs) if value is ids)
    before = emit.anchor
    emit.anchor = lookup
    tokens = emit.op("Min", [ids, last], like=ids)
    lookup.replace_input_with(place, tokens)
    emit.anchor = before
    past = emit.op("Sub", [ids, emit.constant(f"int64_scalar_{vocab}", np.array(vocab, np.int64))])
    zero = emit.constant("int64_scalar_0", np.array(0, np.int64))
    vectors = emit.op("Gather", [streams, emit.op("Max", [past, zero])], {"axis": 0}, like=embedding)
    is_stream = emit.op("Unsqueeze", [emit.op("GreaterOrEqual", [past, zero]), emit.int64s(2)])
    return emit.op("Where", [is_stream, vectors, embedding], like=embedding)


def _widened(embedding: ir.Value) -> ir.Value:
    """Return looked up rows, or what they are turned into where that is all that is done with them."""
    readers = [use.node for use in embedding.uses()]
    return readers[0].outputs[0] if len(readers) == 1 and is_op(readers[0], "Cast") else embedding


def _with_features(
    emit: Emitter, source: ir.Graph, graph: ir.Graph, embedding: ir.Value, epsilon: float, dtype: ir.DataType
) -> ir.Value:
    """Return the embedding plus what the exit layer's state, of some type, adds."""
    norm, weight, absent = (_copied(source, graph, name) for name in (FEATURE_NORM, FEATURE_WEIGHT, FEATURE_ABSENT))
    wide = dimension(norm, 0)
    features = emit.declare("features", dtype, (1, "width", wide))
    if dtype is not dtype_of(embedding):
        shape = features.shape
        features = emit.cast(features, dtype_of(embedding))
        features.type, features.shape = embedding.type, shape
    normed = emit.op("RMSNorm", [features, norm], {"epsilon": epsilon}, domain=DOMAIN, like=features)
    seen = emit.op("Linear", [normed, weight], domain=DOMAIN, like=embedding)
    half = emit.constant("half", np.array(0.5, np.float32))
    has = emit.op("Greater", [emit.input("feature_rows"), half])
    chosen = emit.op("Where", [emit.op("Unsqueeze", [has, emit.int64s(0, 2)]), seen, absent], like=embedding)
    return emit.op("Add", [embedding, chosen], like=embedding)


def _rows(lookup: ir.Node) -> int:
    """Return how many tokens an embedding knows."""
    if is_op(lookup, "Gather"):
        return dimension(lookup.inputs[0], 0)
    return dimension(lookup.inputs[2], 0)  # GatherBlockQuantized: one row of scales per token


def _copied(source: ir.Graph, graph: ir.Graph, name: str) -> ir.Value:
    value = source.initializers[name]
    graph.initializers[name] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
    return graph.initializers[name]
