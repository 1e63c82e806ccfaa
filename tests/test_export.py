"""Export on tiny real checkpoints: parity, cutting, weights that are not copied, refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from mirror.bundle import Form, check_files, read_manifest
from mirror.errors import BundleError, ExportError, SelfCheckError
from mirror.export import build, selfcheck
from mirror.export.build import ExportOptions, export_bundle
from mirror.export.checkpoint import open_checkpoint
from mirror.export.cut import exit_layer_of
from mirror.export.normalize import normalize
from mirror.export.recut import recut_bundle
from mirror.export.trace import Traced, remembering, trace
from tests.families import make_checkpoint

OPTIONS = ExportOptions(max_length=200, draft="layers:0,3")
_GATE_AND_UP = "model.layers.0.mlp.gate_proj.weight+up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama") / "checkpoint")


@pytest.fixture(scope="module")
def llama_bundle(llama: Path) -> Path:
    bundle = llama.parent / "bundle"
    export_bundle(str(llama), bundle, OPTIONS)
    return bundle


def test_windows_differ_from_full_attention(tmp_path: Path) -> None:
    """The windowed families would pass unwindowed too if their window were wider than the text."""
    torch.manual_seed(0)
    logits = []
    for window in (7, 200):
        folder = make_checkpoint("mistral", tmp_path / str(window), sliding_window=window)
        checkpoint = open_checkpoint(str(folder))
        model = selfcheck._reference(checkpoint)
        logits.append(model(input_ids=torch.arange(3, 23)[None]).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "cohere", "opt", "mixtral"])
def test_rows_form_computes_what_inplace_computes(family: str, tmp_path: Path) -> None:
    export_bundle(str(make_checkpoint(family, tmp_path / "checkpoint")), tmp_path / "bundle", OPTIONS)
    inplace = _Target(tmp_path / "bundle", Form.INPLACE)
    rows = _Target(tmp_path / "bundle", Form.ROWS)
    tokens = np.random.default_rng(1).integers(3, 90, 30)
    for start, width in ((0, 9), (9, 1), (10, 7), (17, 13)):
        step = tokens[start : start + width]
        np.testing.assert_allclose(inplace.run(step, start), rows.run(step, start), atol=2e-3, rtol=1e-3)


def test_rows_graphs_load_with_static_shapes(llama_bundle: Path) -> None:
    """Shape inference took a size apart from the range's own int32 bounds once shapes were fixed."""
    for path in llama_bundle.glob("*.rows.onnx"):
        options = ort.SessionOptions()
        for name, size in (("width", 8), ("capacity", 64), ("rows", 1)):
            options.add_free_dimension_override_by_name(name, size)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_hidden_layers_of_a_bundle_add_up(llama_bundle: Path) -> None:
    manifest = read_manifest(llama_bundle)
    check_files(llama_bundle, manifest, hashes=True)
    assert [kv.layer for kv in manifest.segments["target_prefix"].kv] == [0, 1]
    assert [kv.layer for kv in manifest.segments["target_suffix"].kv] == [2, 3]
    assert manifest.segments["draft"].kv == manifest.segments["draft_trunk"].kv
    assert {spec.name: spec.shape for spec in manifest.segments["exit_head"].graphs[Form.INPLACE].outputs} == {
        "candidate_ids": (1, "width", 9),
        "candidate_logprobs": (1, "width", 9),
    }


def test_weights_of_the_right_type_are_linked_not_copied(llama: Path, llama_bundle: Path) -> None:
    linked = llama_bundle / "weights" / "model.safetensors"
    assert linked.samefile(llama / "model.safetensors")
    written = llama_bundle / "weights" / "mirror.bin"
    assert written.stat().st_size < 192 * 2**10  # only the rotary tables, a rollout's slots among them


def test_converted_weights_are_written_once(tmp_path: Path, llama: Path) -> None:
    options = dataclasses.replace(OPTIONS, precision="fp16", allow_failed_check=True)
    export_bundle(str(llama), tmp_path / "bundle", options)
    stored = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    size = (tmp_path / "bundle" / "weights" / "mirror.bin").stat().st_size
    pages = 60 * 4096  # every tensor starts on a page
    assert stored * 2 <= size < stored * 2 + pages


