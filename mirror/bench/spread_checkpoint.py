"""Write a small model's function at a big model's cost.

    python -m mirror.bench.spread_checkpoint MODEL OUT --shape qwen3-14b [--distilled FOLDER] [--pad-vocabulary]
        [--draft-shape smollm2-360m]

The small model's weights are placed inside the big model's shape: its heads among more heads of a wider
kind, its channels among more channels, its layers spread evenly among layers that add nothing. So every
token is the small model's, and every byte moved and every product computed is the big model's. `OUT/target`
is the checkpoint, `OUT/distilled` what `mirror distill` made for the small model, fitted to it, and `OUT/draft`
the function of its draft at the cost of a model that was not made to be one.

How the function is kept. Channels past the small model's are zero in the residual stream, always:
- A matrix that reads the stream may hold anything in the columns of such channels; random numbers stand
  there. A matrix that writes it has zeros in their rows.
- What is computed beside the small model (more heads, more inner channels, wider heads, whole layers) is
  multiplied by zero once, at the cheapest place: `v_proj` and `up_proj` have zeros in the small model's few
  columns, and so all of `o_proj` and `down_proj` may be random. Only the columns of `o_proj` where a surplus
  query head reads a used value are zero.
- Norms divide by the root of a mean over more channels: their weights and epsilon are scaled. Their weights
  are zero for surplus channels: kernels that quantise activations leave crumbs there instead of zeros,
  and nothing may read those.
- Rotary pair i of a head becomes pair i * (wide / narrow), which turns at the same speed.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig

from mirror.bench.big_checkpoint import SHAPES
from mirror.errors import ExportError, MirrorError
from mirror.export.checkpoint import Checkpoint, open_checkpoint
from mirror.runtime.threads import physical_cores

_FAMILIES = ("llama", "qwen3")
_MLP = ("gate_proj", "up_proj", "down_proj")
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", *_MLP)
_MOST_WRITERS = 8  # each holds one layer in memory, 0.66 GB of a 14B model
_TYPE_NAMES = {"float16": "F16", "float32": "F32"}
_POOL = 2**22  # random numbers drawn for each kind of matrix; more are repeats of these
# The channel that carries a constant to the final norm, so that surplus tokens get a logit below zero.
# Small enough to vanish in every norm's mean; nothing but the final norm reads it.
_MARK, _MARK_LOGIT = 2.0**-6, 2.0**13

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder; heads are query heads, each `head_dim` wide."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    @staticmethod
    def of(config: PretrainedConfig) -> Shape:
        """Return the sizes that a config describes."""
        heads = config.num_attention_heads
        return Shape(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
        )

    @staticmethod
    def named(name: str) -> Shape:
        """Return the sizes of a known model, such as `qwen3-14b`."""
        facts = SHAPES[name]
        return Shape(
            facts["hidden_size"],
            facts["intermediate_size"],
            facts["num_hidden_layers"],
            facts["num_attention_heads"],
            facts["num_key_value_heads"],
            facts["head_dim"],
            facts["vocab_size"],
        )


def spread_layer(layers_run: int, small: int, big: int) -> int:
    """Return after how many of the big model's layers exactly `layers_run` of the small model's have run.

    So an exit after layer 20 of 30 becomes one after layer 26 of 40.
    """
    return layers_run * big // small


def spread_checkpoint(
    model: str, out: Path, shape: Shape, *, dtype: str = "float16", pad_vocabulary: bool = False, seed: int = 0
) -> Checkpoint:
    """Write the checkpoint folder `out`: `model`'s function in another model's shape.

    Args:
        model: a folder, hub id or GGUF file of the llama or qwen3 family.
        shape: at least as large as the model in every size.
        dtype: of the weights, `float16` or `float32`.
        pad_vocabulary: whether embedding and LM head get `shape.vocab_size` rows; surplus tokens never win.
        seed: of the random numbers that fill what isn't the model's.

    Returns:
        The model that was spread.

    Raises:
        ExportError: another family, or a shape that the model doesn't fit in.
    """
    small = open_checkpoint(model)
    _check_fits(small, shape)
    spread = _Spread(small, shape, pad_vocabulary, _Noise.drawn(seed, np.dtype(dtype), _deviations(small)))
    out.mkdir(parents=True)
    spread.config().save_pretrained(out)
    small.write_tokenizer(out)
    index: dict[str, str] = {}
    with ThreadPoolExecutor(min(physical_cores(), _MOST_WRITERS)) as writers:
        names = [f"model-{number:05d}.safetensors" for number in range(1, shape.layers + 2)]
        for name, tensors in zip(
            names, writers.map(_write_shard, [out / name for name in names], spread.shards()), strict=True
        ):
            index.update(dict.fromkeys(tensors, name))
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    (out / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    return small


def _write_shard(path: Path, make: Callable[[], Mapping[str, Floats]]) -> tuple[str, ...]:
    """Make a file's tensors and write them; return their names."""
    tensors = make()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            stream.write(np.ascontiguousarray(tensor).data)  # without the interpreter's lock, as copying is
    return tuple(tensors)


