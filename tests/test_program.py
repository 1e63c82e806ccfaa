"""A draft's program: which graphs have one, what it says of them, and that it follows a re-cut."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from mirror.bundle import INT8_SEGMENTS, Manifest, check_files, read_manifest, write_manifest
from mirror.export import build
from mirror.export.bind import Binder, Precision
from mirror.export.build import ExportOptions, export_bundle
from mirror.export.checkpoint import open_checkpoint
from mirror.export.normalize import normalize
from mirror.export.program import draft_program
from mirror.export.recut import INT8_SOURCE, PROGRAM_FILE, recut_bundle, write_segments
from mirror.export.weights import WeightFile
from mirror.runtime.feeds import FeedPool
from mirror.targets.base import LoadRequest, PassShape, to_host
from mirror.targets.cpu import CpuDevice
from mirror.targets.draft_program import Matrix, read_program
from tests.draft_reference import Reference
from tests.families import VOCAB, make_checkpoint
from tests.test_export import distilled_record

HIDDEN, INNER, HEAD_DIM, POSITIONS = 64, 48, 16, 80
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": HEAD_DIM, "num_hidden_layers": 2}
STREAMS, KEPT, CAPACITY = 3, 40, 24


def source_of(family: str, folder: Path, precision: Precision = Precision.FP32, **changes: Any) -> ir.Model:
    """Return the source graph of integers that a family's whole model has as its own draft, loaded from a bundle."""
    sizes = {name: size for name, size in SIZES.items() if family != "gpt2" or name != "head_dim"}
    checkpoint = open_checkpoint(str(make_checkpoint(family, folder / "c", **{**sizes, **changes})))
    (folder / "b" / "weights").mkdir(parents=True)
    file = WeightFile(folder / "b" / "weights" / "mirror.bin", "weights/mirror.bin")
    target = Binder(folder / "b", checkpoint.weights, precision, file)
    # A quantised embedding is the target's, which is there before its drafts.
    for binder in (*((target,) if precision.bits else ()), target.of_integers()):
        traced = build.trace(checkpoint.config, build._TORCH_TYPES.get(binder.dtype, torch.float32))
        model = normalize(traced, POSITIONS)
        binder.bind(model.graph, traced.parameters)
    ir.save(model, folder / "b" / INT8_SOURCE)
    return ir.load(folder / "b" / INT8_SOURCE)


def values(folder: Path, tensor: dict[str, Any]) -> np.ndarray:
    """Read a tensor of a program."""
    dtype = np.dtype(tensor["dtype"])
    if "data" in tensor:
        return np.frombuffer(base64.b64decode(tensor["data"]), dtype).reshape(tensor["shape"])
    assert tensor["bytes"] == np.prod(tensor["shape"]) * dtype.itemsize
    stored = (folder / tensor["file"]).read_bytes()[tensor["offset"] :][: tensor["bytes"]]
    return np.frombuffer(stored, dtype).reshape(tensor["shape"])


def unrounded(folder: Path, matrix: dict[str, Any]) -> np.ndarray:
    """Return a linear layer's weight, float32 `[out, in]`."""
    return (values(folder, matrix["values"]).astype(np.float32) * values(folder, matrix["scales"])).T


