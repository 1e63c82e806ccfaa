"""Checkpoint architecture -> one ONNX graph with abstract operators, no weights touched.

The model is built *hollow*: every parameter is one stored number, expanded to its shape, so tracing
a 14B model needs no memory. transformers' own modelling code is traced; what a cache, a mask or a
device would decide later is left as an operator of the domain `mirror`:

- `Attention(q, k, v)`: `[1, heads, width, head_dim]` each -> `[1, width, heads, head_dim]`
- `Rotary(x, cos, sin)`: `[1, heads, width, head_dim]`, tables `[1, width, rotary_dim]`
- `RMSNorm(x, weight)`: over the last dimension
- `LayerOutput(x)`: marks the residual stream after a decoder layer

`Rotary` and `RMSNorm` stand in for a model's own function only after that function, run on random
numbers, gave what the operator means; otherwise the model's own arithmetic is traced.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from accelerate import init_empty_weights
from torch.onnx import ops as onnx_ops
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from mirror.errors import ExportError

DOMAIN = "mirror"
Aliases = tuple[str, ...]
OPSET = 21
_IMPLEMENTATION = "mirror"
_TRACE_WIDTH = 5  # any width but 1, which torch.export would take for a constant


@dataclass(frozen=True)
class Traced:
    """A traced decoder.

    `graph` inputs are `input_ids` and `position_ids` (int64 `[1, width]`), its output `logits`
    (`[1, width, vocab]`). Initializers named in `parameters` have no data: each maps to the names that
    its checkpoint tensor may have (several for tied weights). Other initializers are small buffers.
    """

    model: ir.Model
    parameters: dict[str, Aliases]
    layers: int


def trace(config: PretrainedConfig, dtype: torch.dtype) -> Traced:
    """Trace the decoder that a config describes.

    Raises:
        ExportError: the architecture can't be traced; the message names it and says why.
    """
    name = (config.architectures or [config.model_type])[0]
    config = copy.deepcopy(config)
    try:
        model = hollow(config, dtype)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ExportError(f"{name} can't be built for export: {error}") from error
    layers = decoder_layers(model, config)
    try:
        with _abstract_operators(model, layers):
            program = _export(model)
    except Exception as error:  # torch.export raises many kinds; all mean that this model does not trace
        raise ExportError(f"{name} can't be traced: {_first_line(error)}") from error
    return _traced(program.model, model, layers, name)


Trace = Callable[[PretrainedConfig, torch.dtype], Traced]


def remembering(trace: Trace) -> Trace:
    """Return `trace` with a memory: it is made from a config alone, so an equal config gets a copy of its graph.

    A draft is traced for each of its precisions, and may be the target itself.
    """
    made: dict[tuple[str, torch.dtype], Traced] = {}

    def traced(config: PretrainedConfig, dtype: torch.dtype) -> Traced:
        key = (config.to_json_string(use_diff=False), dtype)
        if key not in made:
            made[key] = trace(config, dtype)
        # Who is given a graph changes it.
        return replace(made[key], model=made[key].model.clone(), parameters=dict(made[key].parameters))

    return traced


def hollow(config: PretrainedConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Return the config's model with parameters that take no memory; buffers are real."""
    with init_empty_weights(include_buffers=False):
        model = from_config(config, dtype, _IMPLEMENTATION)
    model.tie_weights()  # again: inside, every parameter that is set becomes a new one
    model.train(False)
    _use_traceable_experts(model)
    shared: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in shared:
                scalar = torch.zeros((), dtype=parameter.dtype)
                shared[id(parameter)] = torch.nn.Parameter(scalar.expand(parameter.shape), requires_grad=False)
            module.register_parameter(name, shared[id(parameter)])
    return model


def from_config(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Return transformers' causal language model for a config."""
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    return model


def decoder_layers(model: torch.nn.Module, config: PretrainedConfig) -> torch.nn.ModuleList:
    """Return the model's stack of decoder layers."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ExportError(f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers to cut at")


def _use_traceable_experts(model: PreTrainedModel) -> None:
    # Experts chosen by data can't be looped over in a trace; the batched form gathers their weights.
    with contextlib.suppress(ValueError):  # models without experts refuse
        model.set_experts_implementation("batched_mm")


class _Decoder(torch.nn.Module):
    """The traced entry point: token ids and positions in, logits out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False
        ).logits
        return logits


def _export(model: torch.nn.Module) -> torch.onnx.ONNXProgram:
    ids = torch.zeros(1, _TRACE_WIDTH, dtype=torch.int64)
    positions = torch.arange(_TRACE_WIDTH)[None]
    width = torch.export.Dim("width", min=1, max=2**20)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _Decoder(model),
            (ids, positions),
            dynamo=True,
            input_names=["input_ids", "position_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": {1: width}, "position_ids": {1: width}},
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's chatter; its errors still raise."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _traced(model: ir.Model, module: torch.nn.Module, layers: torch.nn.ModuleList, name: str) -> Traced:
    attentions = {
        node.attributes["layer"].as_int()
        for node in model.graph
        if (node.domain, node.op_type) == (DOMAIN, "Attention")
    }
    missing = sorted(set(range(len(layers))) - attentions)
    if missing:
        raise ExportError(
            f"{name}: layers {missing[:4]} do not attend through transformers' attention interface "
            "(state-space, linear or hand-written attention); such layers can't be exported"
        )
    return Traced(model, _parameters(model, module), len(layers))


