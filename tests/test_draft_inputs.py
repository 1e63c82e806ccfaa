"""A trained draft's graphs against torch: streams, features, a trimmed vocabulary, weights stored in 8 bits."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mirror.bundle import INT8_SEGMENTS, NOISE_POSITIONS, VOCABULARY_FILE, Form, Manifest, Segment, write_manifest
from mirror.errors import ExportError
from mirror.export import build, cut
from mirror.export.bind import Binder, Precision
from mirror.export.build import ExportOptions, export_bundle
from mirror.export.checkpoint import open_checkpoint
from mirror.export.lower import finish
from mirror.export.recut import recut_bundle
from mirror.export.trace import DOMAIN
from mirror.export.weights import MemorySource, WeightFile
from mirror.runtime.feeds import FeedPool
from mirror.summary import summarize
from mirror.targets.base import LoadRequest, PassShape, Tensor, to_host
from mirror.targets.cpu import CpuDevice
from tests.families import make_checkpoint
from tests.test_export import distilled_record

HIDDEN, STREAMS, FED_BY, EPSILON = 32, 3, 2, 1e-3
CAPACITY = 24
TOKENS = [5, 9, 2, 7, 11]
KEPT = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("target") / "llama")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("distilled") / "d"
    (folder / "draft").mkdir(parents=True)
    checkpoint = open_checkpoint(str(llama))
    config = checkpoint.config
    config.num_hidden_layers = 1
    config.save_pretrained(folder / "draft")
    random = torch.Generator().manual_seed(0)
    tensors = load_file(llama / "model.safetensors")
    own = {name: value for name, value in tensors.items() if ".layers.0." in name or name == "model.norm.weight"}
    own |= {
        "streams.weight": torch.randn((STREAMS, HIDDEN), generator=random),
        "features.norm.weight": torch.rand(HIDDEN, generator=random) + 0.5,
        "features.weight": torch.randn((HIDDEN, HIDDEN), generator=random) / 4,
        "features.absent": torch.randn(HIDDEN, generator=random),
    }
    up = "model.layers.0.mlp.up_proj.weight"
    scale = own[up].abs().amax(dim=1) / 127
    own[up], own[up + ".scale"] = torch.round(own[up] / scale[:, None]).to(torch.int8), scale
    save_file(own, folder / "draft" / "model.safetensors")
    ids = torch.randperm(int(config.vocab_size), generator=random).to(torch.int32)
    save_file({"ids": ids}, folder / "vocabulary.safetensors")
    facts = {
        "name": "t",
        "fingerprint": open_checkpoint(str(llama)).fingerprint,
        "tokenizer_fingerprint": _no_tokenizer(),
    }
    record = distilled_record(
        facts,
        norm_eps=EPSILON,
        vocabulary=KEPT,
        draft={"layers": [0], "parameters": 1, "streams": STREAMS, "feature_layer": FED_BY},
        defaults={"exit_layer": FED_BY, "fanout": [6, 2, 2, 2], "tokens_per_pass": [2, 3], "candidates": "draft"},
    )
    (folder / "distill.json").write_text(json.dumps(record))
    return folder


def _print_of(checkpoint: Path) -> str:
    return open_checkpoint(str(checkpoint)).fingerprint


def _no_tokenizer() -> str:
    return build.tokenizer_fingerprint(None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, llama: Path, distilled: Path) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    options = ExportOptions(draft=str(distilled), gamma=3, max_length=128)
    return folder, export_bundle(str(llama), folder, options).manifest


def test_the_training_decides_what_the_user_leaves_open(bundle: tuple[Path, Manifest]) -> None:
    _, manifest = bundle
    assert "draft_sampled" not in manifest.segments, "in float32 it is a CPU's, where the host adds the noise"
    assert (manifest.decoding.exit_layer, manifest.decoding.kappa) == (FED_BY, 8)
    assert manifest.draft is not None
    assert (manifest.draft.streams, manifest.draft.feature_layer, manifest.draft.vocabulary) == (STREAMS, FED_BY, KEPT)
    assert manifest.settings.fanout == (6, 2, 2, 2)
    assert manifest.settings.tokens_per_pass == (2, 3)
    assert manifest.settings.candidates == "draft"
    assert manifest.settings.draft_context is None, "it is fed by states, which the target has for all of a context"


def _torch_candidates(llama: Path, distilled: Path, features: np.ndarray, rows: list[int]) -> tuple[list, np.ndarray]:
    """Return the likeliest nine tokens and their log-probabilities over a line of tokens and two streams."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(distilled / "draft"), dtype=torch.float32
    ).eval()
    own = load_file(distilled / "draft" / "model.safetensors")
    up = "model.layers.0.mlp.up_proj.weight"
    own[up] = own[up].float() * own.pop(up + ".scale")[:, None]
    target = load_file(llama / "model.safetensors")
    model.load_state_dict({**{n: t for n, t in target.items() if n in model.state_dict()}, **_plain(own)}, strict=False)
    width = len(TOKENS) + 2
    with torch.no_grad():
        embedded = torch.cat([model.get_input_embeddings()(torch.tensor(TOKENS)), own["streams.weight"][:2]])
        state = torch.nn.functional.rms_norm(
            torch.from_numpy(features), (HIDDEN,), own["features.norm.weight"], EPSILON
        )
        has = torch.tensor([False, True, True, True, True, False, False])[:, None]
        embedded = embedded + torch.where(has, state @ own["features.weight"].T, own["features.absent"])
        mask = torch.full((width, width), -1e9).triu(1)[None, None]
        places = torch.arange(width)[None]
        hidden = model.base_model(
            inputs_embeds=embedded[None], attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state[0]
        ids = load_file(distilled / "vocabulary.safetensors")["ids"].long()[:KEPT]
        logits = model.get_output_embeddings()(hidden[rows])[:, ids]
        top = torch.log_softmax(logits, -1).topk(9)
    return ids[top.indices].tolist(), top.values.numpy()


def _plain(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in own.items() if not name.startswith(("streams.", "features."))}


ROWS = [4, 5, 6]


def _features(dtype: str = "float32") -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((len(TOKENS) + 2, HIDDEN)).astype(np.float16)
    return values.astype(dtype)


def _outputs(
    folder: Path, manifest: Manifest, segments: tuple[str, str], form: Form, features: np.ndarray
) -> dict[str, np.ndarray]:
    """Run a line of tokens and two streams through both graphs of a draft; return their outputs by name."""
    width = len(TOKENS) + 2
    vocab = manifest.model.vocab_size
    feeds = FeedPool(CAPACITY, 64).at(width)
    places = np.arange(width)
    feeds.fill_rows(
        np.array([*TOKENS, vocab, vocab + 1]),
        places,
        np.minimum(places + 1, len(TOKENS)),
        np.array([-2] * len(TOKENS) + [0, 0]),
        0,
    )
    slots = feeds.tensors["slot_branch"]
    assert isinstance(slots, np.ndarray)
    slots[len(TOKENS) : width] = 0
    fed = np.array([0, 1, 1, 1, 1, 0, 0], np.float32)
    tensors = {**feeds.tensors, "logit_rows": np.array(ROWS), "features": features[None], "feature_rows": fed}
    found = {}
    for name in segments:
        device, segment = CpuDevice(form), manifest.segments[name]
        loaded = device.load_segment(LoadRequest(folder, segment, [PassShape(width, 3)], CAPACITY, 1))
        outputs = loaded.run(tensors, device.make_cache(segment.kv, CAPACITY), 0)
        found |= {name + output: to_host(tensor).copy() for output, tensor in outputs.items()}
    return found


@pytest.mark.parametrize("form", list(Form))
def test_graphs_compute_what_torch_does(
    bundle: tuple[Path, Manifest], llama: Path, distilled: Path, form: Form
) -> None:
    features = _features()
    ids, logprobs = _torch_candidates(llama, distilled, features, ROWS)
    found = _outputs(*bundle, ("draft", "draft_trunk"), form, features)
    assert found["draft_trunkcandidate_ids"][0].tolist() == ids
    np.testing.assert_allclose(found["draft_trunkcandidate_logprobs"][0], logprobs, atol=2e-5)
    assert found["drafttoken_ids"][0].tolist() == found["draft_trunktoken_ids"][0].tolist() == [row[0] for row in ids]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4", "int8-fp16"])
def test_on_a_cpu_a_trained_draft_multiplies_integers(
    tmp_path: Path, llama: Path, distilled: Path, precision: str
) -> None:
    options = ExportOptions(draft=str(distilled), gamma=3, max_length=128, precision=precision)
    manifest = export_bundle(str(llama), tmp_path / "b", options).manifest
    feeds_type = "float16" if precision.endswith("fp16") else "float32"
    trunk = manifest.segments["draft_trunk_int8"]
    assert {layer.dtype for layer in trunk.kv} == {"float32"}
    (features,) = (spec for spec in trunk.graphs[Form.INPLACE].inputs if spec.name == "features")
    assert features.dtype == feeds_type, "what feeds it is the target's state as it is"
    operators = Counter(node.op_type for node in ir.load(tmp_path / "b" / "draft_trunk_int8.onnx").graph)
    # Packed query, key and value; output; packed gate and up; down; LM head. What feeds it is not rounded.
    assert (operators["DynamicQuantizeMatMul"], operators["FusedMatMul"], operators["MatMulNBits"]) == (5, 1, 0)
    _, logprobs = _torch_candidates(llama, distilled, _features(), ROWS)
    found = _outputs(tmp_path / "b", manifest, ("draft_int8", "draft_trunk_int8"), Form.INPLACE, _features(feeds_type))
    if precision != "int4":  # whose embedding is another
        np.testing.assert_allclose(found["draft_trunk_int8candidate_logprobs"][0], logprobs, atol=0.25)
    assert found["draft_int8token_ids"].tolist() == found["draft_trunk_int8token_ids"].tolist()


@pytest.mark.parametrize("magnitude", [1.0, 1e4])
def test_one_large_row_leaves_the_others_their_digits(tmp_path: Path, magnitude: float) -> None:
    """An MLP's inner rows can be a thousand times as large at a text's first token."""
    random = np.random.default_rng(2)
    weight = random.standard_normal((4, 8)).astype(np.float32)
    x = random.standard_normal((1, 3, 8)).astype(np.float32)
    x[0, 0] *= magnitude
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 3, 8]))
    stored = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, 8]))
    one = ir.Value(name="one", const_value=ir.tensor(np.ones(1, np.float32), name="one"))
    gated = ir.node("Mul", [value, one])
    linear = ir.node("Linear", [gated.outputs[0], stored], domain=DOMAIN)
    gated.outputs[0].type, gated.outputs[0].shape = value.type, value.shape
    linear.outputs[0].type, linear.outputs[0].shape = value.type, ir.Shape([1, 3, 4])
    graph = ir.Graph([value], [linear.outputs[0]], nodes=[gated, linear], initializers=[stored, one])
    (tmp_path / "weights").mkdir()
    file = WeightFile(tmp_path / "weights" / "w.bin", "weights/w.bin")
    Binder(tmp_path, MemorySource({"w": weight}), Precision.FP32, file).of_integers().bind(graph, {"w": ("w",)})
    ir.save(finish(graph, "one"), tmp_path / "g.onnx")
    (found,) = ort.InferenceSession(tmp_path / "g.onnx").run(None, {"x": x})
    np.testing.assert_allclose(found[0, 1:], (x @ weight.T)[0, 1:], atol=0.15)


