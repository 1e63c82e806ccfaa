"""Going on from a finished training: wider and deeper drafts, exit heads taken over, texts kept, another optimiser."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from mirror.distill.data import (  # noqa: E402
    TEXTS_FILE,
    Corpus,
    _shards,
    joined,
    load_corpus,
    make_corpus,
    save_corpus,
)
from mirror.distill.heads import ExitHead  # noqa: E402
from mirror.distill.progress import SilentProgress  # noqa: E402
from mirror.distill.run import _draft_layers, distill, load_pupils, read_facts  # noqa: E402
from mirror.distill.student import StudentOptions, load_student, make_student, save_student, take_up  # noqa: E402
from mirror.distill.target import Target, load_target  # noqa: E402
from mirror.distill.train import Optimizer, Pupils, TrainOptions, _optimizers  # noqa: E402
from mirror.errors import DraftError, ExportError  # noqa: E402
from mirror.export.build import ExportOptions, export_bundle  # noqa: E402
from tests.families import make_checkpoint  # noqa: E402
from tests.letters import CPU, options  # noqa: E402

WIDE = 96  # the target has 64 inner channels


@pytest.fixture(scope="module")
def target(letters_model: Path) -> Target:
    return load_target(str(letters_model), CPU, torch.float32)


@pytest.fixture(scope="module")
def first(letters_model: Path, letters_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of two layers; its corpus lies beside it."""
    folder = tmp_path_factory.mktemp("first") / "out"
    assert distill(str(letters_model), folder, options(letters_prompts, folder.parent / "cache", steps=60)).finished
    return folder


def kept_texts(first: Path) -> Path:
    (path,) = (first.parent / "cache").glob(f"corpus-*/{TEXTS_FILE}")
    return path