def test_matrices_that_adjoin_in_the_checkpoint_are_linked_as_one(tmp_path: Path, llama: Path) -> None:
    """Gate and up do in files that transformers wrote; query, key and value don't, so they are written anew."""
    half = shutil.copytree(llama, tmp_path / "half")
    tensors = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    report = export_bundle(str(half), tmp_path / "bundle", dataclasses.replace(OPTIONS, precision="fp16"))
    assert report.check.skipped is None
    weights = ir.load(tmp_path / "bundle" / "target_prefix.onnx").graph.initializers
    both = weights[_GATE_AND_UP].const_value
    assert isinstance(both, ir.ExternalTensor)
    assert both.location == "weights/model.safetensors"
    parts = [tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    stored = (tmp_path / "bundle" / both.location).read_bytes()[both.offset : both.offset + both.length]
    assert stored == torch.cat(parts).numpy().tobytes()
    packed = weights["model.layers.0.self_attn.q_proj.weight+k_proj+v_proj"].const_value
    assert isinstance(packed, ir.ExternalTensor)
    assert packed.location == "weights/mirror.bin"


@pytest.mark.parametrize(
    ("family", "packed"), [("llama", True), ("gemma2", True), ("cohere", True), ("phi3", False), ("gpt_neox", False)]
)
def test_gate_and_up_become_one_product(family: str, packed: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(family, tmp_path / "checkpoint")
    report = export_bundle(str(checkpoint), tmp_path / "bundle", dataclasses.replace(OPTIONS, precision="fp16"))
    assert report.check.skipped is None
    for name in ("target_prefix", "target_suffix"):
        weights = ir.load(tmp_path / "bundle" / f"{name}.onnx").graph.initializers
        assert sum(key.endswith("gate_proj.weight+up_proj") for key in weights) == (2 if packed else 0)


def test_rotary_tables_take_the_type_of_what_they_turn(tmp_path: Path) -> None:
    """OLMo 2 turns queries by float32 tables, whatever type they have; the operator wants one type."""
    checkpoint = make_checkpoint("olmo2", tmp_path / "olmo2")
    report = export_bundle(str(checkpoint), tmp_path / "bundle", dataclasses.replace(OPTIONS, precision="fp16"))
    assert report.check.skipped is None
    graph = ir.load(tmp_path / "bundle" / "target_prefix.onnx").graph
    turns = [node for node in graph if node.op_type == "RotaryEmbedding"]
    assert {value.dtype for node in turns for value in (node.inputs[0], *node.inputs[2:4])} == {ir.DataType.FLOAT16}


def test_bf16_is_written_though_no_cpu_runtime_computes_it(tmp_path: Path, llama: Path) -> None:
    report = export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, precision="bf16"))
    assert report.check.skipped is not None
    weight = ir.load(tmp_path / "bundle" / "target_prefix.onnx").graph.initializers[_GATE_AND_UP]
    assert weight.const_value.dtype is ir.DataType.BFLOAT16
    stored = load_file(llama / "model.safetensors")
    expected = torch.cat([stored[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]).bfloat16()
    assert weight.const_value.tobytes() == expected.view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_bundles_are_near_the_checkpoint(precision: str, tmp_path: Path, llama: Path) -> None:
    report = export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, precision=precision))
    operators = {node.op_type for node in ir.load(tmp_path / "bundle" / "target_suffix.onnx").graph}
    assert "MatMulNBits" in operators
    assert "FusedMatMul" not in operators
    assert report.check.split is not None
    assert report.check.torch is not None
    assert report.check.split.largest < 1e-5
    assert report.check.torch.largest < {"int8": 0.3, "int4": 1.5}[precision]  # wide random weights round badly


