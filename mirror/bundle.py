"""The bundle contract: `mirror.json`, the records it holds, and the checks on reading it.

This module is what `export` and `runtime` share. It knows files and JSON, never tensors. The JSON
Schema beside it (`bundle.schema.json`) is the same contract for hosts in other languages; unknown
keys are refused in both.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any

from mirror.errors import BundleError

SCHEMA_VERSION = 2
MANIFEST_NAME = "mirror.json"
ROLLOUT_SLOTS = 4096  # slots past max_length that a draft's graphs have room for: the rows of a rollout
# Products that our kernels for GPUs have are called so, and as the product (`product_kind`); see `export/products.py`.
GATED = "Gated"  # one whose halves gate each other
SMALL = "Small"  # one with a small matrix in float16
KEY_BLOCK = 16  # slots of a block of keys in a draft's cache, of which it has whole ones
NOISY_TOKENS = 256  # likeliest tokens that get noise in a draft's graph for draws: as many as in the target's draws
NOISE_POSITIONS = 64  # rows of a noise table: a rollout looks at no more positions
# What drafts that `mirror distill` trained read of a context: SmolLM2's, trained on short texts, guesses with this much
# of 5,200 tokens no worse than with all (docs/drafts.md), in less time.
DRAFT_CONTEXT = 2048
PROGRAM_FORMAT = 1  # of the file that describes a draft to kernels of our own (docs/bundle.md)
VOCABULARY_FILE = "draft_vocabulary.npy"  # the tokens that a trimmed head's scores are for, int64 [vocabulary]
DATE_MARK = "{{date}}"  # in a chat format's texts, for today's date

# The names a graph may use. A host computes every input below from its cursor and feeds those
# that a graph declares. Per-layer KV tensors follow `kv_names`.
INPUT_NAMES = (
    "input_ids",  # int64 [1, width]
    "position_ids",  # int64 [1, width], the absolute position of each row
    "hidden_states",  # [1, width, hidden], the exit layer's state
    "logit_rows",  # int64 [rows], the rows of this pass whose logits are wanted
    "seqlens_k",  # int32 [1] = past_length + width - 1
    "total_sequence_length",  # int32 [] >= past_length + width
    "past_length",  # int32 [1], the filled slots before this pass
    "row_visible",  # int32 [width], the row sees trunk slots < row_visible
    "row_branch",  # int32 [width], the row also sees earlier slots of this branch
    "slot_branch",  # int32 [capacity], the branch each slot belongs to, -1 for none
    "features",  # [1, width, target hidden], the exit layer's state of the row before, for a draft fed by it
    "feature_rows",  # float32 [width], 1 where a row has a feature, else 0
    "noise",  # float32 [NOISE_POSITIONS, vocabulary], what each of the draft's scores gets at a position
    "noise_rows",  # int64 [rows], which row of the noise each wanted row of the pass gets
    "inverse_temperature",  # float32 [1], what scores are multiplied by before
)
OUTPUT_NAMES = (
    "hidden_states",  # [1, width, hidden]
    "logits",  # float32 [1, rows, vocab]
    "token_ids",  # int64 [1, rows], the likeliest next token of each wanted row
    "candidate_ids",  # int64 [1, rows, top] (the exit head: [1, width, top]), likeliest first
    "candidate_logprobs",  # float32, the same shape
)


def product_kind(op_type: str) -> str:
    """Return a node's operator, without what is put before a product's that our kernels for GPUs have."""
    return op_type.removeprefix(GATED).removeprefix(SMALL)


# A draft's segments with products of 8-bit integers, for ONNX Runtime's CPU, by the names of its other ones.
INT8_SEGMENTS: Mapping[str, str] = {"draft_trunk": "draft_trunk_int8", "draft": "draft_int8"}


class Form(Enum):
    """How a graph keeps its KV cache.

    INPLACE: past and present are one buffer of fixed capacity, bound as input and as output.
    ROWS: the graph reads the buffer and returns the new rows; the host writes them.
    """

    INPLACE = "inplace"
    ROWS = "rows"


@dataclass(frozen=True)
class TensorSpec:
    """A named graph input or output; symbolic dimensions are strings (`width`, `capacity`, `rows`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class LayerKV:
    """The cache of one layer: key and value, each `[1, heads, capacity, head_dim]`."""

    layer: int
    heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True)