@pytest.mark.parametrize(
    ("asked", "draft", "has"),
    [(None, "d", True), (False, "d", False), (None, "layers:0", False), (True, "layers:0", True)],
)
def test_who_gets_integers(
    tmp_path: Path, llama: Path, distilled: Path, asked: bool | None, draft: str, has: bool
) -> None:
    chosen = str(distilled) if draft == "d" else draft
    options = ExportOptions(draft=chosen, gamma=3, max_length=128, int8_draft=asked)
    manifest = export_bundle(str(llama), tmp_path / "b", options).manifest
    assert (set(INT8_SEGMENTS.values()) <= manifest.segments.keys()) is has
    renewed = recut_bundle(tmp_path / "b", kappa=4, output=tmp_path / "r")
    assert renewed.segments.keys() == manifest.segments.keys()
    devices = {segment.name: segment.devices for segment in summarize(tmp_path / "r").segments}
    assert ("cpu" in devices["draft"]) is not has
    assert devices.get("draft_int8", ("cpu",)) == ("cpu",)


@pytest.mark.parametrize("draft", ["layers:0", "ngram"])
def test_what_can_not_be_integers_is_said(tmp_path: Path, draft: str) -> None:
    experts = make_checkpoint("qwen3_moe", tmp_path / "moe")
    with pytest.raises(ExportError, match=f"--int8-draft needs a draft that is a model, .* {draft} isn't one"):
        export_bundle(str(experts), tmp_path / "b", ExportOptions(draft=draft, max_length=64, int8_draft=True))
    assert not (tmp_path / "b").exists()