@pytest.mark.parametrize("precision", ["int8-fp16", "int4-fp16"])
def test_quantised_bundles_for_gpus_compute_in_float16(precision: str, tmp_path: Path, llama: Path) -> None:
    """On a GPU attention in float32 has no kernel."""
    options = dataclasses.replace(OPTIONS, precision=precision, allow_failed_check=True)
    report = export_bundle(str(llama), tmp_path / "bundle", options)
    manifest = read_manifest(tmp_path / "bundle")
    assert {layer.dtype for segment in manifest.segments.values() for layer in segment.kv} == {"float16"}
    graph = ir.load(tmp_path / "bundle" / "target_prefix.onnx").graph
    product = next(node for node in graph if node.op_type == "MatMulNBits")
    assert product.attributes["bits"].as_int() == int(precision[3])
    assert product.inputs[2].const_value.dtype is ir.DataType.FLOAT16
    assert report.check.split is not None
    assert report.check.split.largest < 2e-2


def test_a_quantised_tied_embedding_shares_the_heads_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "tied", tie_word_embeddings=True)
    export_bundle(str(checkpoint), tmp_path / "bundle", dataclasses.replace(OPTIONS, precision="int4"))
    prefix = ir.load(tmp_path / "bundle" / "target_prefix.onnx").graph
    suffix = ir.load(tmp_path / "bundle" / "target_suffix.onnx").graph
    gather = next(node for node in prefix if node.op_type == "GatherBlockQuantized")
    head = [node for node in suffix if node.op_type == "MatMulNBits"][-1]
    data, weight = gather.inputs[0].const_value, head.inputs[1].const_value
    assert (data.offset, data.length) == (weight.offset, weight.length)


def test_recut_moves_the_exit_and_shares_the_weights(llama_bundle: Path, tmp_path: Path) -> None:
    before = (llama_bundle / "weights" / "model.safetensors").stat()
    other = llama_bundle.parent / "recut"
    manifest = recut_bundle(llama_bundle, exit_layer="3", kappa=4, gamma=3, output=other)
    assert (manifest.decoding.exit_layer, manifest.decoding.kappa, manifest.decoding.gamma) == (3, 4, 3)
    check_files(other, read_manifest(other), hashes=True)
    assert [kv.layer for kv in read_manifest(other).segments["target_suffix"].kv] == [3]
    assert (other / "weights" / "model.safetensors").stat().st_ino == before.st_ino
    tokens = np.arange(5, 14)
    np.testing.assert_allclose(
        _Target(other, Form.INPLACE).run(tokens, 0), _Target(llama_bundle, Form.INPLACE).run(tokens, 0), atol=1e-4
    )


def test_recut_in_place_keeps_a_whole_bundle(llama_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(llama_bundle, bundle)
    recut_bundle(bundle, exit_layer="1")
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    assert manifest.decoding.exit_layer == 1
    with pytest.raises(ExportError, match="exit layer 4 of a model with 4 layers"):
        recut_bundle(bundle, exit_layer="4")


def test_a_draft_of_all_layers_is_the_target(tmp_path: Path, llama: Path) -> None:
    export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, draft="layers:0,1,2,3"))
    tokens = np.arange(5, 14)
    draft = _Draft(tmp_path / "bundle").run(tokens, 0)
    assert draft[-1] == _Target(tmp_path / "bundle", Form.INPLACE).run(tokens, 0).argmax()


def test_another_model_can_be_the_draft_if_it_shares_the_tokens(tmp_path: Path, llama: Path) -> None:
    other = make_checkpoint("qwen2", tmp_path / "qwen2", num_hidden_layers=2)
    report = export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, draft=str(other)))
    assert report.manifest.draft is not None
    assert (report.manifest.draft.kind, report.manifest.draft.layers) == ("model", 2)
    linked = {path.name for path in (tmp_path / "bundle" / "weights").iterdir()}
    assert {"model.safetensors", "draft-model.safetensors"} <= linked
    small = make_checkpoint("qwen2", tmp_path / "small", vocab_size=64)
    with pytest.raises(ExportError, match=r"another tokenizer than .* \(vocabulary 64 against 96\)"):
        export_bundle(str(llama), tmp_path / "never", dataclasses.replace(OPTIONS, draft=str(small)))


