"""Streams, features and rows behind a text: a draft in training sees what it will see in a rollout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

from mirror.distill.data import Batch  # noqa: E402
from mirror.distill.evaluate import Question, measure  # noqa: E402
from mirror.distill.heads import ExitHead, grown, load_exit_head, save_exit_head  # noqa: E402
from mirror.distill.layout import ChainOptions, chains  # noqa: E402
from mirror.distill.reading import read_draft  # noqa: E402
from mirror.distill.report import EvaluationOptions, report, suggested  # noqa: E402
from mirror.distill.run import DistillOptions, distill, load_pupils, read_facts, set_defaults  # noqa: E402
from mirror.distill.storage import as_stored, load_tensors, save_tensors  # noqa: E402
from mirror.distill.student import (  # noqa: E402
    Student,
    StudentOptions,
    load_student,
    make_student,
    save_student,
    take_up,
)
from mirror.distill.target import Target, load_target  # noqa: E402
from mirror.errors import DraftError, ExportError  # noqa: E402
from tests.letters import CPU, make_model, options  # noqa: E402


@pytest.fixture(scope="module")
def target(letters_model: Path) -> Target:
    return load_target(str(letters_model), CPU, torch.float32)


def batch_of(texts: list[tuple[list[int], int]]) -> Batch:
    """Return texts with their prompts' lengths as a right-padded batch."""
    width = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in texts])
    learned = [
        torch.arange(row * width + start - 1, row * width + len(each) - 1) for row, (each, start) in enumerate(texts)
    ]
    return Batch(np.arange(len(texts)), ids, torch.cat(learned), tuple(map(len, learned)))


TEXTS = [(list(range(5, 17)), 4), (list(range(8, 26)), 9)]


def with_parts(target: Target, *, streams: int = 0, features: bool = False) -> Student:
    student = make_student(target, (0, 3), StudentOptions(streams, features, 1e-6))
    torch.manual_seed(3)
    with torch.no_grad():
        for part in (student.streams, student.features):
            for parameter in part.parameters() if part is not None else ():
                parameter.copy_(torch.randn_like(parameter))
    return student


class TestChains:
    def test_a_stream_sees_its_text_and_the_streams_before_it(self, target: Target) -> None:
        student = with_parts(target, streams=3)
        batch = batch_of(TEXTS)
        with torch.no_grad():
            read = read_draft(student, batch, None, ChainOptions(3, every=2, first=1), CPU)
            plain = student(batch.input_ids).flatten(0, 1)[batch.learned]
            torch.testing.assert_close(read.own, plain, rtol=1e-4, atol=1e-5)
            assert read.layout is not None
            seen = 0
            for state, anchored, step in zip(read.chains, read.layout.anchored, read.layout.step, strict=True):
                flat = int(batch.learned[anchored])
                row, at = divmod(flat, batch.input_ids.shape[1])
                alone = [*TEXTS[row][0][: at + 1], *(student.vocab_size + s for s in range(step + 1))]
                torch.testing.assert_close(state, student(torch.tensor([alone]))[0, -1], rtol=1e-4, atol=1e-5)
                seen += 1
        # Text 0 has 8 learned positions (anchors 1, 3, 5, 7), text 1 has 9 (1, 3, 5, 7): what a stream says ends
        # with the text, so anchor 5 of text 0 has two streams that learn, anchor 7 none.
        assert seen == (3 + 3 + 2 + 0) + (3 + 3 + 3 + 1)

    def test_what_a_stream_learns_lies_its_number_further_on(self) -> None:
        batch = batch_of(TEXTS)
        layout = chains(batch, ChainOptions(2), 100)
        following = batch.input_ids.flatten()[batch.learned + 1]
        for anchored, step, lesson in zip(layout.anchored, layout.step, layout.lesson, strict=True):
            assert following[lesson] == following[anchored] + step + 1  # the texts count upwards

    def test_rows_of_a_branch_have_no_feature(self, target: Target) -> None:
        student = with_parts(target, features=True)
        batch = batch_of(TEXTS)
        with torch.no_grad():
            _, exits = target.states(batch.input_ids, (3,))
            read = read_draft(student, batch, exits[3], ChainOptions(0, copies=2), CPU)
            assert read.layout is not None
            where = list(zip(read.layout.anchored, read.layout.step, strict=True))
            state = read.chains[where.index((2, 1))]
            # Anchor 2 of text 0 is position 5; its second copy is token 7. Only rows up to 5 know the row before them.
            ids = torch.tensor([TEXTS[0][0][:8]])
            fed = torch.zeros(1, 8, exits[3].shape[2])
            fed[:, 1:6] = exits[3][:1, :5]
            known = torch.tensor([[False, *[True] * 5, False, False]])
            torch.testing.assert_close(state, student(ids, features=(fed, known))[0, -1], rtol=1e-4, atol=1e-5)
            fed[:, 6] = exits[3][:1, 5]
            known[:, 6] = True
            other = student(ids, features=(fed, known))[0, -1]
        assert float((state - other).abs().max()) > 1e-3

    def test_a_new_feature_input_changes_nothing(self, target: Target) -> None:
        ids = torch.arange(5, 20)[None]
        plain = make_student(target, (0, 3))
        fed = make_student(target, (0, 3), StudentOptions(features=True))
        states = torch.randn(1, 15, 32)
        with torch.no_grad():
            torch.testing.assert_close(fed(ids, features=(states, torch.ones(1, 15, dtype=torch.bool))), plain(ids))