def test_the_exit_head_speaks_the_same_trimmed_vocabulary(bundle: tuple[Path, Manifest], distilled: Path) -> None:
    folder, manifest = bundle
    kept = set(load_file(distilled / "vocabulary.safetensors")["ids"][:KEPT].tolist())
    device = CpuDevice()
    loaded = device.load_segment(LoadRequest(folder, manifest.segments["exit_head"], [PassShape(3)], CAPACITY, 1))
    hidden = np.random.default_rng(1).standard_normal((1, 3, HIDDEN)).astype(np.float32)
    outputs = loaded.run({"hidden_states": hidden, "position_ids": np.zeros((1, 3), np.int64)}, None, 0)
    assert set(to_host(outputs["candidate_ids"]).ravel().tolist()) <= kept


def test_a_gpus_draft_adds_noise_to_the_likeliest_tokens(
    tmp_path: Path, llama: Path, distilled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    options = ExportOptions(draft=str(distilled), gamma=3, max_length=128, precision="fp16")
    manifest = export_bundle(str(llama), folder, options).manifest
    tokens = np.load(folder / VOCABULARY_FILE)
    assert tokens.tolist() == load_file(distilled / "vocabulary.safetensors")["ids"][:KEPT].tolist()
    noise = np.zeros((NOISE_POSITIONS, KEPT), np.float32)
    noise[5, 11], noise[9, 3] = 1e4, 1e4
    unperturbed = _chosen(folder, manifest.segments["draft_trunk"], noise)
    assert not {tokens[11], tokens[3]} & set(unperturbed)
    assert _chosen(folder, manifest.segments["draft_sampled"], noise) == [tokens[11], unperturbed[1], tokens[3]]
    # The target's draws give noise of their own to the likeliest alone. The bundle is one of before, without the list
    # of tokens, and its weights are linked, which the reader of graphs refuses.
    monkeypatch.setattr(cut, "NOISY_TOKENS", 2)
    (folder / VOCABULARY_FILE).unlink()
    files = {name: facts for name, facts in manifest.files.items() if name != VOCABULARY_FILE}
    write_manifest(folder, dataclasses.replace(manifest, files=files))
    again = recut_bundle(folder, kappa=1, output=tmp_path / "again")
    assert _chosen(tmp_path / "again", again.segments["draft_sampled"], noise) == unperturbed
    assert np.load(tmp_path / "again" / VOCABULARY_FILE).tolist() == tokens.tolist()
    assert VOCABULARY_FILE in again.files


def _chosen(folder: Path, segment: Segment, noise: np.ndarray) -> list[int]:
    """Return the tokens that a draft's graph chooses after three, of whose rows the noise is 5, 0 and 9."""
    rows = {"noise": noise, "noise_rows": np.array([5, 0, 9]), "inverse_temperature": np.ones(1, np.float32)}
    feeds = FeedPool(CAPACITY, 128).at(3)
    feeds.fill_causal(np.array([1, 2, 3]), 0)
    none = {"features": np.zeros((1, 3, HIDDEN), np.float16), "feature_rows": np.zeros(3, np.float32)}
    tensors: dict[str, Tensor] = {**feeds.tensors, **rows, **none, "logit_rows": np.arange(3)}
    device = CpuDevice()
    loaded = device.load_segment(LoadRequest(folder, segment, [PassShape(3, 3)], CAPACITY, 1))
    found: list[int] = to_host(loaded.run(tensors, device.make_cache(segment.kv, CAPACITY), 0)["token_ids"])[0].tolist()
    return found


def test_a_whole_vocabulary_on_request(tmp_path: Path, llama: Path, distilled: Path) -> None:
    options = ExportOptions(draft=str(distilled), gamma=2, max_length=128, draft_vocabulary=0)
    manifest = export_bundle(str(llama), tmp_path / "b", options).manifest
    assert manifest.draft is not None
    assert manifest.draft.vocabulary == manifest.draft.vocab_size
    # Three positions, and the training's fan-out is for four.
    assert manifest.settings.fanout is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"exit_layer": "1"}, "--exit-layer is 1 and the draft is fed by the state after layer 2"),
        ({"draft_vocabulary": 90}, r"--draft-vocabulary is 90 and ngram ranks no tokens"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, llama: Path, distilled: Path, changes: dict[str, object], says: str
) -> None:
    draft = "ngram" if "draft_vocabulary" in changes else str(distilled)
    with pytest.raises(ExportError, match=says):
        export_bundle(str(llama), tmp_path / "b", ExportOptions(draft=draft, max_length=128, **changes))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_another_exit_layer_is_refused_where_the_draft_is_fed(bundle: tuple[Path, Manifest], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="fed by the state after layer 2"):
        recut_bundle(bundle[0], exit_layer="3", output=tmp_path / "r")
    renewed = recut_bundle(bundle[0], kappa=4, output=tmp_path / "r")
    assert renewed.settings.fanout is None
    assert renewed.settings.tokens_per_pass == (2, 3)