def is_rounded(found: np.ndarray, exact: torch.Tensor) -> bool:
    step = np.abs(exact.numpy()).max(axis=1, keepdims=True) / 127
    return found.shape == tuple(exact.shape) and bool((np.abs(found - exact.numpy()) <= step * 0.501).all())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ir.Model]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, source_of("llama", folder)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_llama_like_draft_has_a_program(tmp_path: Path, llama: tuple[Path, ir.Model], family: str) -> None:
    changes = {"sliding_window": None} if family == "mistral" else {}
    place, source = llama if family == "llama" else (tmp_path, source_of(family, tmp_path, **changes))
    program = draft_program(source)
    assert program is not None
    sizes = {"format": 1, "hidden": HIDDEN, "heads": 4, "kv_heads": 2, "head_dim": HEAD_DIM, "inner": INNER}
    sizes |= {"tokens": VOCAB, "streams": 0, "positions": POSITIONS, "scale": 0.25}
    assert {name: program[name] for name in sizes} == sizes
    assert program["epsilon"] == pytest.approx(1e-6)
    assert (program["stream_rows"], program["vocabulary"], program["embedding"]["kind"]) == (None, None, "float32")

    weights, folder = load_file(place / "c" / "model.safetensors"), place / "b"
    np.testing.assert_array_equal(values(folder, program["norm"]), weights["model.norm.weight"])
    table = values(folder, program["embedding"]["values"])
    np.testing.assert_array_equal(table, weights["model.embed_tokens.weight"])
    assert is_rounded(unrounded(folder, program["head"]), weights["lm_head.weight"])
    angles = np.arange(POSITIONS)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    np.testing.assert_allclose(values(folder, program["cosines"]), np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(values(folder, program["sines"]), np.sin(angles), atol=1e-5)
    assert len(program["layers"]) == 2
    for index, layer in enumerate(program["layers"]):
        own = {
            name.removeprefix(f"model.layers.{index}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        np.testing.assert_array_equal(values(folder, layer["attention_norm"]), own["input_layernorm.weight"])
        np.testing.assert_array_equal(values(folder, layer["mlp_norm"]), own["post_attention_layernorm.weight"])
        joined = {
            "qkv": [f"self_attn.{part}_proj.weight" for part in "qkv"],
            "output": ["self_attn.o_proj.weight"],
            "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            "down": ["mlp.down_proj.weight"],
        }
        for name, parts in joined.items():
            assert is_rounded(unrounded(folder, layer[name]), torch.cat([own[part] for part in parts]))
            assert (layer[name]["bias"] is None) is (family != "qwen2" or name != "qkv")
        if family == "qwen2":
            bias = torch.cat([own[f"self_attn.{part}_proj.bias"] for part in "qkv"])
            np.testing.assert_array_equal(values(folder, layer["qkv"]["bias"]), bias)
        for name in ("query_norm", "key_norm"):
            assert (layer[name] is None) is (family != "qwen3")
            if family == "qwen3":
                np.testing.assert_array_equal(values(folder, layer[name]), own[f"self_attn.{name[0]}_norm.weight"])


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "phi", "olmo2", "cohere"])
def test_other_drafts_have_none(tmp_path: Path, family: str) -> None:
    assert draft_program(source_of(family, tmp_path)) is None


def test_heads_of_other_sizes_have_none(tmp_path: Path) -> None:
    assert draft_program(source_of("llama", tmp_path, head_dim=8)) is None


@pytest.mark.parametrize(("precision", "kind"), [(Precision.BF16, "bfloat16"), (Precision.INT8, "blocks_8")])
def test_an_embedding_has_the_bundles_precision(tmp_path: Path, precision: Precision, kind: str) -> None:
    program = draft_program(source_of("llama", tmp_path, precision, tie_word_embeddings=True))
    assert program is not None
    embedding = program["embedding"]
    assert (embedding["kind"], embedding["scales"] is None) == (kind, precision.bits is None)
    assert (program["tokens"], program["hidden"]) == (VOCAB, HIDDEN)
    assert {program["norm"]["dtype"], program["cosines"]["dtype"]} == {"float32"}


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def _insert(model: ir.Model, value: ir.Value, node: ir.Node) -> None:
    """Put a node with one output behind a value."""
    readers = [use for use in value.uses() if use.node is not node]
    for use in readers:
        use.node.replace_input_with(use.idx, node.outputs[0])
    model.graph.insert_before(readers[0].node, node)


def _doubled(model: ir.Model, op_type: str) -> None:
    value = first(model, op_type).outputs[0]
    _insert(model, value, ir.node("Add", [value, value]))


def _swapped(model: ir.Model) -> None:
    """Let up be what is gated."""
    gate, up = first(model, "Sigmoid").inputs[0], None
    assert gate is not None
    split = gate.producer()
    assert split is not None
    up = split.outputs[1]
    uses = [(use, other) for value, other in ((gate, up), (up, gate)) for use in value.uses()]
    for use, other in uses:
        use.node.replace_input_with(use.idx, other)


def _dropped(model: ir.Model) -> None:
    """Leave the first MLP's residual out: the product is added to itself."""
    marker = first(model, "LayerOutput").inputs[0]
    assert marker is not None
    add = marker.producer()
    assert add is not None
    add.replace_input_with(0, add.inputs[1])


def _attribute(op_type: str, name: str, value: float) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        node = [node for node in model.graph if node.op_type == op_type][-1]
        node.attributes[name] = ir.Attr(name, node.attributes[name].type, value)

    return edit


def _unread(model: ir.Model) -> None:
    model.graph.append(ir.node("Abs", [model.graph.outputs[0]]))


def _fed(model: ir.Model) -> None:
    norm = model.graph.initializers["model.norm.weight"]
    model.graph.initializers["features.weight"] = ir.Value(name="features.weight", const_value=norm.const_value)


EDITS: dict[str, Callable[[ir.Model], None]] = {
    "nothing": lambda model: None,
    "rows doubled": lambda model: _doubled(model, "Gather"),
    "a norm doubled": lambda model: _doubled(model, "RMSNorm"),
    "a product doubled": lambda model: _doubled(model, "DynamicQuantizeMatMul"),
    "a layer doubled": lambda model: _doubled(model, "LayerOutput"),
    "gate and up swapped": _swapped,
    "no residual": _dropped,
    "a node for nothing": _unread,
    "a window": _attribute("Attention", "window", 7),
    "a cap": _attribute("Attention", "softcap", 30.0),
    "a scale of one layer": _attribute("Attention", "scale", 0.3),
    "a cache twice": _attribute("Attention", "layer", 0),
    "neighbours": _attribute("Rotary", "interleaved", 1),
    "an epsilon of one norm": _attribute("RMSNorm", "epsilon", 0.1),
    "features": _fed,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_graph_has_none(llama: tuple[Path, ir.Model], edit: str) -> None:
    model = llama[1].clone()
    EDITS[edit](model)
    assert (draft_program(model) is None) is (edit != "nothing")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("tied") / "llama", **SIZES, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, tied: Path) -> Path:
    """A draft of one layer with streams and a trimmed vocabulary, as `mirror distill` would write it."""
    folder = tmp_path_factory.mktemp("distilled") / "d"
    (folder / "draft").mkdir(parents=True)
    config = open_checkpoint(str(tied)).config
    config.num_hidden_layers = 1
    config.save_pretrained(folder / "draft")
    random = torch.Generator().manual_seed(0)
    stored = load_file(tied / "model.safetensors")
    own = {name: tensor for name, tensor in stored.items() if ".layers.0." in name or name == "model.norm.weight"}
    own["streams.weight"] = torch.randn((STREAMS, HIDDEN), generator=random)
    save_file(own, folder / "draft" / "model.safetensors")
    save_file({"ids": torch.randperm(VOCAB, generator=random).to(torch.int32)}, folder / "vocabulary.safetensors")
    fingerprint, no_tokenizer = open_checkpoint(str(tied)).fingerprint, build.tokenizer_fingerprint(None)
    target = {"name": "t", "fingerprint": fingerprint, "tokenizer_fingerprint": no_tokenizer}
    draft = {"layers": [0], "parameters": 1, "streams": STREAMS, "feature_layer": None}
    record = distilled_record(target, draft=draft, vocabulary=KEPT)
    (folder / "distill.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tied: Path, distilled: Path) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    options = ExportOptions(draft=str(distilled), gamma=3, max_length=64, precision="int4-fp16")
    export_bundle(str(tied), folder, options)
    return folder


def program_in(folder: Path) -> dict[str, Any]:
    program: dict[str, Any] = json.loads((folder / PROGRAM_FILE).read_text(encoding="utf-8"))
    return program


def programs_of(manifest: Manifest) -> set[str]:
    """Return the segments that have a program."""
    found = {name: segment.program for name, segment in manifest.segments.items() if segment.program is not None}
    assert set(found.values()) <= {PROGRAM_FILE}
    return set(found)


def test_an_export_writes_it(bundle: Path, distilled: Path) -> None:
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    assert programs_of(manifest) == set(INT8_SEGMENTS.values())
    assert PROGRAM_FILE in manifest.files
    program = program_in(bundle)
    assert program == draft_program(ir.load(bundle / INT8_SOURCE))
    assert {tensor["file"] for tensor in (program["norm"], program["cosines"])} <= manifest.files.keys()
    trained = load_file(distilled / "draft" / "model.safetensors")
    assert program["streams"] == STREAMS
    np.testing.assert_array_equal(values(bundle, program["stream_rows"]), trained["streams.weight"])
    ids = load_file(distilled / "vocabulary.safetensors")["ids"][:KEPT]
    assert "data" in program["vocabulary"], "short tensors are in the graph itself"
    assert values(bundle, program["vocabulary"]).tolist() == ids.tolist()
    assert program["head"]["values"]["shape"] == [HIDDEN, KEPT]


def test_blocks_of_an_embedding(bundle: Path, tied: Path) -> None:
    embedding = program_in(bundle)["embedding"]
    assert embedding["kind"] == "blocks_4"
    packed, scales = values(bundle, embedding["values"]), values(bundle, embedding["scales"])
    assert (packed.shape, scales.shape, scales.dtype) == ((VOCAB, HIDDEN // 2), (VOCAB, HIDDEN // 32), np.float16)
    numbers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(VOCAB, HIDDEN).astype(np.float32) - 8
    found = numbers * np.repeat(scales.astype(np.float32), 32, axis=1)
    exact = load_file(tied / "model.safetensors")["model.embed_tokens.weight"].numpy()
    assert np.abs(found - exact).max() <= np.abs(exact).max() / 7


class OfGraphs(Reference):
    """A pass in numpy with the graphs' rounding: what is multiplied has one scale a pass, MLPs' inner rows evened."""

    def embedded(self, ids: np.ndarray) -> np.ndarray:
        rows, scales = super().embedded(ids), self.program.embedding.scales
        assert scales is not None
        is_token = (ids < self.program.sizes["tokens"])[:, None]
        return np.where(is_token, rows.astype(scales.dtype).astype(np.float32), rows)

    def inner_product(self, x: np.ndarray, matrix: Matrix) -> np.ndarray:
        largest = np.abs(x).max(-1, keepdims=True)
        return self.product(x / largest, matrix) * largest

    def product(self, x: np.ndarray, matrix: Matrix) -> np.ndarray:
        low, high = min(x.min(), 0), max(x.max(), 0)
        scale = (high - low) / 255
        zero = np.rint(-low / scale)
        rounded = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
        result = rounded @ (matrix.values * matrix.scales)
        return result if matrix.bias is None else result + matrix.bias


def test_a_program_computes_what_the_graphs_do(bundle: Path) -> None:
    """Both round alike, so what they compute is nearly the same, and nothing of the graph can be missing."""
    ids, places = np.array([5, 9, 2, 7, 11, VOCAB, VOCAB + 2]), np.arange(7)
    feeds = FeedPool(CAPACITY, 64).at(len(ids))
    feeds.fill_rows(ids, places, places + 1, np.full(len(ids), -2), 0)
    segment = dataclasses.replace(read_manifest(bundle).segments["draft_trunk_int8"], program=None)
    device = CpuDevice()
    loaded = device.load_segment(LoadRequest(bundle, segment, [PassShape(len(ids), len(ids))], CAPACITY, 1))
    outputs = loaded.run({**feeds.tensors, "logit_rows": places}, device.make_cache(segment.kv, CAPACITY), 0)

    program = read_program(bundle, PROGRAM_FILE)
    assert program is not None
    assert program.vocabulary is not None
    logits = OfGraphs(program, CAPACITY).logits(feeds, 0, places)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logits, axis=-1)[:, : outputs["candidate_ids"].shape[-1]]
    tokens = program.vocabulary[order]
    assert to_host(outputs["candidate_ids"])[0, :, 0].tolist() == tokens[:, 0].tolist()
    found = to_host(outputs["candidate_logprobs"])[0]
    np.testing.assert_allclose(found, np.take_along_axis(logprobs, order, -1), atol=0.01)


def test_a_recut_writes_it_anew(bundle: Path, tmp_path: Path) -> None:
    """Into another folder, and in place; bundles that were made before it was thought of get one too."""
    program, old = program_in(bundle), tmp_path / "old"
    shutil.copytree(bundle, old)
    (old / PROGRAM_FILE).write_text("{}", encoding="utf-8")
    manifest = read_manifest(old)
    segments = {name: dataclasses.replace(segment, program=None) for name, segment in manifest.segments.items()}
    files = {name: facts for name, facts in manifest.files.items() if name != PROGRAM_FILE}
    write_manifest(old, dataclasses.replace(manifest, segments=segments, files=files))
    assert PROGRAM_FILE not in (old / "mirror.json").read_text(encoding="utf-8")
    assert programs_of(read_manifest(old)) == set()
    for output, folder in ((tmp_path / "new", tmp_path / "new"), (None, old)):
        recut_bundle(old, kappa=4, output=output)
        renewed = read_manifest(folder)
        assert programs_of(renewed) == set(INT8_SEGMENTS.values())
        assert PROGRAM_FILE in renewed.files
        assert program_in(folder) == program
        check_files(folder, renewed, hashes=True)


def test_it_goes_where_there_is_none(bundle: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "b", tmp_path / "again"
    shutil.copytree(bundle, folder)
    shutil.copytree(bundle, again)
    for place in (folder, again):
        source = ir.load(place / INT8_SOURCE)
        _attribute("Attention", "window", 7)(source)
        ir.save(source, place / INT8_SOURCE)
    segments = write_segments(folder, read_manifest(folder).decoding)
    assert all(segment.program is None for segment in segments.values())
    assert not (folder / PROGRAM_FILE).exists()

    manifest = read_manifest(again)
    size = (again / INT8_SOURCE).stat().st_size
    facts = dataclasses.replace(manifest.files[INT8_SOURCE], bytes=size)
    write_manifest(again, dataclasses.replace(manifest, files={**manifest.files, INT8_SOURCE: facts}))
    renewed = recut_bundle(again, kappa=4)
    assert (programs_of(renewed), PROGRAM_FILE in renewed.files) == (set(), False)
    assert not (again / PROGRAM_FILE).exists()
    check_files(again, read_manifest(again))
