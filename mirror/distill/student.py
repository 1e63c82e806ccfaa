"""The draft: a model on the target's frozen embedding and head, with streams and a feature input where asked.

It starts as some of the target's own layers, or as a given small model. Only what is its own is
stored: the embedding and the LM head come from the target, unless a given model brings its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from mirror.distill.data import to_device
from mirror.distill.layout import Layout
from mirror.distill.storage import load_tensors, save_tensors
from mirror.distill.target import Head, Target, head_of, load_target, target_fingerprint
from mirror.errors import DraftError
from mirror.export.draft import with_layers
from mirror.export.trace import decoder_layers

WEIGHTS_FILE = "model.safetensors"
_DOWN = "down_proj.weight"
_GATED = ("gate_proj.weight", "up_proj.weight", _DOWN)


class Streams(nn.Module):
    """Learned embeddings of speculative streams: `weight` `[streams, hidden]`; stream s is row s - 1."""

    def __init__(self, embeddings: Tensor, count: int) -> None:
        super().__init__()
        spread = embeddings.float().std(0) * torch.randn(count, embeddings.shape[1], device=embeddings.device)
        self.weight = nn.Parameter(embeddings.float().mean(0) + 0.1 * spread)


class Features(nn.Module):
    """What the target's exit layer adds to a draft's embeddings: `weight @ rms_norm(state)`, or `absent`.

    Starts as nothing at all, so a trained draft can be taken up.
    """

    def __init__(self, target_hidden: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(target_hidden, eps=eps)
        self.weight = nn.Parameter(torch.zeros(hidden, target_hidden))
        self.absent = nn.Parameter(torch.zeros(hidden))

    def forward(self, states: Tensor, known: Tensor) -> Tensor:
        """Return what is added, `[..., hidden]`, to rows whose feature `[..., target_hidden]` is known or not."""
        added = nn.functional.linear(self.norm(states), self.weight)
        return torch.where(known[..., None], added, self.absent.to(added.dtype))


class Student(nn.Module):
    """A draft being trained: float32 weights of its own on a frozen embedding."""

    def __init__(self, model: Any, *, streams: Streams | None = None, features: Features | None = None) -> None:
        super().__init__()
        self.model = model
        self.streams = streams
        self.features = features
        self.whole = False  # whether embedding and LM head are its own, frozen, and stored

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """What is trained and stored, by name; neither embedding nor LM head."""
        shared = {id(self.model.get_input_embeddings().weight), id(self.model.get_output_embeddings().weight)}
        found = {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) not in shared}
        for prefix, part in (("streams", self.streams), ("features", self.features)):
            if part is not None:
                found |= {f"{prefix}.{name}": parameter for name, parameter in part.named_parameters()}
        return found

    @property
    def size(self) -> int:
        """Parameters outside the embedding and the LM head."""
        return sum(parameter.numel() for parameter in self.own.values())

    @property
    def stream_count(self) -> int:
        """Speculative streams."""
        return 0 if self.streams is None else int(self.streams.weight.shape[0])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the id of the first stream."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def head(self) -> Head:
        """The LM head as arithmetic."""
        return head_of(self.model, self.model.config)

    def forward(
        self,
        input_ids: Tensor,
        *,
        layout: Layout | None = None,
        features: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return final, normalised states `[batch, width, hidden]`.

        Args:
            input_ids: int64 `[batch, width]`, right-padded; ids from `vocab_size` on are streams.
            layout: whose positions and mask hold, where rows aren't simply a text.
            features: `[batch, width, target_hidden]` and bool `[batch, width]`, for a draft that takes them; None
                for no row.
        """
        extra: dict[str, Any] = {}
        device = input_ids.device
        if layout is not None:
            extra["position_ids"] = to_device(layout.positions, device)
            extra["attention_mask"] = self._mask(layout, device)
        if self.streams is None and self.features is None:
            extra["input_ids"] = input_ids
        else:
            extra["inputs_embeds"] = self._embed(input_ids, features)
        states: Tensor = self.model.base_model(use_cache=False, **extra).last_hidden_state
        return states

    def _embed(self, input_ids: Tensor, features: tuple[Tensor, Tensor] | None) -> Tensor:
        table = self.model.get_input_embeddings()
        first = self.vocab_size
        scale = float(getattr(table, "scalar_embed_scale", 1.0))  # what a scaled embedding does to any row
        embedded: Tensor = table(input_ids.clamp(max=first - 1))
        if self.streams is not None:
            own = self.streams.weight[(input_ids - first).clamp(min=0)] * scale
            embedded = torch.where((input_ids >= first)[..., None], own.to(embedded.dtype), embedded)
        if self.features is not None:
            added = self.features.absent if features is None else self.features(*features)
            embedded = embedded + (added * scale).to(embedded.dtype)
        return embedded

    def _mask(self, layout: Layout, device: torch.device) -> Any:
        """Return the attention bias `[batch, 1, width, width]` in the form that the model's layers want."""
        config = self.model.config
        visible = layout.visible(device)
        dtype = self.model.get_input_embeddings().weight.dtype
        window = getattr(config, "sliding_window", None)
        positions = to_device(layout.positions, device)
        near = visible if window is None else visible & (positions[:, :, None] - positions[:, None] < window)
        kinds = set(getattr(config, "layer_types", None) or ())
        if "sliding_attention" in kinds and len(kinds) > 1:
            return {"full_attention": _bias(visible, dtype), "sliding_attention": _bias(near, dtype)}
        return _bias(near if not kinds or "sliding_attention" in kinds else visible, dtype)