@dataclass(frozen=True)
class _Noise:
    """Random numbers, drawn once for each kind of matrix and repeated from another place in each layer."""

    seed: int
    dtype: np.dtype[Any]
    pools: Mapping[str, Floats]

    @staticmethod
    def drawn(seed: int, dtype: np.dtype[Any], deviations: Mapping[str, float]) -> _Noise:
        """Draw each kind's numbers, with its own standard deviation."""
        pools = {}
        for kind, deviation in deviations.items():
            numbers = np.random.default_rng((seed, *kind.encode())).standard_normal(_POOL, np.float32)
            pools[kind] = (numbers * np.float32(deviation)).astype(dtype)
        return _Noise(seed, dtype, pools)

    def fill(self, kind: str, layer: int, shape: tuple[int, int]) -> Floats:
        """Return an array of random numbers."""
        pool, flat = self.pools[kind], np.empty(shape[0] * shape[1], self.dtype)
        start = int(np.random.default_rng((self.seed, layer, *kind.encode())).integers(_POOL))
        for begin in range(-start, flat.size, _POOL):
            first, last = max(begin, 0), min(begin + _POOL, flat.size)
            flat[first:last] = pool[first - begin : last - begin]
        return flat.reshape(shape)


@dataclass(frozen=True)
class _Spread:
    """One small model and the shape that it is placed in."""

    small: Checkpoint
    shape: Shape
    pad_vocabulary: bool
    noise: _Noise

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the weights."""
        return self.noise.dtype

    @property
    def own(self) -> Shape:
        """The small model's sizes."""
        return Shape.of(self.small.config)

    @property
    def norm_scale(self) -> float:
        """What a norm's weights are multiplied by: the wide mean square is smaller by this, squared."""
        return float(np.sqrt(self.own.hidden_size / self.shape.hidden_size))

    @property
    def normed_heads(self) -> bool:
        """Whether queries and keys pass a norm of their own."""
        return bool(self.small.config.model_type == "qwen3")

    @property
    def tied(self) -> bool:
        """Whether embedding and LM head are one tensor; surplus tokens need two."""
        return bool(self.small.config.tie_word_embeddings) and not self.pad_vocabulary

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and LM head."""
        return self.shape.vocab_size if self.pad_vocabulary else self.own.vocab_size

    def config(self) -> PretrainedConfig:
        """Return the config of the big checkpoint."""
        facts = self.small.config.to_dict()
        kept = {name: facts[name] for name in ("hidden_act", "rope_parameters", "max_position_embeddings")}
        tokens = {name: facts.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        shape, own = self.shape, self.own
        config = AutoConfig.for_model(
            self.small.config.model_type,
            **kept,
            **tokens,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=self.vocab_size,
            rms_norm_eps=self.small.config.rms_norm_eps * own.hidden_size / shape.hidden_size,
            tie_word_embeddings=self.tied,
            dtype=self.dtype.name,
        )
        config.architectures = [self.small.architecture]
        return config

    def shards(self) -> Iterator[Callable[[], Mapping[str, Floats]]]:
        """Yield what makes the tensors of each file: those outside the layers, then one layer after the other."""
        yield self._outside
        own, total = self.own.layers, self.shape.layers
        placed = {spread_layer(layer + 1, own, total) - 1: layer for layer in range(own)}
        for layer in range(total):
            yield partial(self._layer, layer, placed.get(layer))

    # --- outside the layers -------------------------------------------------------------------------

    def _outside(self) -> dict[str, Floats]:
        tensors = {
            "model.embed_tokens.weight": self._embedding(),
            "model.norm.weight": self._norm("model.norm.weight", mark=1 / _MARK),
        }
        if not self.tied:
            tensors["lm_head.weight"] = self._lm_head()
        return tensors

    def _embedding(self) -> Floats:
        """Return `[vocab, hidden]`: zeros past the small model's channels; surplus tokens look like real ones."""
        table = np.zeros((self.vocab_size, self.shape.hidden_size), self.dtype)
        own = self._read("model.embed_tokens.weight")
        table[:, : self.own.hidden_size] = np.resize(own, (self.vocab_size, self.own.hidden_size))
        if self.pad_vocabulary:
            table[:, -1] = _MARK
        return table

    def _lm_head(self) -> Floats:
        """Return `[vocab, hidden]`; a surplus row sees the mark alone, and turns it into a logit far below zero."""
        own = self._read("lm_head.weight", "model.embed_tokens.weight")
        head = self.noise.fill("lm_head", 0, (self.vocab_size, self.shape.hidden_size))
        head[:, : own.shape[1]] = 0
        head[: own.shape[0], : own.shape[1]] = own
        if self.pad_vocabulary:
            head[: own.shape[0], -1] = 0
            head[own.shape[0] :, -1] = -_MARK_LOGIT
        return head

    def _norm(self, name: str | None, mark: float = 0.0) -> Floats:
        """Return a norm's weight `[hidden]`; without a name one that an added layer may have."""
        weight = np.zeros(self.shape.hidden_size, np.float32)
        weight[: self.own.hidden_size] = 1.0 if name is None else self._read(name) * self.norm_scale
        if self.pad_vocabulary:
            weight[-1] = mark
        return weight.astype(self.dtype)

    # --- layers -------------------------------------------------------------------------------------

    def _layer(self, layer: int, own: int | None) -> dict[str, Floats]:
        """Return the tensors of one layer; `own` is the small model's layer that it holds, if any."""
        source = None if own is None else f"model.layers.{own}."
        tensors = {
            "input_layernorm.weight": self._norm(source and f"{source}input_layernorm.weight"),
            "post_attention_layernorm.weight": self._norm(source and f"{source}post_attention_layernorm.weight"),
            **self._attention(layer, source),
            **self._mlp(layer, source),
        }
        return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}

    def _attention(self, layer: int, source: str | None) -> dict[str, Floats]:
        shape = self.shape
        queries, keys = _channels(self.own, shape, shape.heads), _channels(self.own, shape, shape.kv_heads)
        hidden, q_size, kv_size = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        tensors = {
            "self_attn.q_proj.weight": self.noise.fill("q_proj", layer, (q_size, hidden)),
            "self_attn.k_proj.weight": self.noise.fill("k_proj", layer, (kv_size, hidden)),
            "self_attn.v_proj.weight": self.noise.fill("v_proj", layer, (kv_size, hidden)),
            "self_attn.o_proj.weight": self.noise.fill("o_proj", layer, (hidden, q_size)),
        }
        seen = self.own.hidden_size
        tensors["self_attn.v_proj.weight"][:, :seen] = 0
        if source is not None:
            q, k = tensors["self_attn.q_proj.weight"], tensors["self_attn.k_proj.weight"]
            v, o = tensors["self_attn.v_proj.weight"], tensors["self_attn.o_proj.weight"]
            # A key's surplus channels are zero, so the query's may be anything, unless a norm sums them up.
            k[:, :seen] = 0
            if self.normed_heads:
                q[:, :seen] = 0
            q[queries, :seen] = self._read(f"{source}self_attn.q_proj.weight") * self._query_scale
            k[keys, :seen] = self._read(f"{source}self_attn.k_proj.weight")
            v[keys, :seen] = self._read(f"{source}self_attn.v_proj.weight")
            o[:, _reads_used_values(self.own, shape)] = 0
            o[:seen, queries] = self._read(f"{source}self_attn.o_proj.weight")
        if self.normed_heads:
            tensors.update({f"self_attn.{name}.weight": self._head_norm(name, source) for name in ("q_norm", "k_norm")})
        return tensors

    @property
    def _query_scale(self) -> float:
        """What undoes the smaller scale of wider heads' attention, in `q_proj`; head norms undo it in theirs."""
        return 1.0 if self.normed_heads else float(np.sqrt(self.shape.head_dim / self.own.head_dim))

    def _head_norm(self, name: str, source: str | None) -> Floats:
        """Return the weight `[head_dim]` of a head norm: a mean over more channels, and for queries the scale."""
        weight = np.ones(self.shape.head_dim, np.float32)
        if source is not None:
            ratio = np.sqrt(self.own.head_dim / self.shape.head_dim)
            scale = 1.0 if name == "q_norm" else ratio  # a query's narrower mean and its scale cancel
            weight[_pairs(self.own.head_dim, self.shape.head_dim)] = (
                self._read(f"{source}self_attn.{name}.weight") * scale
            )
        return weight.astype(self.dtype)

    def _mlp(self, layer: int, source: str | None) -> dict[str, Floats]:
        wide, hidden = self.shape.intermediate_size, self.shape.hidden_size
        gate = self.noise.fill("gate_proj", layer, (wide, hidden))
        up = self.noise.fill("up_proj", layer, (wide, hidden))
        down = self.noise.fill("down_proj", layer, (hidden, wide))
        up[:, : self.own.hidden_size] = 0
        if source is not None:
            inner, seen = self.own.intermediate_size, self.own.hidden_size
            gate[:inner, :seen] = self._read(f"{source}mlp.gate_proj.weight")
            up[:inner, :seen] = self._read(f"{source}mlp.up_proj.weight")
            down[:, :inner] = 0
            down[:seen, :inner] = self._read(f"{source}mlp.down_proj.weight")
        return {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}

    def _read(self, *names: str) -> NDArray[np.float32]:
        return _read(self.small, *names)