def test_the_check_counts_the_drafts_right_guesses(tmp_path: Path, llama: Path) -> None:
    whole = export_bundle(str(llama), tmp_path / "whole", dataclasses.replace(OPTIONS, draft="layers:0,1,2,3")).check
    assert whole.split is not None
    assert whole.draft == whole.split.tokens == 24
    assert "first guess was the target's token 24 of 24 times" in whole.findings[-1]
    part = export_bundle(str(llama), tmp_path / "part", dataclasses.replace(OPTIONS, draft="layers:0")).check
    assert part.draft is not None
    assert part.draft < 24


def test_a_trained_head_and_draft_are_taken_and_checked(tmp_path: Path, llama: Path) -> None:
    distilled = _distilled(tmp_path / "distilled", llama)
    report = export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, draft=str(distilled)))
    assert report.manifest.decoding.trained_exits == (2,)
    hidden = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
    found = _run(tmp_path / "bundle" / "exit_head.onnx", {"hidden_states": hidden})
    expected = _torch_head(llama, distilled / "exit_head_2.safetensors", torch.from_numpy(hidden))
    assert (found["candidate_ids"][0] == expected.topk(9).indices[0].numpy()).all()
    recut = recut_bundle(tmp_path / "bundle", exit_layer="3", output=tmp_path / "recut")
    assert recut.decoding.trained_exits == (2,)
    plain = _run(tmp_path / "recut" / "exit_head.onnx", {"hidden_states": hidden})
    assert (plain["candidate_ids"] != found["candidate_ids"]).any()
    other = make_checkpoint("llama", tmp_path / "other", seed=1)
    with pytest.raises(ExportError, match=r"was distilled for llama-for-test, not for .*other"):
        export_bundle(str(other), tmp_path / "never", dataclasses.replace(OPTIONS, draft=str(distilled)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exit_layer": "0"}, "exit layer 0 of a model with 4 layers; give 1..3"),
        ({"exit_layer": "half"}, "--exit-layer"),
        ({"gamma": 0}, "--gamma is 0; give 1..64"),
        ({"kappa": 65}, "--kappa is 65; give 1..64"),
        ({"precision": "fp8"}, "precision fp8 is not known; choose one of fp32"),
        ({"draft": "layers:0,9"}, "the target lacks; it has 0..3"),
        ({"draft": "layers:zero"}, "not a list of layers; write layers:0,10,19,29"),
        ({"draft": "no-such-draft"}, "neither a model folder nor a GGUF file"),
    ],
)
def test_options_are_refused_before_any_work(
    changes: dict[str, object], message: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "trace", lambda *_: pytest.fail("work began"))
    with pytest.raises(ExportError, match=message):
        export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, **changes))
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported_are_named(tmp_path: Path) -> None:
    for model_type, message in (("t5", "encoder-decoder"), ("mamba", "MambaForCausalLM")):
        folder = tmp_path / model_type
        config = AutoConfig.for_model(model_type, num_hidden_layers=4)
        if model_type == "mamba":
            config.architectures = ["MambaForCausalLM"]
        config.save_pretrained(folder)
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
        with pytest.raises(ExportError, match=message):
            export_bundle(str(folder), tmp_path / "bundle", OPTIONS)
    assert not (tmp_path / "bundle").exists()


def test_missing_and_foreign_checkpoints(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ExportError, match="neither a model folder nor a GGUF file"):
        export_bundle(str(tmp_path / "nowhere"), tmp_path / "bundle", OPTIONS)
    folder = shutil.copytree(llama, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ExportError, match=r"has shape \[64, 32\], config.json means \[48, 32\]"):
        export_bundle(str(folder), tmp_path / "bundle", OPTIONS)
    assert not (tmp_path / "bundle").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]


def test_quantised_checkpoints_are_refused(tmp_path: Path, llama: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ExportError, match="quantised with gptq; give the unquantised checkpoint"):
        export_bundle(str(folder), tmp_path / "bundle", OPTIONS)


def test_a_failed_check_fails_the_export(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = selfcheck.CheckReport("fp32", selfcheck.Difference(0.5, 3, 8), None)
    monkeypatch.setattr(build, "check", lambda *_: wrong)
    with pytest.raises(SelfCheckError, match="greedy token 3 differs first"):
        export_bundle(str(llama), tmp_path / "bundle", OPTIONS)
    assert not (tmp_path / "bundle").exists()
    report = export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, allow_failed_check=True))
    assert report.check is wrong


