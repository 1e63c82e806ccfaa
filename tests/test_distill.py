"""Training a draft and exit heads, on a tiny model that is made and taught here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mirror.distill.data import Corpus, DataOptions, batches, held_out, make_corpus  # noqa: E402
from mirror.distill.decode import BatchDecoder, Job  # noqa: E402
from mirror.distill.evaluate import Question, measure  # noqa: E402
from mirror.distill.losses import LossWeights, Pupil, teach  # noqa: E402
from mirror.distill.progress import SilentProgress  # noqa: E402
from mirror.distill.report import EvaluationOptions, load_positions, report, save_positions  # noqa: E402
from mirror.distill.run import distill, load_pupils, load_ranking, read_facts  # noqa: E402
from mirror.distill.student import load_student, make_student, save_student, spread_layers  # noqa: E402
from mirror.distill.target import Target, load_target  # noqa: E402
from mirror.distill.train import Pupils  # noqa: E402
from mirror.errors import DraftError, ExportError, RequestError  # noqa: E402
from tests.letters import CPU, make_model, options  # noqa: E402


@pytest.fixture(scope="module")
def target(letters_model: Path) -> Target:
    return load_target(str(letters_model), CPU, torch.float32)


@pytest.fixture(scope="module")
def trained(letters_model: Path, letters_prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "trained"
    report = distill(str(letters_model), folder, options(letters_prompts, folder.parent / "cache"))
    assert report.finished
    return folder


class TestBatchDecoder:
    def test_writes_what_generate_writes(self, target: Target) -> None:
        prompts = [tuple(range(5, 5 + count)) for count in (1, 9, 3, 14, 2, 7, 5)]
        jobs = [Job(prompt, 10 + 9 * (i % 3), 0.0) for i, prompt in enumerate(prompts)]
        answers = {answer.job: answer.tokens for answer in BatchDecoder(target, 3, 64, (3,), 0).run(jobs)}
        assert sorted(answers) == list(range(len(jobs)))
        for index, job in enumerate(jobs):
            ids = torch.tensor([job.prompt])
            whole = target.model.generate(ids, max_new_tokens=job.max_new_tokens, do_sample=False, pad_token_id=0)
            assert answers[index] == tuple(whole[0, len(job.prompt) :].tolist())

    def test_stops_at_a_stop_token(self, target: Target) -> None:
        job = Job((5, 6, 7, 8, 9), 20, 0.0)
        (free,) = BatchDecoder(target, 2, 64, (), 0).run([job])
        stop = free.tokens[6]
        (cut,) = BatchDecoder(target, 2, 64, (stop,), 0).run([job])
        assert cut.tokens == free.tokens[: free.tokens.index(stop) + 1]

    def test_samples_the_models_law(self, target: Target) -> None:
        prompt, draws = (5, 9, 6), 4000
        jobs = [Job(prompt, 1, 1.5)] * draws
        drawn = [answer.tokens[0] for answer in BatchDecoder(target, 512, 64, (), 1).run(jobs)]
        with torch.no_grad():
            law = torch.softmax(target.model(torch.tensor([prompt])).logits[0, -1] / 1.5, -1).numpy()
        seen = np.bincount(drawn, minlength=len(law))
        big = law * draws >= 5
        statistic = float(((seen - draws * law)[big] ** 2 / (draws * law[big])).sum())
        # 36 degrees at most: a value above 75 comes once in 5,000 runs of a right sampler; the seed is fixed.
        assert statistic < 75

    def test_leaves_the_target_as_it_was(self, target: Target) -> None:
        before = target.model.config._attn_implementation
        list(BatchDecoder(target, 2, 64, (), 0).run([Job((5, 6), 3, 0.0)]))
        assert target.model.config._attn_implementation == before
        assert not any(hasattr(module, "mirror_rows") for module in target.model.modules())


class TestLosses:
    def test_gradient_is_autograds(self, target: Target) -> None:
        torch.manual_seed(0)
        head = dataclasses.replace(target.head, weight=target.head.weight.double(), scale=0.7, softcap=2.0)
        states = torch.randn(11, 32, dtype=torch.float64, requires_grad=True)
        final = torch.randn(11, 32, dtype=torch.float64)
        pupil = Pupil(states.detach(), head, LossWeights(kl=1.0, ce=0.5, focus=0.0))
        (taught,) = teach([pupil], final, head, False, True)
        teacher = head(final)
        log_q = torch.log_softmax(head(states).float(), -1)
        log_p = torch.log_softmax(teacher.float(), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        loss = kl + 0.5 * torch.nn.functional.nll_loss(log_q, teacher.argmax(-1), reduction="sum")
        loss.backward()
        assert float(taught.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
        torch.testing.assert_close(taught.gradient, states.grad, rtol=1e-4, atol=1e-6)

    def test_full_focus_is_the_gradient_of_expected_agreement(self, target: Target) -> None:
        torch.manual_seed(0)
        states = torch.randn(5, 32, requires_grad=True)
        final = torch.randn(5, 32)
        pupil = Pupil(states.detach(), target.head, LossWeights(kl=0.0, ce=1.0, focus=1.0))
        (taught,) = teach([pupil], final, target.head, False, True)
        best = target.head(final).argmax(-1)
        agreement = torch.softmax(target.head(states), -1).gather(1, best[:, None]).sum()
        (-agreement).backward()
        torch.testing.assert_close(taught.gradient, states.grad, rtol=1e-4, atol=1e-6)


class TestData:
    def test_corpus_is_cached_and_resumes(self, target: Target, letters_prompts: Path, tmp_path: Path) -> None:
        data = options(letters_prompts, tmp_path).data
        first = make_corpus(target, data, tmp_path, SilentProgress())
        shards = sorted(tmp_path.glob("corpus-*/answers-*.npz"))
        assert len(shards) == 4
        stamps = [path.stat().st_mtime_ns for path in shards]
        shards[1].unlink()  # as if killed while writing it
        again = make_corpus(target, data, tmp_path, SilentProgress())
        assert (again.tokens == first.tokens).all()
        assert [path.stat().st_mtime_ns for path in shards][::2] == stamps[::2]

    def test_own_prompts_and_passages_become_texts(self, target: Target, letters_prompts: Path, tmp_path: Path) -> None:
        data = dataclasses.replace(
            options(letters_prompts, tmp_path).data, own_prompts=12, passages=6, max_prompt_tokens=400
        )
        with_own = make_corpus(target, data, tmp_path, SilentProgress())
        without = make_corpus(target, options(letters_prompts, tmp_path).data, tmp_path, SilentProgress())
        assert len(with_own) > len(without)

    def test_batches_teach_answers_alone(self) -> None:
        corpus = Corpus(np.arange(1, 13, dtype=np.uint32), np.array([0, 5, 12]), np.array([3, 2]))
        (batch,) = batches(corpus, [0, 1], 4096, 0)
        following = batch.input_ids.flatten()[batch.learned + 1]
        assert sorted(following.tolist()) == [4, 5, 8, 9, 10, 11, 12]

    def test_every_text_once_per_epoch(self) -> None:
        lengths = np.arange(2, 40)
        offsets = np.cumsum([0, *lengths])
        corpus = Corpus(
            np.repeat(np.arange(len(lengths)), lengths).astype(np.uint32), offsets, np.ones(len(lengths), int)
        )
        seen = [int(row[0]) for batch in batches(corpus, range(len(lengths)), 64, 3) for row in batch.input_ids]
        assert sorted(seen) == list(range(len(lengths)))

    def test_equal_prompts_are_held_out_together(self) -> None:
        corpus = Corpus(np.tile(np.arange(400, dtype=np.uint32), 2), np.arange(0, 801, 4), np.full(200, 3))
        learn, keep = held_out(corpus, 0.3, 0)
        assert keep
        assert learn
        assert {index % 100 for index in keep}.isdisjoint({index % 100 for index in learn})

    def test_missing_file_is_named(self, target: Target, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"no prompts at .*nothing\.jsonl"):
            make_corpus(target, DataOptions(files=(tmp_path / "nothing.jsonl",)), tmp_path, SilentProgress())


class TestStudent:
    def test_all_layers_are_the_target(self, target: Target) -> None:
        student = make_student(target, range(6))
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            torch.testing.assert_close(student(ids), target.states(ids, ())[0])

    def test_round_trip_leaves_out_embedding_and_head(self, target: Target, tmp_path: Path) -> None:
        student = make_student(target, (0, 5))
        save_student(student, tmp_path)
        from safetensors import safe_open

        with safe_open(tmp_path / "model.safetensors", "pt") as stored:
            names = set(stored.keys())
        assert "model.norm.weight" in names
        assert not names & {"model.embed_tokens.weight", "lm_head.weight"}
        again = load_student(tmp_path, target)
        assert again.size == student.size
        ids = torch.arange(5, 25)[None]
        torch.testing.assert_close(again(ids), student(ids), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize(("total", "count", "layers"), [(30, 4, (0, 10, 19, 29)), (6, 2, (0, 5)), (2, 1, (0,))])
    def test_spread(self, total: int, count: int, layers: tuple[int, ...]) -> None:
        assert spread_layers(total, count) == layers


class TestDistill:
    def test_improves_on_held_out_texts(self, trained: Path) -> None:
        measured = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
        held = [item["held_out"] for item in measured if "held_out" in item]
        for name in ("draft", "exit_2", "exit_4"):
            assert held[-1][f"{name}_loss"] < held[0][f"{name}_loss"]
        assert held[-1]["tokens_per_round"] > 2

    def test_folder_holds_what_its_facts_say(self, trained: Path) -> None:
        facts = read_facts(trained)
        names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
        assert names == {
            "distill.json", "README.md", "training.svg", "log.jsonl", "draft/config.json", "draft/model.safetensors",
            "vocabulary.safetensors",
            *facts["exit_head_files"],
        }  # fmt: skip
        assert facts["exit_layers"] == [2, 4]
        assert json.loads((trained / "draft/config.json").read_text())["num_hidden_layers"] == 2

    def test_killed_training_ends_like_an_unbroken_one(
        self, trained: Path, letters_model: Path, letters_prompts: Path, tmp_path: Path
    ) -> None:
        chosen = options(letters_prompts, trained.parent / "cache", stop_after_s=0.0)
        rounds = 0
        folder = tmp_path / "halting"
        while not distill(str(letters_model), folder, chosen).finished and rounds < 3:
            rounds += 1
            chosen = options(letters_prompts, trained.parent / "cache", stop_after_s=0.3 if rounds < 3 else 1e9)
        assert read_facts(folder)["results"]["steps"] == 80
        first, second = (
            load_pupils(each, load_target(str(letters_model), CPU, torch.float32)) for each in (trained, folder)
        )
        for (name, one), two in zip(first.own().items(), second.own().values(), strict=True):
            torch.testing.assert_close(one, two, msg=name)
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)

    def test_killed_at_any_step_resumes_from_the_last_checkpoint(
        self, trained: Path, letters_model: Path, letters_prompts: Path, tmp_path: Path
    ) -> None:
        class Killer(SilentProgress):
            left = 33

            def advance(self, amount: int) -> None:
                self.left -= amount
                if self.left == 0:
                    raise KeyboardInterrupt

        folder = tmp_path / "killed"
        chosen = options(letters_prompts, trained.parent / "cache", checkpoint_every_s=0.05)
        killer = Killer()
        killer.left += 90  # the corpus advances once for each of its 90 texts
        with pytest.raises(KeyboardInterrupt):
            distill(str(letters_model), folder, chosen, killer)
        assert not (folder / "distill.json").exists()
        assert distill(str(letters_model), folder, chosen).finished
        target = load_target(str(letters_model), CPU, torch.float32)
        for one, two in zip(
            load_pupils(trained, target).own().values(), load_pupils(folder, target).own().values(), strict=True
        ):
            torch.testing.assert_close(one, two)

    def test_another_recipe_does_not_resume(self, letters_model: Path, letters_prompts: Path, tmp_path: Path) -> None:
        folder = tmp_path / "half"
        distill(str(letters_model), folder, options(letters_prompts, tmp_path, stop_after_s=0.0))
        with pytest.raises(DraftError, match="another recipe"):
            distill(str(letters_model), folder, options(letters_prompts, tmp_path, draft_lr=0.5))

    def test_another_target_is_refused_by_name(self, trained: Path, tmp_path: Path) -> None:
        other = load_target(str(make_model(tmp_path / "other", seed=1)), CPU, torch.float32)
        with pytest.raises(DraftError, match="was made for another target"):
            load_pupils(trained, other)

    def test_layers_the_target_lacks_are_refused(
        self, letters_model: Path, letters_prompts: Path, tmp_path: Path
    ) -> None:
        chosen = dataclasses.replace(options(letters_prompts, tmp_path), exit_layers=(6,))
        with pytest.raises(ExportError, match="6 layers and no layer 6"):
            distill(str(letters_model), tmp_path / "out", chosen)

    def test_evaluation_reports_every_category(self, trained: Path, target: Target, tmp_path: Path) -> None:
        pupils = load_pupils(trained, target)
        questions = [Question(i, ("count", "other")[i % 2], tuple(range(5, 6 + i % 3))) for i in range(8)]
        chosen = EvaluationOptions(gamma=3, max_new_tokens=20)
        measured = measure(target, pupils, load_ranking(trained), questions, chosen)
        greedy = report(measured, chosen)["greedy"]
        save_positions(tmp_path / "positions.npz", measured)
        assert report(load_positions(tmp_path / "positions.npz"), chosen)["greedy"] == greedy
        assert set(greedy) == {"overall", "count", "other", "branches", "passes"}
        figures = greedy["overall"]
        assert 1 <= figures["tokens_per_round"] <= 4
        assert figures["exit_coverage"]["4"] == sorted(figures["exit_coverage"]["4"])
        assert figures["prepared"]["both_4_doubled"] >= figures["prepared"]["both_4"]

    def test_the_target_drafting_for_itself_is_never_wrong(self, target: Target) -> None:
        student = make_student(target, range(6))
        questions = [Question(i, "count", tuple(range(5, 6 + i))) for i in range(3)]
        chosen = EvaluationOptions(gamma=3, max_new_tokens=20)
        figures = report(measure(target, Pupils(student, {}), [], questions, chosen), chosen)
        assert figures["greedy"]["overall"]["tokens_per_round"] == 4
        # With the noise that made the text, the same draft repeats sampled texts too; without it, it can't.
        assert figures["temperature_1_coupled"]["overall"]["tokens_per_round"] == 4
        assert figures["temperature_1"]["overall"]["tokens_per_round"] < 4