def spread_layers(total: int, count: int) -> tuple[int, ...]:
    """Return `count` layer numbers spread evenly from the first to the last of `total`."""
    return tuple(round(index * (total - 1) / max(count - 1, 1)) for index in range(count))


@dataclass(frozen=True)
class StudentOptions:
    """What a draft has beside its layers: streams, and a feature input normed with `eps` where asked.

    `intermediate`: inner channels of its feed-forward parts; None for the target's.
    """

    streams: int = 0
    features: bool = False
    eps: float = 1e-5
    intermediate: int | None = None


def make_student(target: Target, layers: Sequence[int], options: StudentOptions | None = None) -> Student:
    """Return a draft that starts as the target's `layers`, float32 on the target's device.

    Raises:
        DraftError: other inner channels were asked than this architecture can be given.
    """
    options = options or StudentOptions()
    config = with_layers(target.config, tuple(layers))
    if options.intermediate is not None:
        _check_intermediate(target, options.intermediate)
        config.intermediate_size = options.intermediate
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    source = decoder_layers(target.model, target.config)
    for own, layer in zip(decoder_layers(model, config), layers, strict=True):
        wanted, given = own.state_dict(), source[layer].state_dict()
        own.load_state_dict({name: _widened(name, value.float(), wanted.get(name)) for name, value in given.items()})
    outside = _outside_layers(target.model.state_dict(), source, target.model)
    model.load_state_dict({name: tensor.float() for name, tensor in outside.items()}, strict=False)
    return _with_parts(_share(model.to(target.device), target), target, options)


def student_of(folder: Path, target: Target, options: StudentOptions) -> Student:
    """Return a draft that starts as a given small model, on its own frozen embedding and LM head.

    Raises:
        DraftError: its tokenizer or vocabulary isn't the target's.
        ExportError: the folder holds no model.
    """
    given = load_target(str(folder), target.device, torch.float32)
    theirs, ours = target_fingerprint(given.checkpoint), target_fingerprint(target.checkpoint)
    if theirs["tokenizer_fingerprint"] != ours["tokenizer_fingerprint"] or given.vocab_size != target.vocab_size:
        raise DraftError(
            f"{folder} has another tokenizer than the target (vocabulary {given.vocab_size} against "
            f"{target.vocab_size}); give a draft model with the target's tokenizer"
        )
    given.model.requires_grad_(True)
    for table in (given.model.get_input_embeddings(), given.model.get_output_embeddings()):
        table.requires_grad_(False)
    student = Student(given.model)
    student.whole = True
    return _with_parts(student, target, options)


def take_up(student: Student, folder: Path, sources: tuple[Sequence[int], Sequence[int]]) -> None:
    """Give a draft the weights of a finished one, for the layers that both have.

    A layer that the finished draft lacks keeps the target's weights, with its outputs silenced: a draft with all of
    the finished one's layers then computes what that does, and learns from there. So do further inner channels. One
    with fewer begins as the finished draft without them.

    Args:
        student: made of the target's layers `sources[1]`.
        folder: the finished draft, made of the layers `sources[0]`.
        sources: which layers both started as.

    Raises:
        DraftError: they have no layer in common, the finished draft has inner channels that this one lacks, or a new
            layer can't be silenced.
    """
    had, have = list(sources[0]), list(sources[1])
    if not set(had) & set(have):
        raise DraftError(
            f"the draft in {folder} has the target's layers {', '.join(map(str, had))} and this one has none of them; "
            "name some in --draft-layers, or leave out --start"
        )
    stored = load_tensors(folder / WEIGHTS_FILE)
    layers = decoder_layers(student.model, student.model.config)
    prefix = next(name for name, module in student.model.named_modules() if module is layers)
    with torch.no_grad():
        for index, layer in enumerate(have):
            if layer in had:
                old = f"{prefix}.{had.index(layer)}."
                _copy(dict(layers[index].named_parameters()), stored, old)
            else:
                _silence(layers[index], folder)
        outside = {name: value for name, value in student.own.items() if not name.startswith(prefix + ".")}
        kept = {name: value for name, value in outside.items() if name in stored and stored[name].shape == value.shape}
        _copy(kept, stored, "")