def test_existing_output_needs_force(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ExportError, match="add --force to replace it"):
        export_bundle(str(llama), tmp_path / "bundle", OPTIONS)
    export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, force=True))
    read_manifest(tmp_path / "bundle")


def test_no_room_is_said_before_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ExportError, match="make room or choose another folder"):
        export_bundle(str(llama), tmp_path / "bundle", dataclasses.replace(OPTIONS, precision="int8"))


def test_manifest_faults_are_named(llama_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(llama_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "mirror.json").read_text())

    def written(changes: dict[str, object]) -> None:
        (bundle / "mirror.json").write_text(json.dumps({**manifest, **changes}))

    written({"schema_version": 99})
    with pytest.raises(BundleError, match="has schema version 99, this mirror reads 2"):
        read_manifest(bundle)
    written({"colour": "red"})
    with pytest.raises(BundleError, match="colour"):
        read_manifest(bundle)
    written({})
    (bundle / "exit_head.onnx").write_bytes((bundle / "exit_head.onnx").read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"exit_head.onnx has \d+ bytes"):
        check_files(bundle, read_manifest(bundle))


def test_no_file_of_the_making_machine_is_in_a_graph(llama_bundle: Path) -> None:
    for path in llama_bundle.glob("*.onnx"):
        assert b"site-packages" not in path.read_bytes()
        assert b"mirror/export" not in path.read_bytes()


@pytest.mark.parametrize(
    ("text", "layer"), [("0.5", 15), ("15", 15), ("0.01", None), ("1", 1), ("29", 29), ("1.0", None)]
)
def test_exit_layer_of(text: str, layer: int | None) -> None:
    if layer is None:
        with pytest.raises(ValueError, match="30 layers"):
            exit_layer_of(text, 30)
    else:
        assert exit_layer_of(text, 30) == layer


def test_tracing_touches_no_weights() -> None:
    """A model whose weights would take 8 GB traces without them."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, vocab_size=128, num_attention_heads=64
    )
    traced = trace(config, torch.float16)
    assert all(traced.model.graph.initializers[name].const_value is None for name in traced.parameters)


def test_a_remembered_trace_is_like_a_new_one(llama: Path) -> None:
    config = open_checkpoint(str(llama)).config
    config.num_hidden_layers = 2
    asked: list[torch.dtype] = []

    def counted(config: PretrainedConfig, dtype: torch.dtype) -> Traced:
        asked.append(dtype)
        return trace(config, dtype)

    remembered = remembering(counted)
    # Each changes the graph that it is given. Nodes' names, which nothing reads, count on in a new trace.
    first, again, new = (
        re.sub("# node_.*", "", str(normalize(make(config, torch.float32), 64)))
        for make in (remembered, remembered, trace)
    )
    assert first == again == new
    remembered(config, torch.float16)
    assert asked == [torch.float32, torch.float16]
    config.num_hidden_layers = 1
    assert remembered(config, torch.float32).layers == 1


def test_a_model_that_drafts_for_itself_is_traced_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = [], build.trace

    def counted(config: PretrainedConfig, dtype: torch.dtype) -> Traced:
        asked.append(dtype)
        return made(config, dtype)

    monkeypatch.setattr(build, "trace", counted)
    export_bundle(str(llama), tmp_path / "bundle", ExportOptions(draft=str(llama), int8_draft=True, max_length=64))
    assert asked == [torch.float32]


# --- small drivers over real sessions ---------------------------------------------------------------


def _run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


class _Graph:
    """One graph of a bundle with its own cache, in either form."""

    capacity = 64

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.cache: dict[str, np.ndarray] = {}
        for spec in self.session.get_inputs():
            if spec.name.startswith("past_key_values."):
                shape = [self.capacity if size == "capacity" else size for size in spec.shape]
                self.cache[spec.name] = np.zeros(shape, np.float32)

    def run(self, feeds: dict[str, np.ndarray], past: int, width: int) -> dict[str, np.ndarray]:
        declared = {spec.name for spec in self.session.get_inputs()}
        given = {name: array for name, array in {**feeds, **self.cache}.items() if name in declared}
        names = [output.name for output in self.session.get_outputs()]
        results = dict(zip(names, self.session.run(None, given), strict=True))
        for name in self.cache:
            present = results[name.replace("past_key_values", "present")]
            new = present if present.shape[2] == width else present[:, :, past : past + width]
            self.cache[name][:, :, past : past + width] = new
        return results


def _feeds(tokens: np.ndarray, past: int) -> dict[str, np.ndarray]:
    width = len(tokens)
    return {
        "input_ids": tokens[None].astype(np.int64),
        "position_ids": np.arange(past, past + width)[None],
        "logit_rows": np.array([width - 1]),
        "seqlens_k": np.array([past + width - 1], np.int32),
        "total_sequence_length": np.array(past + width, np.int32),
        "past_length": np.array([past], np.int32),
        "row_visible": np.arange(past + 1, past + width + 1, dtype=np.int32),
        "row_branch": np.full(width, -2, np.int32),
        "slot_branch": np.full(_Graph.capacity, -1, np.int32),
    }


class _Target:
    def __init__(self, bundle: Path, form: Form) -> None:
        segments = read_manifest(bundle).segments
        self.prefix, self.suffix = (
            _Graph(bundle / segments[name].graphs[form].file) for name in ("target_prefix", "target_suffix")
        )

    def run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        """Return the last row's logits, [vocab]."""
        feeds = _feeds(tokens, past)
        hidden = self.prefix.run(feeds, past, len(tokens))["hidden_states"]
        return self.suffix.run({**feeds, "hidden_states": hidden}, past, len(tokens))["logits"][0, -1]