class TestStorage:
    def test_int8_rounds_each_row_by_its_own_scale(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        tensors = {"a.weight": torch.randn(6, 9) * torch.logspace(-3, 2, 6)[:, None], "b": torch.randn(4)}
        save_tensors(tensors, tmp_path / "x.safetensors", int8=True)
        with safe_open(tmp_path / "x.safetensors", "pt") as stored:
            assert stored.get_slice("a.weight").get_dtype() == "I8"
            assert stored.get_slice("a.weight.scale").get_shape() == [6]
        again = load_tensors(tmp_path / "x.safetensors")
        assert again.keys() == tensors.keys()
        step = tensors["a.weight"].abs().amax(1, keepdim=True) / 127
        assert bool(((again["a.weight"] - tensors["a.weight"]).abs() <= step * 0.501).all())
        for name, value in as_stored(tensors, int8=True).items():
            torch.testing.assert_close(again[name], value)

    def test_everything_of_a_draft_comes_back(self, target: Target, tmp_path: Path) -> None:
        student = with_parts(target, streams=2, features=True)
        save_student(student, tmp_path, int8=True)
        again = load_student(tmp_path, target)
        assert again.own.keys() == student.own.keys()
        for name, value in as_stored(student.own, int8=True).items():
            torch.testing.assert_close(again.own[name].detach(), value)

    def test_a_grown_exit_head_says_the_same(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        head = ExitHead(16, 8, 1e-5)
        torch.nn.init.normal_(head.down.weight)
        save_exit_head(head, tmp_path, 3)
        larger = grown(load_exit_head(tmp_path, 3, 1e-5), 24)
        states = torch.randn(5, 16)
        torch.testing.assert_close(larger(states), head(states), rtol=1e-2, atol=1e-2)
        assert larger.gate.weight.shape == (24, 16)
        with pytest.raises(DraftError, match="has 24 channels, 8 were asked"):
            grown(larger, 8)


class TestStart:
    def test_a_draft_grows_by_a_silent_layer(self, target: Target, tmp_path: Path) -> None:
        small = make_student(target, (0, 5))
        with torch.no_grad():
            for value in small.own.values():
                value.add_(0.02 * torch.randn_like(value))
        save_student(small, tmp_path)
        large = make_student(target, (0, 2, 5), StudentOptions(streams=2))
        take_up(large, tmp_path, ((0, 5), (0, 2, 5)))
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            torch.testing.assert_close(large(ids), small(ids), rtol=1e-2, atol=1e-2)


def short(letters_prompts: Path, cache: Path) -> DistillOptions:
    return options(letters_prompts, cache, steps=30, stream_every=2)


class TestKinds:
    def test_streams_learn_and_make_passes(
        self,
        letters_model: Path,
        letters_prompts: Path,
        target: Target,
        tmp_path: Path,
    ) -> None:
        made = distill(
            str(letters_model), tmp_path / "out", options(letters_prompts, tmp_path, steps=120, stream_every=2)
        )
        assert made.figures["streams_top1"] > 0.5
        facts = read_facts(tmp_path / "out")
        assert facts["draft"]["streams"] == 2
        chosen = EvaluationOptions(gamma=4, max_new_tokens=20, branches=20)
        asked = [Question(i, "count", tuple(range(5, 7 + i % 5))) for i in range(6)]
        measured = measure(target, load_pupils(tmp_path / "out", target), [], asked, chosen)
        curve = report(measured, chosen)["greedy"]["passes"]
        by_passes = {row["passes"]: row["tokens_per_round"] for row in reversed(curve)}
        assert set(by_passes) == {2, 3, 4}
        assert 1.5 < by_passes[2] <= 5
        found = suggested(measured, chosen)
        assert len(found["tokens_per_pass"]) <= 3
        assert max(found["tokens_per_pass"]) <= 3
        assert sum(found["fanout"]) <= 20
        set_defaults(tmp_path / "out", found)
        assert read_facts(tmp_path / "out")["defaults"] == found

    def test_a_fed_draft_trains_is_stored_and_measured(
        self,
        letters_model: Path,
        letters_prompts: Path,
        target: Target,
        tmp_path: Path,
    ) -> None:
        chosen = dataclasses.replace(short(letters_prompts, tmp_path), feature_layer=4, streams=1)
        assert distill(str(letters_model), tmp_path / "out", chosen).finished
        assert read_facts(tmp_path / "out")["draft"]["feature_layer"] == 4
        pupils = load_pupils(tmp_path / "out", target)
        assert pupils.student is not None
        assert pupils.student.features is not None
        assert float(pupils.student.features.weight.detach().abs().max()) > 0
        measuring = EvaluationOptions(gamma=3, max_new_tokens=16)
        asked = [Question(i, "count", tuple(range(5, 9 + i))) for i in range(4)]
        (first, *_) = measure(target, pupils, [], asked, measuring)
        assert first.laws["greedy"].branch.shape == (16, 2)
        assert first.laws["greedy"].windows(3).shape == (16, 3)

    def test_a_given_model_becomes_the_draft(
        self,
        letters_model: Path,
        letters_prompts: Path,
        target: Target,
        tmp_path: Path,
    ) -> None:
        small = make_model(tmp_path / "small", seed=5)
        chosen = dataclasses.replace(short(letters_prompts, tmp_path), draft_layers=None, draft_model=small)
        assert distill(str(letters_model), tmp_path / "out", chosen).finished
        assert read_facts(tmp_path / "out")["draft"]["layers"] is None
        with safe_open(tmp_path / "out/draft/model.safetensors", "pt") as stored:
            assert "model.embed_tokens.weight" in stored.keys()  # noqa: SIM118 (no mapping)
        student = load_pupils(tmp_path / "out", target).student
        given = load_target(str(small), CPU, torch.float32)
        assert student is not None
        torch.testing.assert_close(student.model.get_input_embeddings().weight, given.head.weight, rtol=2e-2, atol=2e-2)

    def test_a_training_goes_on_from_another(
        self,
        letters_model: Path,
        letters_prompts: Path,
        tmp_path: Path,
    ) -> None:
        distill(str(letters_model), tmp_path / "first", options(letters_prompts, tmp_path))
        chosen = dataclasses.replace(
            options(letters_prompts, tmp_path, steps=1, draft_lr=0.0, head_lr=0.0),
            start=tmp_path / "first", draft_layers=(0, 3, 5), adapter_sizes=(24, 16),
        )  # fmt: skip
        more = distill(str(letters_model), tmp_path / "second", chosen)
        before = read_facts(tmp_path / "first")["results"]["held_out"]
        for name in ("draft_loss", "exit_2_loss", "exit_4_loss"):
            assert more.figures[name] == pytest.approx(before[name], rel=0.05)

    def test_two_beginnings_are_refused(self, letters_model: Path, letters_prompts: Path, tmp_path: Path) -> None:
        chosen = dataclasses.replace(short(letters_prompts, tmp_path), draft_model=letters_model)
        with pytest.raises(DraftError, match="give only one of them"):
            distill(str(letters_model), tmp_path / "out", chosen)

    def test_adapter_sizes_must_fit_the_exits(self, letters_model: Path, letters_prompts: Path, tmp_path: Path) -> None:
        chosen = dataclasses.replace(short(letters_prompts, tmp_path), adapter_sizes=(4, 5, 6))
        with pytest.raises(ExportError, match="3 adapter sizes for 2 exit layers"):
            distill(str(letters_model), tmp_path / "out", chosen)