def save_student(student: Student, folder: Path, *, int8: bool = False) -> None:
    """Write `config.json` and the draft's own tensors into a folder, made where it is missing.

    Float16, matrices as int8 where asked; a given model's own embedding and LM head too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(student.model.config)
    config.architectures = [type(student.model).__name__]
    config.dtype = "float16"
    config.save_pretrained(folder)
    save_tensors(_stored(student), folder / WEIGHTS_FILE, int8=int8)


def load_student(folder: Path, target: Target) -> Student:
    """Return a stored draft, on its target's embedding and head where it has none, float32 on the target's device.

    Raises:
        DraftError: the folder holds no draft, or its tensors aren't those that its config needs.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise DraftError(f"{folder} has no {WEIGHTS_FILE}; give the `draft` folder that `mirror distill` wrote")
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(target.device)  # type: ignore[no-untyped-call]
    stored = load_tensors(folder / WEIGHTS_FILE)
    embedding = next(name for name, value in model.named_parameters() if value is model.get_input_embeddings().weight)
    student = Student(model) if embedding in stored else _share(model, target)
    student.whole = embedding in stored
    _add_stored_parts(student, stored, target)
    wanted = _stored(student)
    if stored.keys() != wanted.keys():
        wrong = sorted(stored.keys() ^ wanted.keys())[0]
        raise DraftError(f"{folder / WEIGHTS_FILE} and its config.json differ at {wrong}; train the draft again")
    with torch.no_grad():
        _copy(wanted, stored, "")
    model.eval()
    return student


def _stored(student: Student) -> dict[str, nn.Parameter]:
    return student.own | (dict(student.model.named_parameters()) if student.whole else {})


def _add_stored_parts(student: Student, stored: Mapping[str, Tensor], target: Target) -> None:
    device = target.device
    if "streams.weight" in stored:
        table = student.model.get_input_embeddings().weight.detach()
        student.streams = Streams(table, len(stored["streams.weight"])).to(device)
    if "features.weight" in stored:
        hidden, theirs = stored["features.weight"].shape
        student.features = Features(theirs, hidden, norm_eps(target)).to(device)


def norm_eps(target: Target) -> float:
    """Return the epsilon of norms that are trained: the target's own, where it has one."""
    config = target.config
    return float(getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or 1e-5)


def _copy(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], prefix: str) -> None:
    for name, parameter in parameters.items():
        given = stored[prefix + name].to(parameter.device)
        parameter.copy_(_widened(name, given, parameter))


def _widened(name: str, given: Tensor, like: Tensor | None) -> Tensor:
    """Return a tensor of the shape of `like`: what is given, then channels that add nothing yet.

    Raises:
        DraftError: it would have to shrink.
    """
    if like is None or given.shape == like.shape:
        return given
    if any(had > has for had, has in zip(given.shape, like.shape, strict=True)):
        raise DraftError(
            f"the draft to start from has {tuple(given.shape)} for {name}, this one {tuple(like.shape)}; "
            "ask for at least as many inner channels with --draft-intermediate"
        )
    wider = torch.zeros_like(like) if name.endswith(_DOWN) else like.detach().clone()
    wider[tuple(slice(0, size) for size in given.shape)] = given
    return wider


def _check_intermediate(target: Target, asked: int) -> None:
    had = getattr(target.config, "intermediate_size", None)
    names = {name for name, _ in decoder_layers(target.model, target.config)[0].named_parameters()}
    if had is None or not all(any(name.endswith(part) for name in names) for part in _GATED):
        raise DraftError(
            f"the feed-forward part of a {type(target.model).__name__} can't be widened (it has no gate, up and down "
            "matrix of their own); leave out --draft-intermediate"
        )
    if asked < had:
        raise DraftError(
            f"the target has {had} inner channels, --draft-intermediate is {asked}; ask for at least {had}"
        )


def _silence(layer: nn.Module, folder: Path) -> None:
    outputs = [value for name, value in layer.named_parameters() if name.endswith(("o_proj.weight", _DOWN))]
    if len(outputs) != 2:
        raise DraftError(
            f"the draft in {folder} can't grow by a {type(layer).__name__}, whose output matrices have other names; "
            "repeat its --draft-layers"
        )
    for value in outputs:
        value.zero_()


def _share(model: Any, target: Target) -> Student:
    model.set_input_embeddings(target.model.get_input_embeddings())
    model.set_output_embeddings(target.model.get_output_embeddings())
    return Student(model)


def _with_parts(student: Student, target: Target, options: StudentOptions) -> Student:
    student.model.eval()  # without dropout: the target's own words are the only noise wanted
    table = student.model.get_input_embeddings().weight.detach()
    if options.streams:
        student.streams = Streams(table, options.streams)
    if options.features:
        theirs = int(target.head.weight.shape[1])
        student.features = Features(theirs, int(table.shape[1]), options.eps).to(target.device)
    return student


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)[:, None]


def _outside_layers(tensors: dict[str, Tensor], layers: nn.ModuleList, model: nn.Module) -> dict[str, Tensor]:
    prefix = next(name for name, module in model.named_modules() if module is layers) + "."
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
