"""The traced graphs -> the segments of a bundle, cut at the exit layer and lowered to both cache forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as ir_convenience
from numpy.typing import NDArray

from mirror.bundle import INT8_SEGMENTS, NOISE_POSITIONS, NOISY_TOKENS, Form, LayerKV
from mirror.export.distilled import ADAPTER_TENSORS, EPSILON_KEY, adapter_name
from mirror.export.draft_inputs import extend_embedding
from mirror.export.emit import Emitter
from mirror.export.graphs import dimension, is_op
from mirror.export.lower import Lowering, finish
from mirror.export.pass_inputs import name_pass_inputs
from mirror.export.products import name_products
from mirror.export.top_k import first_greatest, first_greatest_plainly, greatest
from mirror.export.trace import DOMAIN
from mirror.export.vocabulary import IDS, TRIMMED_LOGITS


@dataclass(frozen=True)
class Piece:
    """One lowered graph of one segment."""

    segment: str
    form: Form
    model: ir.Model
    kv: tuple[LayerKV, ...]


def cut_target(source: ir.Model, exit_layer: int, kappa: int) -> Iterator[Piece]:
    """Yield the target's segments in both forms.

    Args:
        source: the normalised graph, `mirror::LayerOutput` markers in place; not changed.
        exit_layer: layers of the prefix, 1..N-1.
        kappa: candidates at each position; the exit head gives one more.
    """
    last = max(_layer_outputs(source.graph))
    for form in Form:
        prefix = _extract(source, ["input_ids", "position_ids"], _layer_outputs(source.graph)[exit_layer - 1])
        yield _piece("target_prefix", form, prefix, "hidden_states")
        suffix = _from_hidden(source, exit_layer - 1)
        _keep_rows(suffix, last)
        yield _piece("target_suffix", form, suffix, "logits", _likeliest if form is Form.INPLACE else _as_float)
        head = _from_hidden(source, last, TRIMMED_LOGITS if IDS in source.graph.initializers else "logits")
        _trained_head(source, head, exit_layer)
        ids = _vocabulary(source, head)

        def end(emit: Emitter, logits: ir.Value, ids: ir.Value | None = ids, form: Form = form) -> list[ir.Value]:
            return _candidates(emit, logits, kappa + 1, ids, "width", form)

        yield _piece("exit_head", form, head, None, end)


def whole_target(source: ir.Model, exit_layer: int) -> ir.Model:
    """Return the uncut target in the in-place form, for comparison with the segments.

    The exit layer's state is an output, so that the same operators are fused as in the segments:
    quantised activations would make much of a last-bit difference.
    """
    graph = _extract(source, ["input_ids", "position_ids"], "logits")
    marker = next(node for node in graph if _is_layer_output(node, exit_layer - 1))
    marker.outputs[0].name = "hidden_states"
    graph.outputs.append(marker.outputs[0])
    return _piece("target", Form.INPLACE, graph, "logits").model


def cut_draft(source: ir.Model, kappa: int) -> Iterator[Piece]:
    """Yield the draft's two graphs in both forms, and, for GPUs, one whose scores get the target's noise."""
    yield from _draft_pieces(source, kappa, tuple(Form), {name: name for name in INT8_SEGMENTS})
    graph, ids = _draft_graph(source)
    # In 16 bits, as all that a GPU runs; and a whole vocabulary's noise would take a host too long to draw.
    if graph.outputs[0].dtype is not ir.DataType.FLOAT and ids is not None:

        def perturbed(emit: Emitter, logits: ir.Value) -> list[ir.Value]:
            candidates = _drawn(emit, logits, kappa + 1, ids)
            return [_first_candidate(emit, candidates), candidates]

        yield _piece("draft_sampled", Form.INPLACE, graph, None, perturbed, branches=True)


def cut_int8_draft(source: ir.Model, kappa: int) -> Iterator[Piece]:
    """Yield the draft's two graphs for ONNX Runtime's CPU, from a source whose products are of integers."""
    yield from _draft_pieces(source, kappa, (Form.INPLACE,), INT8_SEGMENTS)


def _draft_pieces(source: ir.Model, kappa: int, forms: Sequence[Form], names: Mapping[str, str]) -> Iterator[Piece]:
    """Yield the window's graph and the branches' in some cache forms, under other names."""
    for form in forms:
        for segment, top in (("draft_trunk", kappa + 1), ("draft", 0)):
            graph, ids = _draft_graph(source)

            def end(
                emit: Emitter, logits: ir.Value, top: int = top, form: Form = form, ids: ir.Value | None = ids
            ) -> list[ir.Value]:
                if not top:
                    return [_token_ids(emit, logits, form, ids)]
                candidates = _candidates(emit, logits, top, ids, "rows", form)
                return [_first_candidate(emit, candidates[0]), *candidates]

            yield _piece(names[segment], form, graph, None, end, branches=True)


def _draft_graph(source: ir.Model) -> tuple[ir.Graph, ir.Value | None]:
    """Return the draft up to its logits, and the tokens that they stand for if its head is trimmed."""
    graph = _extract(source, ["input_ids", "position_ids"], "logits")
    extend_embedding(source.graph, graph, float(source.graph.metadata_props.get(EPSILON_KEY, "1e-5")))
    _keep_rows(graph, max(_layer_outputs(source.graph)))
    return graph, _vocabulary(source, graph)


def trimmed_vocabulary(source: ir.Model) -> NDArray[np.int64] | None:
    """Return the tokens that a draft's trimmed head knows, int64 [vocabulary]; None where it knows all."""
    value = source.graph.initializers.get(IDS)
    ids = None if value is None else value.const_value
    if isinstance(ids, ir.ExternalTensor):
        # Itself it would refuse a file that bundles share by hard links.
        return np.fromfile(ids.path, np.int64, int(ids.size), offset=ids.offset or 0)
    return None if ids is None else ids.numpy().astype(np.int64)