class Graph:
    """One ONNX file of a segment."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Compiled:
    """A segment's graph in rows form, compiled ahead of time for one device and fixed sizes.

    Attributes:
        device: what it was compiled for: `qnn:v73`, `openvino:CPU`.
        width, rows, capacity: sizes of a pass, `rows` 0 for a graph that doesn't ask, and of the cache.
        file: what the runtime loads; files that it refers to lie beside it.
        runtime: the compiling libraries with their versions. No other is expected to read the file.
        options: what the compiler was told.
        graph_sha256: of the graph that it was made from.
    """

    device: str
    width: int
    rows: int
    capacity: int
    file: str
    runtime: str
    options: Mapping[str, str]
    graph_sha256: str


@dataclass(frozen=True)
class Segment:
    """One step of the model; `graphs` holds it in one or both forms, `compiled` what `mirror compile` made of it.

    `program` is the file that says where the weights of an int8 draft lie, for kernels that run its whole pass.
    """

    name: str
    kv: tuple[LayerKV, ...]
    graphs: Mapping[Form, Graph]
    compiled: tuple[Compiled, ...] = ()
    program: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What a host needs to know of the target."""

    architecture: str
    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    precision: str
    fingerprint: str


@dataclass(frozen=True)
class Decoding:
    """Where the target is cut and what a round looks like.

    `trained_exits` are the exit layers that the bundle has a trained exit head for; at any other the
    target's own norm and LM head serve.
    """

    exit_layer: int
    gamma: int
    kappa: int
    max_length: int
    prefill_chunk: int
    trained_exits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Special tokens and the identity of the tokenizer."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class DraftFacts:
    """What the draft is: `model` (graphs in the bundle) or `ngram` (prompt lookup, no graph).

    Attributes:
        vocab_size: rows of its embedding; the first stream's token is `vocab_size`.
        streams: lookahead streams that it was trained with.
        feature_layer: the exit layer whose state feeds it, None for a draft of tokens alone.
        vocabulary: how many tokens its head knows; `vocab_size` unless it was trimmed.
    """

    kind: str
    source: str
    layers: int
    vocab_size: int
    vocabulary: int
    streams: int = 0
    feature_layer: int | None = None


@dataclass(frozen=True)
class Settings:
    """What a host does where the user says nothing; None leaves it to the host.

    Attributes:
        mode: `plain`, `serial` or `mirror`.
        candidates: `exit`, `draft` or `both`.
        gamma: draft tokens of a window.
        fanout: branches per window position, gamma + 1 counts.
        tokens_per_pass: tokens that each of a rollout's passes gives a branch; the last number repeats.
        branches_per_pass: branches that take part in each of them at most, the likeliest; the last number repeats.
        proposal_tokens_per_pass: tokens that each pass of a proposal gives, where the target waits for it.
        draft_context: tokens of a context's end that the draft reads at most; None for all.
        adapt_branches: whether rollouts take fewer branches where they end late; None is no.
        target_device, suffix_device, draft_device: where segments run.
    """

    mode: str | None = None
    candidates: str | None = None
    gamma: int | None = None
    fanout: tuple[int, ...] | None = None
    tokens_per_pass: tuple[int, ...] | None = None
    branches_per_pass: tuple[int, ...] | None = None
    proposal_tokens_per_pass: tuple[int, ...] | None = None
    draft_context: int | None = None
    adapt_branches: bool | None = None
    target_device: str | None = None
    suffix_device: str | None = None
    draft_device: str | None = None

    def devices(self, target: str | None, suffix: str | None, draft: str | None) -> tuple[str, str | None, str]:
        """Return where target, suffix and draft run, given what the user names; None is for a suffix with its target.

        Settings hold together: a suffix was placed beside the target's device of the same settings.
        """
        tuned = self.suffix_device if target in (None, self.target_device) else None
        return target or self.target_device or "cpu", suffix or tuned, draft or self.draft_device or "cpu"


@dataclass(frozen=True)
class ChatFormat:
    """The model's chat template as data, for hosts without Jinja: texts between the messages of a conversation.

    A conversation is rendered as `joins["start"][role of the first]`, its content, `joins[its role][role of the
    next]`, the next content, ..., `joins[role of the last]["answer"]`. A pair that is missing is not covered.

    Attributes:
        joins: texts by what stands before (`start`, or a role) and after (a role, or `answer`).
        trimmed: roles whose contents lose the white space around them.
        refused: texts that the template treats in a way of their own; contents with one are not covered.
        empty: whether contents without any text are covered.
        date: how today's date is written where the joins say `DATE_MARK`, as a `strftime` pattern; None for none.
    """

    joins: Mapping[str, Mapping[str, str]]
    trimmed: tuple[str, ...]
    refused: tuple[str, ...]
    empty: bool
    date: str | None = None


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Producer:
    """Who made the bundle from what."""

    version: str
    source: str
    command: str