class _Draft:
    def __init__(self, bundle: Path) -> None:
        self.trunk = _Graph(bundle / "draft_trunk.onnx")

    def run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        """Return the likeliest next token of each row."""
        feeds = _feeds(tokens, past) | {"total_sequence_length": np.array(_Graph.capacity, np.int32)}
        return self.trunk.run(feeds, past, len(tokens))["token_ids"][0]


def distilled_record(target: dict[str, str], **changes: object) -> dict[str, object]:
    """Return a `distill.json` for a target's fingerprints."""
    draft = {"layers": [0], "parameters": 1, "streams": 0, "feature_layer": None}
    facts = {"format": 2, "target": target, "norm_eps": 1e-3, "draft": draft, "vocabulary": None, "defaults": {}}
    return {**facts, **changes}


def _distilled(folder: Path, llama: Path) -> Path:
    """Write what distillation would: a random exit head after layer 2 and a one-layer draft."""
    checkpoint = open_checkpoint(str(llama))
    (folder / "draft").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"norm.weight": (32,), "gate.weight": (16, 32), "up.weight": (16, 32), "down.weight": (32, 16)}
    head = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(head, folder / "exit_head_2.safetensors")
    config = checkpoint.config
    config.num_hidden_layers = 1
    config.save_pretrained(folder / "draft")
    tensors = load_file(llama / "model.safetensors")
    kept = {
        name: value.half() for name, value in tensors.items() if ".layers.0." in name or name == "model.norm.weight"
    }
    save_file(kept, folder / "draft" / "model.safetensors")
    target = open_checkpoint(str(llama))
    empty = build.tokenizer_fingerprint(None)
    facts = {"name": "llama-for-test", "fingerprint": target.fingerprint, "tokenizer_fingerprint": empty}
    (folder / "distill.json").write_text(json.dumps(distilled_record(facts)))
    return folder


def _torch_head(llama: Path, head: Path, hidden: torch.Tensor) -> torch.Tensor:
    model = selfcheck._reference(open_checkpoint(str(llama)))
    weights = load_file(head)
    normed = torch.nn.functional.rms_norm(hidden, (32,), weights["norm.weight"], 1e-3)
    gate = torch.nn.functional.silu(normed @ weights["gate.weight"].T) * (normed @ weights["up.weight"].T)
    adapted = hidden + gate @ weights["down.weight"].T
    with torch.no_grad():
        return model.lm_head(model.model.norm(adapted))
