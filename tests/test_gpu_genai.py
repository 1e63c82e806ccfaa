"""The same few layers for both sides of a comparison, and speeds turn by turn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from safetensors.numpy import save_file

from mirror.bench.gpu_genai import compare, fewer_layers, prompt_of, with_graphs
from mirror.bench.questions import read_questions
from mirror.errors import ExportError, RequestError


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "vocab_size": 300}))
    files = {"model-1.safetensors": ["model.embed_tokens.weight", "model.norm.weight"]}
    files |= {f"model-{layer + 2}.safetensors": [f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(4)}
    for file, names in files.items():
        save_file({name: np.zeros(2, np.float16) for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_first_layers_are_a_checkpoint_of_their_own_without_copies(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole")
    fewer_layers(whole, tmp_path / "work" / "checkpoint", 2)
    part = tmp_path / "work" / "checkpoint"
    assert json.loads((part / "config.json").read_text())["num_hidden_layers"] == 2
    weights = {path.name for path in part.glob("*.safetensors")}
    assert weights == {"model-1.safetensors", "model-2.safetensors", "model-3.safetensors"}
    assert (part / "model-2.safetensors").samefile(whole / "model-2.safetensors")
    kept = json.loads((part / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.1.mlp.up_proj.weight" in kept
    assert "model.layers.2.mlp.up_proj.weight" not in kept
    assert prompt_of(tmp_path / "work", 9) == prompt_of(tmp_path / "work", 9)
    assert max(prompt_of(tmp_path / "work", 500)) < 300
    with pytest.raises(ExportError, match="has 4 layers, 5 are wanted; ask for fewer"):
        fewer_layers(whole, tmp_path / "other", 5)


def test_a_genai_model_gets_cuda_graphs_by_its_configuration_alone(tmp_path: Path) -> None:
    folder = tmp_path / "genai"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    providers = [{"cuda": {"enable_cuda_graph": "0", "other": "1"}}]
    config = {"model": {"decoder": {"session_options": {"provider_options": providers}}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    with_graphs(folder, tmp_path / "graphs")
    changed = json.loads((tmp_path / "graphs" / "genai_config.json").read_text())
    assert changed["model"]["decoder"]["session_options"]["provider_options"] == [
        {"cuda": {"enable_cuda_graph": "1", "other": "1"}}
    ]
    assert (tmp_path / "graphs" / "model.onnx").samefile(folder / "model.onnx")
    assert json.loads((folder / "genai_config.json").read_text()) == config


def test_ratios_are_of_the_same_turn(tmp_path: Path) -> None:
    speeds = {"mirror": iter([1.0, 10.0, 20.0, 40.0]), "genai": iter([7.0, 5.0, 10.0, 80.0])}
    arms = {name: lambda prompt, tokens, values=values: next(values) for name, values in speeds.items()}
    mine, theirs = compare(arms, [1, 2, 3], 8, repeats=3, warm=1)
    assert (mine["arm"], mine["context"], mine["tokens_per_s"], mine["mirror_over_it"]) == ("mirror", 3, 20.0, 1.0)
    assert (theirs["tokens_per_s"], theirs["low"], theirs["high"], theirs["mirror_over_it"]) == (10.0, 5.0, 80.0, 2.0)


def test_questions_are_spaced_and_faulty_lines_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": n, "category": "qa" if n < 8 else "stem", "turns": [str(n)]} for n in range(10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [item.number for item in read_questions(path, 3)] == [0, 2, 5, 8, 9]
    assert len(read_questions(path)) == 10
    path.write_text('{"question_id": 1, "category": "qa"}\n')
    with pytest.raises(RequestError, match=r"line 1 is no question .*; each line needs question_id"):
        read_questions(path)
    with pytest.raises(RequestError, match="no questions at"):
        read_questions(tmp_path / "nowhere")
