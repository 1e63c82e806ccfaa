"""`mirror export`, `recut` and `run` in a row, on a tiny random checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

pytest.importorskip("torch")

from tests.families import VOCAB, make_checkpoint

ROOT = Path(__file__).parents[1]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mirror", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("export") / "tiny")
    words = tokenizers.Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    bundle = checkpoint.with_name("bundle")
    options = ["--draft", "layers:0,3", "--gamma", 3, "--kappa", 2, "--max-length", 128]
    return bundle, call("export", checkpoint, "-o", bundle, *options)


def text_of(bundle: Path, *options: object) -> str:
    return ok(call("run", bundle, "w5 w6 w7", "--max-new-tokens", 24, "--no-stats", *options))


def test_an_export_ends_with_its_summary(exported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    bundle, done = exported
    summary = ok(done)
    assert summary == ok(call("inspect", bundle))
    assert "layers:0,3" in summary


def test_an_export_tells_what_its_check_saw(exported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    told = " ".join(exported[1].stderr.split())
    for compared in ("split graphs against the whole graph", "graphs against torch"):
        assert f"self-check: {compared}: largest difference" in told
    assert "no greedy token differs" in told


def test_an_export_tells_its_stages_and_libraries_tell_nothing(
    exported: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    lines = [line.strip() for line in exported[1].stderr.splitlines() if line.strip()]
    assert any(line.startswith("self-check") for line in lines)
    # A line is a bar (the stage, the bar, the time), or what the self-check saw.
    assert [line for line in lines if "━" not in line and not line.startswith("notice: self-check: ")] == []


def test_a_capacity_past_the_models_positions_is_said(checkpoint: Path, tmp_path: Path) -> None:
    done = call("export", checkpoint, "-o", tmp_path / "bundle", "--draft", "ngram", "--max-length", 300)
    assert "256 tokens" in ok(done)
    assert "capacity is 256 tokens, all that the model knows positions for" in " ".join(done.stderr.split())


def test_a_bundle_is_not_replaced_without_force(
    checkpoint: Path, exported: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    done = call("export", checkpoint, "-o", exported[0])
    assert done.returncode == 1
    assert "--force" in done.stderr


def test_every_mode_and_every_cut_gives_one_text(exported: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    bundle, _ = exported
    expected = text_of(bundle, "--mode", "plain")
    assert len(expected.split()) > 4
    assert text_of(bundle, "--mode", "serial") == text_of(bundle, "--mode", "mirror") == expected
    recut = bundle.with_name("recut")
    assert "exit after 1" in ok(call("recut", bundle, "-o", recut, "--exit-layer", 1, "--gamma", 2, "--kappa", 3))
    assert text_of(recut, "--mode", "mirror") == expected
