"""A small model in a big one's shape: the same logits, exit states, exit heads and draft."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from mirror.bench.spread_checkpoint import Shape, spread_checkpoint, spread_layer  # noqa: E402
from mirror.bench.spread_distilled import spread_distilled, write_own_draft  # noqa: E402
from mirror.distill.heads import ExitHead  # noqa: E402
from mirror.errors import ExportError  # noqa: E402
from mirror.export.checkpoint import open_checkpoint  # noqa: E402
from tests.families import VOCAB, make_checkpoint  # noqa: E402

# No size is a multiple of the small one's (32 channels, 4 heads over 2 of 8 channels) but the heads' width.
BIG = Shape(
    hidden_size=72, intermediate_size=150, layers=7, heads=9, kv_heads=3, head_dim=16, vocab_size=VOCAB + 31
)  # fmt: skip
TOKENS = torch.tensor([[(7 * index + 3) % VOCAB for index in range(24)]])
EXIT = 3


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "small")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def run(folder: Path) -> Any:
    with torch.no_grad():
        return load(folder)(input_ids=TOKENS, output_hidden_states=True)


def near(found: Any, expected: Any, tolerance: float = 1e-4) -> bool:
    return float((found - expected).abs().max() / expected.abs().max()) < tolerance


def test_logits_and_exit_states_are_the_small_models(small: Path, tmp_path: Path) -> None:
    spread_checkpoint(str(small), tmp_path / "big", BIG, dtype="float32")
    expected, found = run(small), run(tmp_path / "big")
    assert near(found.logits, expected.logits)
    assert (found.logits.argmax(-1) == expected.logits.argmax(-1)).all()
    for layers in range(1, 4):
        state = found.hidden_states[spread_layer(layers, 4, BIG.layers)]
        assert near(state[..., :32], expected.hidden_states[layers])
        assert not state[..., 32:].any()


def test_matrices_have_the_shapes_and_are_full(small: Path, tmp_path: Path) -> None:
    spread_checkpoint(str(small), tmp_path / "big", BIG)
    assert {path.stem for path in (tmp_path / "big").glob("*.safetensors")} == {f"model-0000{i}" for i in range(1, 9)}
    for path in (tmp_path / "big").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == np.float16
            if "_proj" in name:
                assert (tensor == 0).mean() < 0.5, name
    layers = load(tmp_path / "big").model.layers
    assert {tuple(layer.self_attn.o_proj.weight.shape) for layer in layers} == {(72, 144)}
    assert {tuple(layer.mlp.up_proj.weight.shape) for layer in layers} == {(150, 72)}


def test_surplus_tokens_never_win(small: Path, tmp_path: Path) -> None:
    spread_checkpoint(str(small), tmp_path / "big", BIG, dtype="float32", pad_vocabulary=True)
    expected, found = run(small), run(tmp_path / "big")
    assert found.logits.shape[-1] == BIG.vocab_size
    assert near(found.logits[..., :VOCAB], expected.logits)
    assert (found.logits[..., VOCAB:].amax(-1) < found.logits[..., :VOCAB].amin(-1)).all()


def test_half_precision_keeps_the_function(small: Path, tmp_path: Path) -> None:
    spread_checkpoint(str(small), tmp_path / "big", BIG, pad_vocabulary=True)
    assert near(run(tmp_path / "big").logits[..., :VOCAB], run(small).logits, 2e-2)


def test_layers_are_spread_evenly() -> None:
    assert [spread_layer(layer, 30, 40) for layer in (0, 15, 20, 30)] == [0, 20, 26, 40]
    ends = [spread_layer(layer, 30, 64) for layer in range(31)]
    assert {after - before for before, after in itertools.pairwise(ends)} == {2, 3}


def write_distilled(folder: Path, small: Path) -> ExitHead:
    """Write what distillation would, in part as int8, and return the exit head that it means."""
    torch.manual_seed(1)
    head = ExitHead(32, 24, 1e-5)
    torch.nn.init.normal_(head.down.weight, std=0.3)
    torch.nn.init.uniform_(head.norm.weight, 0.5, 1.5)
    tensors = {name: tensor.detach().half().numpy() for name, tensor in head.state_dict().items()}
    scale = np.abs(tensors["up.weight"]).max(1).astype(np.float32) / 127
    tensors["up.weight"] = np.round(tensors["up.weight"] / scale[:, None]).astype(np.int8)
    head.up.weight.data = torch.from_numpy(tensors["up.weight"] * scale[:, None])
    (folder / "draft").mkdir(parents=True)
    save_file({**tensors, "up.weight.scale": scale}, folder / f"exit_head_{EXIT}.safetensors")
    model = load(small)
    own = {name: tensor.numpy() for name, tensor in model.state_dict().items() if "embed" not in name}
    own.pop("lm_head.weight", None)
    features = {"features.weight": np.ones((32, 32), np.float16), "features.norm.weight": np.ones(32, np.float16)}
    save_file({**own, **features, "features.absent": np.ones(32, np.float16)}, folder / "draft" / "model.safetensors")
    model.config.save_pretrained(folder / "draft")
    record = {
        "format": 2,
        "target": {"name": "small", "fingerprint": open_checkpoint(str(small)).fingerprint},
        "norm_eps": 1e-5,
        "exit_layers": [EXIT],
        "draft": {"feature_layer": EXIT},
        "defaults": {"exit_layer": EXIT, "kappa": 8},
    }
    (folder / "distill.json").write_text(json.dumps(record))
    return head


def test_what_was_distilled_fits_the_big_target(small: Path, tmp_path: Path) -> None:
    head = write_distilled(tmp_path / "distilled", small)
    checkpoint = spread_checkpoint(str(small), tmp_path / "big", BIG, dtype="float32")
    spread_distilled(tmp_path / "distilled", checkpoint, tmp_path / "big", tmp_path / "wide")
    record = json.loads((tmp_path / "wide" / "distill.json").read_text())
    moved = spread_layer(EXIT, 4, BIG.layers)
    assert (record["exit_layers"], record["draft"]["feature_layer"], record["defaults"]["exit_layer"]) == (
        [moved], moved, moved
    )  # fmt: skip
    assert record["target"]["fingerprint"] == open_checkpoint(str(tmp_path / "big")).fingerprint

    wide = ExitHead(BIG.hidden_size, 24, record["norm_eps"])
    tensors = load_file(tmp_path / "wide" / f"exit_head_{moved}.safetensors")
    wide.load_state_dict({name: torch.from_numpy(tensor).float() for name, tensor in tensors.items()})
    state = run(small).hidden_states[EXIT]
    padded = torch.nn.functional.pad(state, (0, BIG.hidden_size - 32))
    with torch.no_grad():
        assert near(wide(padded)[..., :32], head(state), 5e-3)
        assert not wide(padded)[..., 32:].any()

    assert near(run(tmp_path / "wide" / "draft").logits, run(small).logits, 1e-2)  # a whole model, on its own
    draft = load_file(tmp_path / "wide" / "draft" / "model.safetensors")
    assert draft["features.weight"].shape == (32, BIG.hidden_size)
    assert draft["features.norm.weight"].shape == (BIG.hidden_size,)


def test_a_draft_may_have_the_cost_of_a_larger_model(small: Path, tmp_path: Path) -> None:
    write_distilled(tmp_path / "distilled", small)
    write_own_draft(tmp_path / "distilled", open_checkpoint(str(small)), tmp_path / "own")
    spread_checkpoint(str(tmp_path / "own"), tmp_path / "draft", BIG, dtype="float32")
    assert near(run(tmp_path / "draft").logits, run(small).logits, 1e-2)


def test_what_belongs_to_another_model_is_refused(tmp_path: Path) -> None:
    mine, other = (make_checkpoint("llama", tmp_path / str(seed), seed=seed) for seed in (0, 1))
    write_distilled(tmp_path / "distilled", mine)
    with pytest.raises(ExportError, match=r"was distilled for small, not for .*; name the model"):
        spread_distilled(tmp_path / "distilled", open_checkpoint(str(other)), other, tmp_path / "wide")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {}, "of the family gemma2; llama and qwen3 can be spread"),
        ("llama", {"hidden_size": 96}, "hidden_size is 96, the shape has 72"),
        ("llama", {"num_key_value_heads": 1}, "4 to a key head, into heads of 16, 3 to a key head"),
    ],
)
def test_models_that_do_not_fit_are_refused(family: str, changes: dict[str, int], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path / "small", **changes)
    with pytest.raises(ExportError, match=message):
        spread_checkpoint(str(folder), tmp_path / "big", BIG)
    assert not (tmp_path / "big").exists()
