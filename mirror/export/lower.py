"""Abstract operators -> the operators of one cache form.

`inplace` is for ONNX Runtime's CPU and CUDA providers: `GroupQueryAttention` over a shared past and
present buffer, and the runtime's fused norms. `rows` is for OpenVINO and NPUs: plain operators, static
shapes, the cache read-only and its new rows returned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from numpy.typing import NDArray

from mirror.bundle import Form, LayerKV, kv_names
from mirror.export.emit import Emitter
from mirror.export.graphs import dimension, dtype_of, is_op, producer_input, replace, wired
from mirror.export.masks import Masks
from mirror.export.trace import DOMAIN, OPSET

ORT = "com.microsoft"
IR_VERSION = 10
_HEADS_FIRST = (0, 2, 1, 3)


@dataclass
class Lowering:
    """Lowers one segment's graph in place."""

    graph: ir.Graph
    form: Form
    branches: bool
    kv: list[LayerKV] = field(default_factory=list)

    def run(self) -> tuple[LayerKV, ...]:
        """Lower every abstract operator; return the caches that the segment now needs."""
        emit = Emitter(self.graph, self.graph.inputs[0])
        masks: Masks | None = None
        for node in list(self.graph):
            if node.domain != DOMAIN:
                continue
            emit.anchor = node
            match node.op_type:
                case "Linear":
                    self._linear(emit, node)
                case "RMSNorm":
                    self._rms_norm(emit, node)
                case "LayerOutput":
                    replace(self.graph, node, *wired(*node.inputs))
                case "Attention":
                    masks = masks or self._masks(emit, node)
                    self._attention(emit, node, masks)
        for node in [node for node in self.graph if node.domain == DOMAIN]:
            emit.anchor = node
            self._rotary(emit, node)
        return tuple(self.kv)

    def _masks(self, emit: Emitter, first: ir.Node) -> Masks:
        at_end = Emitter(self.graph, emit.size_from)  # shared by layers; `finish` sorts them to the front
        return Masks(at_end, self.form, self.branches, dtype_of(wired(*first.inputs)[0]))

    # --- linear layers and norms ------------------------------------------------------------------

    def _linear(self, emit: Emitter, node: ir.Node) -> None:
        x, weight = node.inputs[0], node.inputs[1]
        output = node.outputs[0]
        if self.form is Form.INPLACE:
            product = emit.op("FusedMatMul", [x, weight], {"transB": 1, "alpha": 1.0}, domain=ORT, like=output)
        else:
            product = emit.op("MatMul", [x, emit.op("Transpose", [weight], {"perm": [1, 0]})], like=output)
        if len(node.inputs) > 2:
            product = emit.op("Add", [product, node.inputs[2]], like=output)
        replace(self.graph, node, product)

    def _rms_norm(self, emit: Emitter, node: ir.Node) -> None:
        x, weight = wired(*node.inputs)
        epsilon = node.attributes["epsilon"].as_float()
        if self.form is Form.INPLACE:
            normed = self._fused_norm(emit, node, x, weight, epsilon)
        else:
            normed = _plain_norm(emit, x, weight, epsilon)
        replace(self.graph, node, normed)

    def _fused_norm(self, emit: Emitter, node: ir.Node, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        add = x.producer()
        if add is not None and add.op_type == "Add" and _same_shape(add) and not x.is_graph_output():
            normed, _, _, total = emit.ops(
                "SkipSimplifiedLayerNormalization",
                [add.inputs[0], add.inputs[1], weight],
                {"epsilon": epsilon},
                domain=ORT,
                count=4,
                like=node.outputs[0],
            )
            replace(self.graph, add, _typed(total, x))
            return normed
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        return emit.op("SimplifiedLayerNormalization", [x, weight], attributes, like=node.outputs[0])

    # --- attention --------------------------------------------------------------------------------

    def _attention(self, emit: Emitter, node: ir.Node, masks: Masks) -> None:
        query, key, _ = wired(*node.inputs)
        layer = node.attributes["layer"].as_int()
        heads, kv_heads = dimension(query, 1), dimension(key, 1)
        head_dim = dimension(query, 3)
        dtype = dtype_of(query)
        self.kv.append(LayerKV(layer, kv_heads, head_dim, _dtype_name(dtype)))
        shape: tuple[int | str, ...] = (1, kv_heads, "capacity", head_dim)
        past = [emit.declare(name, dtype, shape) for name in kv_names("past_key_values", layer)]
        if self.form is Form.INPLACE:
            output, present = self._grouped(emit, node, past, masks, heads, kv_heads)
            present_shape = shape
        else:
            output, present = self._plain(emit, node, past, masks, heads, kv_heads)
            present_shape = (1, kv_heads, "width", head_dim)
        for name, new in zip(kv_names("present", layer), present, strict=True):
            new.name = name
            new.type, new.shape = ir.TensorType(dtype), ir.Shape(list(present_shape))
            self.graph.outputs.append(new)
        replace(self.graph, node, output)

    def _grouped(
        self, emit: Emitter, node: ir.Node, past: list[ir.Value], masks: Masks, heads: int, kv_heads: int
    ) -> tuple[ir.Value, list[ir.Value]]:
        """`GroupQueryAttention`, with the rotary embedding inside where it can turn whole heads."""
        query, key, value = wired(*node.inputs)
        rotary = _shared_rotary(query, key)
        if rotary is not None:
            query, key = wired(producer_input(query), producer_input(key))
        flat = _packed(query, key, value) or [_flat(emit, part) for part in (query, key, value)]
        mask = masks.get(node.attributes["window"].as_int())
        window = node.attributes["window"].as_int()
        tables = [rotary.inputs[1], rotary.inputs[2]] if rotary is not None else [None, None]
        inputs = [*flat, *past, emit.input("seqlens_k"), emit.input("total_sequence_length"), *tables]
        if mask is not None:
            # Rows of branches don't follow each other, so they say where they are.
            inputs += [rotary.inputs[3] if rotary is not None else None, mask]
        attributes = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": node.attributes["scale"].as_float(),
            "softcap": node.attributes["softcap"].as_float(),
            "local_window_size": window if window and mask is None else -1,
            "do_rotary": int(rotary is not None),
            "rotary_interleaved": rotary.attributes["interleaved"].as_int() if rotary is not None else 0,
        }
        output, *present = emit.ops("GroupQueryAttention", inputs, attributes, domain=ORT, count=3)
        output.type, output.shape = query.type, _flat_shape(node.outputs[0], 1, 2)
        return self._unflatten(emit, node, output), present

    def _unflatten(self, emit: Emitter, node: ir.Node, output: ir.Value) -> ir.Value:
        """`[1, width, heads * head_dim]` -> `[1, width, heads, head_dim]`."""
        result = node.outputs[0]
        sizes = emit.int64s(1, -1, dimension(result, 2), dimension(result, 3))
        return emit.op("Reshape", [output, sizes], like=result)

    def _plain(
        self, emit: Emitter, node: ir.Node, past: list[ir.Value], masks: Masks, heads: int, kv_heads: int
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Softmax(q k^T) v over the buffer and the new rows.

        Heads of a group lie together, so they fold into the rows of one product per key head. Nothing stands
        between the two products but what belongs to attention: compilers that fuse it (OpenVINO's) do so then.
        """
        query, key, value = wired(*node.inputs)
        dtype = dtype_of(key)
        head_dim = dimension(key, 3)
        masks.capacity = masks.capacity or masks.emit.size(past[0], 2)
        mask = self._per_group(emit, masks.get(node.attributes["window"].as_int()), heads // kv_heads)
        scale = emit.constant(f"scale_{node.attributes['scale'].as_float():.9g}", _scalar(node, "scale", dtype))
        new = [emit.op("Identity", [part]) for part in (key, value)]
        keys, values = (
            emit.op("Concat", [old, part], {"axis": 2}) for old, part in zip(past, (key, value), strict=True)
        )
        grouped = emit.reshape(emit.op("Mul", [query, scale]), 1, kv_heads, -1, head_dim)
        scores = emit.op("MatMul", [grouped, emit.op("Transpose", [keys], {"perm": [0, 1, 3, 2]})])
        scores = self._softcap(emit, node, scores, dtype)
        weights = emit.op("Softmax", [emit.op("Add", [scores, mask])], {"axis": -1})
        mixed = emit.reshape(emit.op("MatMul", [weights, values]), 1, heads, -1, dimension(value, 3))
        return emit.op("Transpose", [mixed], {"perm": list(_HEADS_FIRST)}, like=node.outputs[0]), new

    def _per_group(self, emit: Emitter, mask: ir.Value | None, group: int) -> ir.Value:
        """`[1, 1, width, keys]` -> `[1, 1, group * width, keys]`; layers share it once equal nodes are merged."""
        assert mask is not None
        return mask if group == 1 else emit.op("Concat", [mask] * group, {"axis": 2})

    def _softcap(self, emit: Emitter, node: ir.Node, scores: ir.Value, dtype: ir.DataType) -> ir.Value:
        if not node.attributes["softcap"].as_float():
            return scores
        cap = emit.constant(f"softcap_{node.attributes['softcap'].as_float():.9g}", _scalar(node, "softcap", dtype))
        return emit.op("Mul", [emit.op("Tanh", [emit.op("Div", [scores, cap])]), cap])

    # --- rotary embedding -------------------------------------------------------------------------

    def _rotary(self, emit: Emitter, node: ir.Node) -> None:
        x, cos, sin, positions = wired(*node.inputs)
        interleaved = node.attributes["interleaved"].as_int()
        if self.form is Form.INPLACE:
            rotary_dim = 2 * dimension(cos, 1)
            partial = rotary_dim != dimension(x, 3)
            attributes = {"interleaved": interleaved, "num_heads": dimension(x, 1) if partial else 0}
            attributes["rotary_embedding_dim"] = rotary_dim if partial else 0
            turned = emit.op("RotaryEmbedding", [x, positions, cos, sin], attributes, domain=ORT, like=node.outputs[0])
        else:
            turned = _plain_rotary(emit, x, cos, sin, positions, interleaved=bool(interleaved))
        replace(self.graph, node, turned)


def finish(graph: ir.Graph, name: str) -> ir.Model:
    """Clean a lowered graph and return it as a model."""
    graph.name = name
    graph.opset_imports.clear()
    graph.opset_imports.update({"": OPSET, ORT: 1})
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="mirror")
    ir.passes.Sequential(
        _FoldReshapes(),
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.TopologicalSortPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
    )(model)
    if not any(node.domain == ORT for node in model.graph):
        del model.graph.opset_imports[ORT]
    return model


class _FoldReshapes(ir.passes.InPlacePass):
    """Merge a Reshape of a Reshape into one, and drop those that change nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for node in list(model.graph):
            if not is_op(node, "Reshape") or node.inputs[0] is None:
                continue
            before = node.inputs[0].producer()
            if before is not None and before.op_type == "Reshape" and _constant_reshape(node):
                node.replace_input_with(0, before.inputs[0])
                changed = True
            source = node.inputs[0]
            same = source.shape is not None and source.shape == node.outputs[0].shape
            if same and not node.outputs[0].is_graph_output():
                replace(model.graph, node, source)
                changed = True
        return ir.passes.PassResult(model, changed)


def _constant_reshape(node: ir.Node) -> bool:
    shape = node.inputs[1].const_value if node.inputs[1] is not None else None
    return shape is not None and 0 not in shape.numpy()


def _plain_norm(emit: Emitter, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    dtype = dtype_of(x)
    wide = x if dtype is ir.DataType.FLOAT else emit.cast(x, ir.DataType.FLOAT)
    square = emit.op("Mul", [wide, wide])
    mean = emit.op("ReduceMean", [square, emit.int64s(-1)], {"keepdims": 1})
    root = emit.op(
        "Sqrt", [emit.op("Add", [mean, emit.constant(f"epsilon_{epsilon:.9g}", np.array(epsilon, np.float32))])]
    )
    normed = emit.op("Div", [wide, root])
    if dtype is not ir.DataType.FLOAT:
        normed = emit.cast(normed, dtype)
    return emit.op("Mul", [normed, weight], like=x)


def _plain_rotary(
    emit: Emitter, x: ir.Value, cos: ir.Value, sin: ir.Value, positions: ir.Value | None, *, interleaved: bool
) -> ir.Value:
    """Rotate pairs of features; `x` is `[1, heads, width, head_dim]`."""
    half, head_dim = dimension(cos, 1), dimension(x, 3)
    tables = [
        emit.op("Unsqueeze", [emit.op("Gather", [table, positions], {"axis": 0}), emit.int64s(1)])
        for table in (cos, sin)
    ]
    turned, rest = x, None
    if 2 * half != head_dim:
        turned, rest = _parts(emit, x, 2 * half, head_dim - 2 * half)
    if interleaved:
        joined = _turn_neighbours(emit, turned, tables, half, dimension(x, 1))
    else:
        joined = _turn_halves(emit, turned, tables, half)
    return joined if rest is None else emit.op("Concat", [joined, rest], {"axis": 3})


def _turn_halves(emit: Emitter, x: ir.Value, tables: list[ir.Value], half: int) -> ir.Value:
    """`x cos + [-second, first] sin`: with just these operators OpenVINO makes one of it, the axis being -1 too."""
    cos, sin = (emit.op("Concat", [table, table], {"axis": 3}) for table in tables)  # [1, 1, width, 2 * half]
    first, second = _parts(emit, x, half, half)
    across = emit.op("Concat", [emit.op("Neg", [second]), first], {"axis": -1})
    return emit.op("Add", [emit.op("Mul", [x, cos]), emit.op("Mul", [across, sin])])


def _turn_neighbours(emit: Emitter, x: ir.Value, tables: list[ir.Value], half: int, heads: int) -> ir.Value:
    """Rotate features 0 and 1, 2 and 3, ..."""
    cos, sin = tables  # [1, 1, width, half]
    first, second = (
        emit.op("Slice", [x, emit.int64s(s), emit.int64s(2 * half), emit.int64s(3), emit.int64s(2)]) for s in (0, 1)
    )
    a = emit.op("Sub", [emit.op("Mul", [first, cos]), emit.op("Mul", [second, sin])])
    b = emit.op("Add", [emit.op("Mul", [second, cos]), emit.op("Mul", [first, sin])])
    pair = [emit.op("Unsqueeze", [part, emit.int64s(4)]) for part in (a, b)]
    return emit.reshape(emit.op("Concat", pair, {"axis": 4}), 1, heads, -1, 2 * half)


def _parts(emit: Emitter, x: ir.Value, first: int, second: int) -> tuple[ir.Value, ir.Value]:
    """Cut the features of `[1, heads, width, first + second]` in two."""
    sizes = emit.constant(f"split_{first}_{second}", np.array([first, second], np.int64))
    a, b = emit.ops("Split", [x, sizes], {"axis": 3}, count=2)
    return a, b


def _shared_rotary(query: ir.Value, key: ir.Value) -> ir.Node | None:
    """Return the query's rotary node when the key is turned by the same tables."""
    first, second = query.producer(), key.producer()
    if first is None or second is None or not is_op(first, "Rotary", DOMAIN) or not is_op(second, "Rotary", DOMAIN):
        return None
    if list(first.inputs[1:]) != list(second.inputs[1:]):
        return None
    # The operator's own rotary wants a whole head's tables in multiples of 16 features.
    whole = 2 * dimension(first.inputs[1], 1) == dimension(query, 3)
    return first if whole and dimension(query, 3) % 16 == 0 else None


def _packed(query: ir.Value, key: ir.Value, value: ir.Value) -> list[ir.Value | None] | None:
    """Return one packed value for q, k and v when they are the three parts of one Split, in order."""
    parts = [_before_heads(part) for part in (query, key, value)]
    splits = {part.producer() for part in parts if part is not None}
    split = splits.pop() if len(splits) == 1 else None
    if split is None or split.op_type != "Split" or list(split.outputs) != parts:
        return None
    return [split.inputs[0], None, None]


def _before_heads(value: ir.Value) -> ir.Value | None:
    """`[1, heads, width, head_dim]` <- Transpose <- Reshape <- the returned `[1, width, features]`."""
    transposed = producer_input(value)
    if transposed is None or not is_op(value.producer(), "Transpose") or not is_op(transposed.producer(), "Reshape"):
        return None
    flat = producer_input(transposed)
    return flat if flat is not None and flat.shape is not None and len(flat.shape) == 3 else None


def _flat(emit: Emitter, value: ir.Value) -> ir.Value:
    """`[1, heads, width, head_dim]` -> `[1, width, heads * head_dim]`."""
    features = dimension(value, 1) * dimension(value, 3)
    transpose = value.producer()
    source = producer_input(value) if transpose is not None and _puts_heads_first(transpose) else None
    if source is None:
        source = emit.op("Transpose", [value], {"perm": list(_HEADS_FIRST)})
    flat = emit.reshape(source, 1, -1, features)
    flat.type, flat.shape = value.type, _flat_shape(value, 2, 1)
    return flat


def _puts_heads_first(node: ir.Node) -> bool:
    return is_op(node, "Transpose") and tuple(node.attributes["perm"].as_ints()) == _HEADS_FIRST


def _flat_shape(value: ir.Value, width_axis: int, heads_axis: int) -> ir.Shape:
    """Return `[1, width, heads * head_dim]` for a value that has heads in a dimension of their own."""
    assert value.shape is not None
    return ir.Shape([1, value.shape[width_axis], dimension(value, heads_axis) * dimension(value, 3)])


def _typed(value: ir.Value, like: ir.Value) -> ir.Value:
    value.type, value.shape = like.type, like.shape
    return value


def _same_shape(add: ir.Node) -> bool:
    first, second = add.inputs
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    return first.shape == second.shape and len(first.shape) == 3


def _scalar(node: ir.Node, attribute: str, dtype: ir.DataType) -> NDArray[np.generic]:
    return np.array(node.attributes[attribute].as_float(), dtype.numpy())


def _dtype_name(dtype: ir.DataType) -> str:
    return str(dtype.numpy())