class TestWider:
    def test_channels_come_silently_and_learn(self, target: Target, tmp_path: Path) -> None:
        ids = torch.arange(5, 25)[None]
        narrow, wide = make_student(target, (0, 5)), make_student(target, (0, 5), StudentOptions(intermediate=WIDE))
        torch.testing.assert_close(wide(ids), narrow(ids), rtol=1e-4, atol=1e-5)
        mlp = wide.model.model.layers[0].mlp
        assert mlp.down_proj.weight.shape == (32, WIDE)
        wide(ids).square().sum().backward()
        assert float(mlp.down_proj.weight.grad[:, 64:].abs().min()) > 0
        save_student(wide, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == WIDE
        assert load_student(tmp_path, target).size == wide.size == narrow.size + 2 * 3 * 32 * 32

    def test_a_finished_draft_widens_and_deepens_at_once(self, first: Path, target: Target) -> None:
        ids = torch.arange(5, 25)[None]
        had = load_student(first / "draft", target)
        more = make_student(target, (0, 3, 5), StudentOptions(streams=2, intermediate=WIDE))
        take_up(more, first / "draft", ((0, 5), (0, 3, 5)))
        torch.testing.assert_close(more(ids), had(ids), rtol=1e-4, atol=1e-5)
        assert had.streams is not None
        assert more.streams is not None
        assert torch.equal(more.streams.weight, had.streams.weight)

    def test_a_smaller_draft_begins_with_the_layers_that_it_keeps(self, first: Path, target: Target) -> None:
        had = load_student(first / "draft", target)  # of the layers 0 and 5
        less = make_student(target, (5,), StudentOptions(streams=2))
        take_up(less, first / "draft", ((0, 5), (5,)))
        kept, given = had.model.model.layers[1].state_dict(), less.model.model.layers[0].state_dict()
        assert all(torch.equal(given[name], kept[name]) for name in kept)
        assert less.streams is not None
        assert had.streams is not None
        assert torch.equal(less.streams.weight, had.streams.weight)
        ids = torch.arange(5, 25)[None]
        had.model.model.layers = had.model.model.layers[1:]
        had.model.model.layers[0].self_attn.layer_idx = 0
        torch.testing.assert_close(less(ids), had(ids), rtol=1e-4, atol=1e-5)

    def test_no_layer_goes_missing_unasked(self, first: Path, letters_prompts: Path, tmp_path: Path) -> None:
        chosen = dataclasses.replace(options(letters_prompts, tmp_path), start=first, draft_layers=None)
        assert _draft_layers(chosen, 6) == tuple(read_facts(first)["draft"]["layers"]) == (0, 5)
        assert _draft_layers(dataclasses.replace(chosen, start=None), 6) == (0, 2, 3, 5)
        assert _draft_layers(dataclasses.replace(chosen, draft_layers=(5,)), 6) == (5,)

    def test_a_draft_without_any_of_its_layers_is_refused(self, first: Path, target: Target) -> None:
        with pytest.raises(DraftError, match="has the target's layers 0, 5 and this one has none of them; name some"):
            take_up(make_student(target, (3,)), first / "draft", ((0, 5), (3,)))

    def test_a_wide_draft_does_not_shrink(self, target: Target, tmp_path: Path) -> None:
        save_student(make_student(target, (0, 5), StudentOptions(intermediate=WIDE)), tmp_path)
        with pytest.raises(DraftError, match=r"\(96, 32\) for mlp.gate_proj.weight, this one \(64, 32\); .*at least"):
            take_up(make_student(target, (0, 5)), tmp_path, ((0, 5), (0, 5)))

    def test_too_few_channels_are_refused(self, target: Target) -> None:
        with pytest.raises(DraftError, match="has 64 inner channels, --draft-intermediate is 48"):
            make_student(target, (0,), StudentOptions(intermediate=48))

    def test_other_feed_forward_parts_are_refused(self, tmp_path: Path) -> None:
        other = load_target(str(make_checkpoint("opt", tmp_path / "opt")), CPU, torch.float32)
        with pytest.raises(DraftError, match="of a OPTForCausalLM can't be widened"):
            make_student(other, (0,), StudentOptions(intermediate=4096))

    def test_a_given_model_keeps_its_shape(self, letters_model: Path, letters_prompts: Path, tmp_path: Path) -> None:
        chosen = dataclasses.replace(
            options(letters_prompts, tmp_path), draft_layers=None, draft_model=letters_model, draft_intermediate=WIDE
        )
        with pytest.raises(DraftError, match="keeps its shape"):
            distill(str(letters_model), tmp_path / "out", chosen)


class TestFrozenHeads:
    def test_they_are_taken_over_as_they_are_and_the_whole_exports(
        self, first: Path, letters_model: Path, letters_prompts: Path, target: Target, tmp_path: Path
    ) -> None:
        chosen = dataclasses.replace(
            options(letters_prompts, first.parent / "cache", steps=4),
            exit_layers=None, start=first, frozen_exit_heads=True, draft_intermediate=WIDE, draft_layers=(0, 3, 5),
        )  # fmt: skip
        made = distill(str(letters_model), tmp_path / "out", chosen)
        assert not [name for name in made.figures if name.startswith("exit_")]
        facts = read_facts(tmp_path / "out")
        assert facts["exit_layers"] == [2, 4]
        assert facts["recipe"]["adapter_sizes"] == [16, 16]
        for name in facts["exit_head_files"]:
            assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes()
        assert sorted(load_pupils(tmp_path / "out", target).heads) == [2, 4]
        wanted = ExportOptions(draft=str(tmp_path / "out"), gamma=3, max_length=64, exit_layer="2")
        export_bundle(str(letters_model), tmp_path / "bundle", wanted)  # its self-check compares graphs with torch
        text = (tmp_path / "out/README.md").read_text()
        assert "taken over from the training" in text
        assert "96 inner channels" in text

    def test_they_need_a_training_to_come_from(
        self, letters_model: Path, letters_prompts: Path, tmp_path: Path
    ) -> None:
        chosen = dataclasses.replace(options(letters_prompts, tmp_path), frozen_exit_heads=True)
        with pytest.raises(DraftError, match="name it with --start"):
            distill(str(letters_model), tmp_path / "out", chosen)

    def test_a_head_that_is_not_there_is_named(
        self, first: Path, letters_model: Path, letters_prompts: Path, tmp_path: Path
    ) -> None:
        chosen = dataclasses.replace(
            options(letters_prompts, tmp_path), start=first, frozen_exit_heads=True, exit_layers=(2, 3)
        )
        with pytest.raises(DraftError, match="has exit heads for layers 2, 4, not for layer 3"):
            distill(str(letters_model), tmp_path / "out", chosen)


class TestKeptTexts:
    def test_a_training_learns_from_them_alone(self, first: Path, letters_model: Path, tmp_path: Path) -> None:
        corpus = load_corpus(kept_texts(first), read_facts(first)["target"]["fingerprint"])
        chosen = options(first, tmp_path, steps=1)
        data = dataclasses.replace(chosen.data, files=(), texts=(kept_texts(first),))
        distill(str(letters_model), tmp_path / "out", dataclasses.replace(chosen, data=data))
        facts = read_facts(tmp_path / "out")
        assert facts["corpus"]["texts"] == len(corpus) == read_facts(first)["corpus"]["texts"]
        assert facts["recipe"]["data"]["texts"] == [TEXTS_FILE]
        assert f"its corpora from before ({TEXTS_FILE})" in (tmp_path / "out/README.md").read_text()

    def test_they_come_before_what_is_written(
        self, first: Path, letters_prompts: Path, target: Target, tmp_path: Path
    ) -> None:
        data = dataclasses.replace(options(letters_prompts, tmp_path).data, own_prompts=6, ask_prompts=False, seed=3)
        fresh = make_corpus(target, data, tmp_path, SilentProgress())
        assert 0 < len(fresh) <= 12  # six turns of its own, none of the file's sixty prompts
        both = make_corpus(target, dataclasses.replace(data, texts=(kept_texts(first),)), tmp_path, SilentProgress())
        kept = load_corpus(kept_texts(first), target.checkpoint.fingerprint)
        whole = joined([kept, fresh])
        for name in ("tokens", "offsets", "prompt_lengths"):
            assert (getattr(both, name) == getattr(whole, name)).all()
        assert both.answer_tokens == kept.answer_tokens + fresh.answer_tokens

    def test_another_targets_texts_are_refused(self, target: Target, tmp_path: Path) -> None:
        corpus = Corpus(np.arange(5, dtype=np.uint32), np.array([0, 5]), np.array([2]))
        save_corpus(corpus, tmp_path / "other.npz", "f" * 64)
        with pytest.raises(ExportError, match="was written by another target"):
            load_corpus(tmp_path / "other.npz", target.checkpoint.fingerprint)

    def test_what_is_no_corpus_is_named(self, target: Target, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match=r"no corpus at .*none\.npz"):
            load_corpus(tmp_path / "none.npz", target.checkpoint.fingerprint)
        np.savez(tmp_path / "half.npz", tokens=np.arange(3))
        with pytest.raises(ExportError, match=r"half\.npz holds no lengths"):
            load_corpus(tmp_path / "half.npz", target.checkpoint.fingerprint)


def test_shards_end_at_their_size_and_where_prompts_get_longer() -> None:
    lengths = [20, 64, 70, 127, 128, 255, 256, 300, 1024]
    assert [list(shard) for shard in _shards(range(9), lengths, 3)] == [[0, 1, 2], [3], [4, 5], [6, 7], [8]]
    assert list(_shards([], [], 3)) == []


class TestMuon:
    def test_it_learns_and_resumes(
        self, letters_model: Path, letters_prompts: Path, first: Path, tmp_path: Path
    ) -> None:
        chosen = options(letters_prompts, first.parent / "cache", steps=30, optimizer=Optimizer.MUON, measure_every=10)
        whole = tmp_path / "whole"
        assert distill(str(letters_model), whole, chosen).finished
        log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
        held = [item["held_out"]["draft_loss"] for item in log if "held_out" in item]
        assert held[-1] < 0.9 * held[0]
        assert read_facts(whole)["recipe"]["train"]["optimizer"] == "muon"
        halting = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, stop_after_s=0.2))
        turns = 0
        while not distill(str(letters_model), tmp_path / "halting", halting).finished:
            turns += 1
            assert turns < 60
        ended, broken = (load_file(each / "draft/model.safetensors") for each in (whole, tmp_path / "halting"))
        for name, value in ended.items():
            torch.testing.assert_close(value.float(), broken[name].float(), atol=1.01, rtol=1e-2, msg=name)
        assert turns > 0

    def test_it_steps_matrices_alone(self, target: Target) -> None:
        student = make_student(target, (0, 5), StudentOptions(streams=2))
        pupils = Pupils(student, {2: ExitHead(32, 16, 1e-5)})
        own = {id(value): name for name, value in pupils.own().items()}
        muon, adamw = _optimizers(pupils, TrainOptions(optimizer=Optimizer.MUON), CPU)
        stepped = {own[id(value)] for group in muon.param_groups for value in group["params"]}
        others = {own[id(value)] for group in adamw.param_groups for value in group["params"]}
        assert isinstance(muon, torch.optim.Muon)
        assert {"exit_2.down.weight", "draft.model.layers.1.mlp.up_proj.weight"} <= stepped
        assert {"draft.streams.weight", "draft.model.norm.weight", "exit_2.norm.weight"} <= others
        assert stepped | others == set(own.values())
        assert not stepped & others
        (plain,) = _optimizers(pupils, TrainOptions(), CPU)
        assert isinstance(plain, torch.optim.AdamW)
