"""The vectors that hosts in all languages share: they are current, and this package passes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mirror
from mirror.bundle import MANIFEST_NAME, check_files, read_manifest
from mirror.errors import BundleError
from mirror.runtime.noise import philox, uniforms
from mirror.runtime.sampling import Sampler, SamplingParams
from tests.vectors.generate import FOLDER, as_text, contents, formula_logits, write_bundles


def load(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    write_bundles(folder)
    return folder


def params_of(case: Any) -> SamplingParams:
    return SamplingParams(**{**case["sampling"], "seed": int(case["sampling"]["seed"])})


def test_the_files_are_what_the_generator_writes() -> None:
    for name, content in contents().items():
        found = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
        assert found == as_text(content), f"{name}.json is old; run: python -m tests.vectors.generate"


def test_noise() -> None:
    noise = load("noise")
    for item in noise["philox"]:
        words = philox(np.array(item["counter"], np.uint64)[:, None], tuple(item["key"]))
        assert words[:, 0].tolist() == item["words"]
    for item in noise["uniforms"]:
        found = uniforms(int(item["seed"]), item["position"], np.array([item["token"]], np.int64))
        assert found.tolist() == [item["uniform"]]


def test_sampling() -> None:
    for case in load("sampling"):
        source = case["logits"]
        if "values" in source:
            logits = np.array([-np.inf if value is None else value for value in source["values"]], np.float32)
        else:
            logits = formula_logits(source["seed"], source["vocab"], source["spread"])
        sampler = Sampler(params_of(case), logits.size, np.array(case["context"]))
        assert [sampler.choose(logits, position) for position in case["positions"]] == case["tokens"]


@pytest.mark.parametrize("case", load("manifests")["cases"], ids=lambda case: case["name"])
def test_manifests(tmp_path: Path, case: Any) -> None:
    folder, manifests = tmp_path, load("manifests")
    (folder / manifests["file"]["name"]).write_text(manifests["file"]["content"], encoding="utf-8")
    text = manifests["manifest"].replace(case["from"], case["to"], 1)
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
    if case["error"] is None:
        check_files(folder, read_manifest(folder))
        return
    with pytest.raises(BundleError) as refusal:
        check_files(folder, read_manifest(folder))
    assert case["error"] in str(refusal.value)


@pytest.mark.parametrize("index", range(len(load("generations"))))
def test_generations(bundles: Path, index: int) -> None:
    case = load("generations")[index]
    names = "tokens_per_pass", "branches_per_pass", "proposal_tokens_per_pass", "draft_context"
    passes = {name: case[name] for name in names}
    with mirror.load(bundles / case["bundle"], mode=case["modes"][-1], **passes, threads=1) as engine:
        for mode in case["modes"]:
            sampling = {**case["sampling"], "seed": int(case["sampling"]["seed"])}
            result = engine.generate_tokens(
                case["prompt"], max_new_tokens=case["max_new_tokens"], mode=mode, **sampling
            )
            assert list(result.tokens) == case["tokens"]
            assert result.finish_reason.value == case["finish_reason"]
            assert not result.events