def _read(small: Checkpoint, *names: str) -> NDArray[np.float32]:
    found = small.weights.find(names)
    if found is None:
        raise ExportError(f"{small.name} has no tensor {names[0]}; it is incomplete")
    return found.tensor.numpy().astype(np.float32)


def _deviations(small: Checkpoint) -> dict[str, float]:
    """Return how large the small model's own numbers are in each kind of matrix."""
    blocks = {kind: "mlp" if kind in _MLP else "self_attn" for kind in _MATRICES}
    found = {kind: _read(small, f"model.layers.0.{block}.{kind}.weight") for kind, block in blocks.items()}
    found["lm_head"] = _read(small, "lm_head.weight", "model.embed_tokens.weight")
    return {kind: float(matrix.std()) for kind, matrix in found.items()}


def _pairs(narrow: int, wide: int) -> NDArray[np.int64]:
    """Return where a narrow head's channels lie in a wide one, so that rotary pairs turn as before."""
    half = np.arange(narrow // 2) * (wide // narrow)
    return np.concatenate((half, half + wide // 2))


def _channels(own: Shape, shape: Shape, heads: int) -> NDArray[np.int64]:
    """Return where the small model's query (or key) channels lie among those of `heads` wide heads."""
    own_group = own.heads // own.kv_heads
    if heads == shape.kv_heads:
        places = np.arange(own.kv_heads)
    else:
        group, head = np.divmod(np.arange(own.heads), own_group)
        places = group * (shape.heads // shape.kv_heads) + head
    pairs = _pairs(own.head_dim, shape.head_dim)
    flat: NDArray[np.int64] = (places[:, None] * shape.head_dim + pairs[None]).reshape(-1)
    return flat


def _reads_used_values(own: Shape, shape: Shape) -> NDArray[np.int64]:
    """Return the columns of `o_proj` whose input isn't zero: query heads of the used key heads, real channels."""
    heads = np.arange(own.kv_heads * (shape.heads // shape.kv_heads))
    pairs = _pairs(own.head_dim, shape.head_dim)
    flat: NDArray[np.int64] = (heads[:, None] * shape.head_dim + pairs[None]).reshape(-1)
    return flat


def _check_fits(small: Checkpoint, shape: Shape) -> None:
    config, own = small.config, Shape.of(small.config)
    if config.model_type not in _FAMILIES:
        raise ExportError(f"{small.name} is of the family {config.model_type}; {' and '.join(_FAMILIES)} can be spread")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise ExportError(f"{small.name} has biases, which are not spread; choose a model without")
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        raise ExportError(f"{small.name} scales its rotary positions; only plain ones can be spread")
    for name, least in vars(own).items():
        if getattr(shape, name) < least:
            raise ExportError(f"{small.name} does not fit: {name} is {least}, the shape has {getattr(shape, name)}")
    if shape.head_dim % own.head_dim or shape.heads // shape.kv_heads < own.heads // own.kv_heads:
        raise ExportError(
            f"{small.name} does not fit: heads of {own.head_dim} channels, {own.heads // own.kv_heads} to a key head, "
            f"into heads of {shape.head_dim}, {shape.heads // shape.kv_heads} to a key head; choose another shape"
        )


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(sorted(SHAPES)), default="qwen3-14b", show_default=True)
@click.option(
    "--distilled", type=click.Path(path_type=Path), help="What `mirror distill` made for MODEL, to be fitted."
)
@click.option("--draft-shape", type=click.Choice(sorted(SHAPES)), help="Write the draft of --distilled in it too.")
@click.option("--pad-vocabulary", is_flag=True, help="Give the vocabulary the shape's size too.")
@click.option("--seed", default=0, show_default=True)
def main(
    model: str, out: Path, shape: str, distilled: Path | None, draft_shape: str | None, pad_vocabulary: bool, seed: int
) -> None:
    """Write MODEL in another model's SHAPE, float16, into OUT/target (and OUT/distilled, OUT/draft)."""
    from mirror.bench.spread_distilled import spread_distilled, write_own_draft

    if draft_shape is not None and distilled is None:
        raise click.UsageError("--draft-shape is for the draft of --distilled; give that too")

    started_s = time.perf_counter()
    try:
        small = spread_checkpoint(model, out / "target", Shape.named(shape), pad_vocabulary=pad_vocabulary, seed=seed)
        if distilled is not None:
            spread_distilled(distilled, small, out / "target", out / "distilled")
        if distilled is not None and draft_shape is not None:
            with tempfile.TemporaryDirectory() as folder:
                own = Path(folder) / "draft"
                write_own_draft(distilled, small, own)
                spread_checkpoint(str(own), out / "draft", Shape.named(draft_shape), seed=seed)
    except MirrorError as error:
        raise click.ClickException(str(error)) from error
    size = sum(path.stat().st_size for path in (out / "target").iterdir())
    click.echo(f"{out}: {size / 1e9:.1f} GB in {time.perf_counter() - started_s:.0f} s")
    last = Shape.of(small.config).layers
    for layer in range(last // 2, last, max(1, last // 6)):
        click.echo(
            f"an exit after layer {layer} of {last} is one after {spread_layer(layer, last, Shape.named(shape).layers)}"
        )


if __name__ == "__main__":
    main()