def _drawn(emit: Emitter, logits: ir.Value, top: int, vocabulary: ir.Value) -> ir.Value:
    """Return `candidate_ids` by `logit * inverse_temperature + noise`, the noise that of `noise_rows`.

    Only the likeliest `NOISY_TOKENS` take part, as in the target's own draws: the others share one number there.
    """
    size = dimension(logits, 2)
    noise = emit.declare("noise", ir.DataType.FLOAT, (NOISE_POSITIONS, size))
    wide = emit.cast(logits, ir.DataType.FLOAT)
    head = {"axis": -1, "sorted": 1}
    likeliest, places = emit.ops("TopK", [wide, emit.int64s(min(NOISY_TOKENS, size))], head, count=2)
    rows = emit.row(emit.op("Gather", [noise, emit.input("noise_rows")], {"axis": 0}))
    scores = emit.op(
        "Add",
        [
            emit.op("Mul", [likeliest, emit.input("inverse_temperature")]),
            emit.op("GatherElements", [rows, places], {"axis": -1}),
        ],
    )
    _, order = emit.ops("TopK", [scores, emit.int64s(min(top, size))], head, count=2)
    places = emit.op("GatherElements", [places, order], {"axis": -1})
    ids = _tokens_at(emit, vocabulary, places, Form.INPLACE)
    ids.name, ids.type = "candidate_ids", ir.TensorType(ir.DataType.INT64)
    ids.shape = ir.Shape([1, ir.SymbolicDim("rows"), min(top, size)])
    return ids


def _piece(
    segment: str,
    form: Form,
    graph: ir.Graph,
    output_name: str | None,
    end: Callable[[Emitter, ir.Value], list[ir.Value]] | None = None,
    *,
    branches: bool = False,
) -> Piece:
    result = graph.outputs[0]
    if end is not None:
        emit = Emitter(graph, graph.inputs[0])
        outputs = end(emit, result)
        if outputs != [result]:
            graph.outputs.clear()
            graph.outputs.extend(outputs)
    if output_name is not None:
        graph.outputs[0].name = output_name
    kv = Lowering(graph, form, branches).run()
    used = [value for value in graph.inputs if value.uses()]
    model = finish(graph, segment)
    _drop_unused_inputs(model.graph, used)
    if form is Form.INPLACE:
        name_products(model)
        if branches:
            name_pass_inputs(model)
    return Piece(segment, form, model, kv)


def _drop_unused_inputs(graph: ir.Graph, candidates: list[ir.Value]) -> None:
    kept = [value for value in candidates if value.uses() or value.is_graph_output()]
    graph.inputs.clear()
    graph.inputs.extend(kept)


def _layer_outputs(graph: ir.Graph) -> dict[int, str]:
    """Return the name of each layer's marked output."""
    return {
        node.attributes["layer"].as_int(): str(node.outputs[0].name)
        for node in graph
        if is_op(node, "LayerOutput", DOMAIN)
    }


def _is_layer_output(node: ir.Node, layer: int) -> bool:
    return is_op(node, "LayerOutput", DOMAIN) and node.attributes["layer"].as_int() == layer


def _extract(source: ir.Model, inputs: list[str], output: str) -> ir.Graph:
    graph = ir_convenience.extract(source.graph, inputs, [output])
    graph.opset_imports.update(source.graph.opset_imports)
    return graph