@dataclass(frozen=True)
class Manifest:
    """`mirror.json` in memory."""

    schema_version: int
    producer: Producer
    model: ModelFacts
    decoding: Decoding
    tokens: Tokens
    draft: DraftFacts | None
    segments: Mapping[str, Segment]
    files: Mapping[str, FileFacts]
    settings: Settings = Settings()
    chat: ChatFormat | None = None

    @property
    def draft_capacity(self) -> int:
        """Tokens that a draft's cache has room for, where the user says nothing."""
        return min(self.decoding.max_length, self.settings.draft_context or self.decoding.max_length)


def kv_names(prefix: str, layer: int) -> tuple[str, str]:
    """Return the key and value tensor names of a layer; prefix is `past_key_values` or `present`."""
    return f"{prefix}.{layer}.key", f"{prefix}.{layer}.value"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `mirror.json` into a folder."""
    text = json.dumps(_to_json(manifest), indent=1, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a bundle folder, checked against the schema.

    Raises:
        BundleError: the folder or the file is missing, isn't JSON, has another schema version, or
            breaks the schema (the message names the first offending key).
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise BundleError(f"no bundle at {folder}: the folder does not exist; make one with `mirror export`")
    if not path.is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST_NAME}; make one with `mirror export`")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} is not readable JSON ({error}); export the bundle again") from error
    _check_version(path, data)
    _check_schema(path, data)
    return _manifest(data)


def check_files(folder: Path, manifest: Manifest, *, hashes: bool = False) -> None:
    """Check that every file of a bundle is there with its size, and its sha256 when asked.

    Raises:
        BundleError: names the first file that is missing or differs.
    """
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{name} is missing from {folder}; export the bundle again")
        size = path.stat().st_size
        if size != facts.bytes:
            raise BundleError(
                f"{name} has {size} bytes, {MANIFEST_NAME} says {facts.bytes}: it was truncated or edited; "
                "export the bundle again"
            )
        if hashes and file_sha256(path) != facts.sha256:
            raise BundleError(
                f"{name} does not have the sha256 that {MANIFEST_NAME} says: it was edited; export the bundle again"
            )


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema of `mirror.json`."""
    text = resources.files("mirror").joinpath("bundle.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def _check_version(path: Path, data: Any) -> None:
    found = data.get("schema_version") if isinstance(data, dict) else None
    if found != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {found!r}, this mirror reads {SCHEMA_VERSION}; "
            "export the bundle again with this version"
        )


def _check_schema(path: Path, data: Any) -> None:
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(data))
    if error is not None:
        where = ".".join(str(part) for part in error.absolute_path) or "the top level"
        raise BundleError(f"{path}: at {where}: {error.message}; export the bundle again")


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Segment) and not value.compiled:
            del fields["compiled"]
        if isinstance(value, Segment) and value.program is None:
            del fields["program"]
        return fields
    if isinstance(value, Mapping):
        return {(key.value if isinstance(key, Form) else key): _to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    return value


def _manifest(data: dict[str, Any]) -> Manifest:
    tokens, decoding = data["tokens"], data["decoding"]
    return Manifest(
        schema_version=data["schema_version"],
        producer=Producer(**data["producer"]),
        model=ModelFacts(**data["model"]),
        decoding=Decoding(**{**decoding, "trained_exits": tuple(decoding.get("trained_exits", ()))}),
        tokens=Tokens(**{**tokens, "eos": tuple(tokens["eos"])}),
        draft=None if data["draft"] is None else DraftFacts(**data["draft"]),
        segments={name: _segment(item) for name, item in data["segments"].items()},
        files={name: FileFacts(**item) for name, item in data["files"].items()},
        settings=_settings(data["settings"]),
        chat=_chat(data.get("chat")),
    )


def _chat(item: dict[str, Any] | None) -> ChatFormat | None:
    if item is None:
        return None
    return ChatFormat(item["joins"], tuple(item["trimmed"]), tuple(item["refused"]), item["empty"], item.get("date"))


def _settings(item: dict[str, Any]) -> Settings:
    lists = {name: tuple(value) for name, value in item.items() if isinstance(value, list)}
    return Settings(**{**item, **lists})


def _segment(item: dict[str, Any]) -> Segment:
    return Segment(
        name=item["name"],
        kv=tuple(LayerKV(**layer) for layer in item["kv"]),
        graphs={Form(form): _graph(graph) for form, graph in item["graphs"].items()},
        compiled=tuple(Compiled(**compiled) for compiled in item.get("compiled", ())),
        program=item.get("program"),
    )


def _graph(item: dict[str, Any]) -> Graph:
    return Graph(item["file"], _tensors(item["inputs"]), _tensors(item["outputs"]))


def _tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items)