def _parameters(model: ir.Model, module: torch.nn.Module) -> dict[str, Aliases]:
    """Return each parameter initializer's checkpoint names, and take its stand-in data away."""
    aliases: dict[int, list[str]] = {}
    owner: dict[str, int] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
        owner[name] = id(parameter)
    parameters = {}
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        checkpoint_name = value.name.removeprefix("model.")  # the wrapper's attribute
        if checkpoint_name in owner:
            value.name = checkpoint_name
            value.const_value = None
            others = [name for name in aliases[owner[checkpoint_name]] if name != checkpoint_name]
            parameters[checkpoint_name] = (checkpoint_name, *others)
    return parameters


def _first_line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"


# --- the abstract operators ---------------------------------------------------------------------


@contextlib.contextmanager
def _abstract_operators(model: torch.nn.Module, layers: torch.nn.ModuleList) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(_mark_output(index)).remove)
        for module in model.modules():
            offset = _rms_norm_offset(module)
            if offset is not None:
                stack.enter_context(_replaced(module, "forward", _rms_norm(module, offset)))
        for name in sorted({type(module).__module__ for module in model.modules()}):
            source = sys.modules[name]
            rotate = getattr(source, "apply_rotary_pos_emb", None)
            if rotate is not None:
                stack.enter_context(_replaced(source, "apply_rotary_pos_emb", _rotary(rotate)))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _mark_output(index: int) -> Callable[..., Any]:
    attributes: dict[str, Any] = {"layer": index}

    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        marked = _operator("LayerOutput", (hidden,), attributes, hidden)
        return (marked, *output[1:]) if isinstance(output, tuple) else marked

    return hook


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Emit `mirror::Attention`; called through transformers' attention interface."""
    if s_aux is not None:
        raise ExportError("attention sinks have no ONNX operator here")
    if not getattr(module, "is_causal", True):
        raise ExportError("attention is not causal; only decoders can be exported")
    heads, width, head_dim = query.shape[1:]
    attributes: dict[str, Any] = {
        "layer": module.layer_idx,
        "scale": float(head_dim**-0.5 if scaling is None else scaling),
        "window": int(sliding_window or 0),
        "softcap": float(softcap or 0.0),
    }
    output = onnx_ops.symbolic(
        f"{DOMAIN}::Attention",
        (query, key, value),
        attributes,
        dtype=query.dtype,
        shape=(1, width, heads, value.shape[-1]),
        version=1,
    )
    return output, None


AttentionInterface.register(_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(_IMPLEMENTATION, lambda *args, **kwargs: None)


def _operator(
    name: str, inputs: tuple[torch.Tensor, ...], attributes: dict[str, Any], like: torch.Tensor
) -> torch.Tensor:
    """Emit an abstract operator whose output has the type and shape of `like`."""
    return onnx_ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1)


def _rms_norm(module: torch.nn.Module, offset: float) -> Callable[[torch.Tensor], torch.Tensor]:
    attributes: dict[str, Any] = {"epsilon": _epsilon(module)}

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight = module.get_parameter("weight")
        return _operator("RMSNorm", (hidden, weight + offset if offset else weight), attributes, hidden)

    return forward


def _epsilon(module: torch.nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if hasattr(module, name):
            return float(getattr(module, name))
    return None


def _rms_norm_offset(module: torch.nn.Module) -> float | None:
    """Return what is added to the weight of an RMS norm (0 or 1); None for any other module."""
    weight = module._parameters.get("weight")
    epsilon = _epsilon(module)
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 or epsilon is None:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, weight.numel(), generator=generator)
    probe = torch.randn(weight.numel(), generator=generator)
    with torch.no_grad():
        found = torch.func.functional_call(module, {"weight": probe}, (hidden,))
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)
    for offset in (0.0, 1.0):
        if isinstance(found, torch.Tensor) and torch.allclose(found, normed * (probe + offset), atol=1e-5):
            return offset
    return None


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for a model's `apply_rotary_pos_emb` that emits `mirror::Rotary`."""
    interleaved = _rotary_layout(original, partial=False)
    partial = interleaved is not None and _rotary_layout(original, partial=True) == interleaved

    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = cos.shape[-1] == q.shape[-1]
        if interleaved is None or args or kwargs or cos.dim() != 3 or q.dim() != 4 or not (whole or partial):
            return original(q, k, cos, sin, *args, **kwargs)
        attributes = {"interleaved": int(interleaved)}
        # Some models hand over float32 tables for any query; the operator wants one type.
        tables = (cos.to(q.dtype), sin.to(q.dtype))
        return tuple(_operator("Rotary", (part, *tables), attributes, part) for part in (q, k))

    return apply


def _rotary_layout(original: Callable[..., Any], *, partial: bool) -> bool | None:
    """Return whether a rotary function pairs neighbours (True) or halves (False); None for neither."""
    generator = torch.Generator().manual_seed(0)
    head_dim, rotary_dim = 16, 8 if partial else 16
    q, k = torch.randn(2, 1, 2, 3, head_dim, generator=generator).unbind(0)
    angles = torch.rand(1, 3, rotary_dim // 2, generator=generator)
    for interleaved in (False, True):
        table = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        try:
            found = original(q, k, table.cos(), table.sin())
        except (RuntimeError, TypeError):
            return None
        expected = (_rotate(q, angles, interleaved), _rotate(k, angles, interleaved))
        if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True)):
            return interleaved
    return None


def _rotate(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first `2 * angles.shape[-1]` features of x by the angles, as `mirror::Rotary` means it."""
    size = 2 * angles.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((joined, rest), -1)