def _from_hidden(source: ir.Model, layer: int, output: str = "logits") -> ir.Graph:
    """Return the part of the graph after a layer; its first input is `hidden_states`."""
    boundary = _layer_outputs(source.graph)[layer]
    graph = _extract(source, [boundary, "input_ids", "position_ids"], output)
    graph.inputs[0].name = "hidden_states"
    return graph


def _trained_head(source: ir.Model, head: ir.Graph, exit_layer: int) -> None:
    """Put the exit layer's trained adapter in front of the norm, where there is one.

    `h + down(silu(gate(n)) * up(n))` with `n` the normed state.
    """
    if adapter_name(exit_layer, ADAPTER_TENSORS[0]) not in source.graph.initializers:
        return
    hidden = head.inputs[0]
    uses = list(hidden.uses())
    emit = Emitter(head, hidden, uses[0].node)
    norm, gate, up, down = (_copied(source, head, adapter_name(exit_layer, name)) for name in ADAPTER_TENSORS)
    normed = emit.op(
        "RMSNorm",
        [hidden, norm],
        {"epsilon": float(source.graph.metadata_props[EPSILON_KEY])},
        domain=DOMAIN,
        like=hidden,
    )
    opened = emit.op("Linear", [normed, gate], domain=DOMAIN)
    gated = emit.op(
        "Mul", [emit.op("Mul", [opened, emit.op("Sigmoid", [opened])]), emit.op("Linear", [normed, up], domain=DOMAIN)]
    )
    change = emit.op("Linear", [gated, down], domain=DOMAIN, like=hidden)
    adapted = emit.op("Add", [hidden, change], like=hidden)
    for use in uses:
        use.node.replace_input_with(use.idx, adapted)


def _copied(source: ir.Model, graph: ir.Graph, name: str) -> ir.Value:
    value = source.graph.initializers[name]
    copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
    graph.initializers[name] = copy
    return copy


def _keep_rows(graph: ir.Graph, last_layer: int) -> None:
    """Compute what follows the last layer only for the rows in the input `logit_rows`."""
    marker = next(node for node in graph if _is_layer_output(node, last_layer))
    hidden = marker.outputs[0]
    uses = list(hidden.uses())
    assert hidden.shape is not None
    emit = Emitter(graph, graph.inputs[0], uses[0].node)
    shape = ir.Shape([1, ir.SymbolicDim("rows"), hidden.shape[2]])
    kept = emit.op("Gather", [hidden, emit.input("logit_rows")], {"axis": 1})
    kept.type, kept.shape = hidden.type, shape
    for use in uses:
        use.node.replace_input_with(use.idx, kept)
    for node in graph:
        _rename_width(node, kept)


def _rename_width(node: ir.Node, kept: ir.Value) -> None:
    """Carry the `rows` dimension from the kept rows to what is computed from them."""
    if not any(
        value is not None and value.shape is not None and "rows" in map(str, value.shape) for value in node.inputs
    ):
        return
    if node is kept.producer():
        return
    for output in node.outputs:
        if output.shape is not None:
            output.shape = ir.Shape([ir.SymbolicDim("rows") if str(size) == "width" else size for size in output.shape])


def _as_float(emit: Emitter, logits: ir.Value) -> list[ir.Value]:
    return [
        logits if logits.dtype is ir.DataType.FLOAT else _named(emit.cast(logits, ir.DataType.FLOAT), "logits", logits)
    ]


def _likeliest(emit: Emitter, logits: ir.Value) -> list[ir.Value]:
    """Return the logits and each row's likeliest token, so that a host which wants no more need not read the logits."""
    narrow = logits.dtype is not ir.DataType.FLOAT
    (wide,) = _as_float(emit, logits)
    ids = _first_of(emit, wide, for_gpu=narrow)
    last = emit.int64s(2)
    greatest_logits = emit.op("GatherElements", [wide, emit.op("Unsqueeze", [ids, last])], {"axis": -1})
    # Nothing times zero is a number but a number.
    nought = emit.op("Mul", [greatest_logits, emit.constant("nought", np.array(0, np.float32))])
    finite = emit.op("Equal", [nought, nought])
    return [wide, _as_token_ids(emit.op("Where", [emit.op("Squeeze", [finite, last]), ids, emit.int64s(-1)]))]


def _named(value: ir.Value, name: str, like: ir.Value) -> ir.Value:
    if like.name == name:
        like.name = f"{name}_narrow"
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), like.shape
    return value


def _vocabulary(source: ir.Model, graph: ir.Graph) -> ir.Value | None:
    """Return the token ids that a trimmed head's outputs stand for, None where the head knows all tokens."""
    return _copied(source, graph, IDS) if IDS in source.graph.initializers else None


def _candidates(
    emit: Emitter, logits: ir.Value, top: int, vocabulary: ir.Value | None, count: str, form: Form
) -> list[ir.Value]:
    """Return `candidate_ids` and `candidate_logprobs`, `[1, count, top]`."""
    size = dimension(logits, 2)
    top = min(top, size)
    if logits.dtype is not ir.DataType.FLOAT:
        logits = emit.cast(logits, ir.DataType.FLOAT)
    if form is Form.INPLACE:
        # ReduceLogSumExp takes 15 ms for 8 rows of 151,936 on an H100, this 0.06; on a CPU 3.6 and 0.08 ms for 49,152.
        _, ids = greatest(emit, logits, size, top)
        logprobs = emit.op("GatherElements", [emit.op("LogSoftmax", [logits], {"axis": -1}), ids], {"axis": -1})
    else:
        values, ids = emit.ops("TopK", [logits, emit.int64s(top)], {"axis": -1, "sorted": 1}, count=2)
        total = emit.op("ReduceLogSumExp", [logits, emit.int64s(-1)], {"keepdims": 1})
        logprobs = emit.op("Sub", [values, total])
    if vocabulary is not None:
        ids = _tokens_at(emit, vocabulary, ids, form)
    shape = ir.Shape([1, ir.SymbolicDim(count), top])
    ids.name, ids.type, ids.shape = "candidate_ids", ir.TensorType(ir.DataType.INT64), shape
    logprobs.name, logprobs.type, logprobs.shape = "candidate_logprobs", ir.TensorType(ir.DataType.FLOAT), shape
    return [ids, logprobs]


def _token_ids(emit: Emitter, logits: ir.Value, form: Form, vocabulary: ir.Value | None) -> ir.Value:
    """Return the likeliest token of each row, the first on ties."""
    first = _first_place(emit, logits, form)
    if vocabulary is not None:
        first = _tokens_at(emit, vocabulary, first, form)
    return _as_token_ids(first)


def _tokens_at(emit: Emitter, vocabulary: ir.Value, places: ir.Value, form: Form) -> ir.Value:
    """Return the tokens that places of a trimmed head stand for, int64 of the places' shape."""
    if form is Form.INPLACE:
        return emit.op("Gather", [vocabulary, places], {"axis": 0})
    # Hexagon's compiler has no Gather of int64.
    narrow = emit.op("Gather", [emit.cast(vocabulary, ir.DataType.INT32), places], {"axis": 0})
    return emit.cast(narrow, ir.DataType.INT64)


def _first_place(emit: Emitter, logits: ir.Value, form: Form) -> ir.Value:
    """Return the place of each row's greatest logit, int64 `[1, rows]`."""
    if form is Form.INPLACE:
        narrow = logits.dtype is not ir.DataType.FLOAT
        return _first_of(emit, emit.cast(logits, ir.DataType.FLOAT) if narrow else logits, for_gpu=narrow)
    return emit.cast(first_greatest_plainly(emit, logits, dimension(logits, 2)), ir.DataType.INT64)


def _first_of(emit: Emitter, logits: ir.Value, *, for_gpu: bool) -> ir.Value:
    """Return the place of each row's greatest float32 logit, int64 `[1, rows]`.

    Graphs in 16 bits are a GPU's: attention in float32 has no kernel there. Its ArgMax is as fast as reading; a maximum
    by blocks, which spares a CPU 9 of 10 ms, takes it longer than all else that follows the last product.
    """
    if for_gpu:
        return emit.op("ArgMax", [logits], {"axis": -1, "keepdims": 0})
    return first_greatest(emit, logits, dimension(logits, 2))


def _first_candidate(emit: Emitter, candidate_ids: ir.Value) -> ir.Value:
    last = emit.int64s(2)
    first = emit.op("Slice", [candidate_ids, emit.int64s(0), emit.int64s(1), last])
    return _as_token_ids(emit.op("Squeeze", [first, last]))


def _as_token_ids(ids: ir.Value) -> ir.Value:
    ids.name, ids.type = "token_ids", ir.TensorType(ir.DataType.INT64)
    ids.shape = ir.Shape([1, ir.SymbolicDim("rows")])
    return ids


def exit_layer_of(text: str, layers: int) -> int:
    """Return the exit layer that `--exit-layer` means: a number of layers, or a fraction of them.

    Raises:
        ValueError: it is neither, or leaves the prefix or the suffix without a layer.
    """
    number = float(text)
    layer = int(text) if text.strip().isdigit() else int(np.floor(number * layers + 0.5))
    if not 1 <= layer < layers:
        raise ValueError(
            f"exit layer {text} of a model with {layers} layers; give 1..{layers - 1} or a fraction between"
        )
    return layer
