"""What the target is asked, how often its tokens come, and how its answers are kept for later epochs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from mirror.distill.data import Corpus, batches, coverage_of, make_corpus, ranking  # noqa: E402
from mirror.distill.evaluate import main as evaluate  # noqa: E402
from mirror.distill.progress import SilentProgress  # noqa: E402
from mirror.distill.prompts import Prompt, given_passages, given_tasks  # noqa: E402
from mirror.distill.run import distill, load_ranking, read_facts  # noqa: E402
from mirror.distill.target import Target, load_target  # noqa: E402
from mirror.distill.teacher import Teacher  # noqa: E402
from tests.letters import CPU, options  # noqa: E402


@pytest.fixture(scope="module")
def target(letters_model: Path) -> Target:
    return load_target(str(letters_model), CPU, torch.float32)


class TestPrompts:
    def test_passages_are_the_long_lines_without_their_label(self) -> None:
        long = " ".join(f"word{i}" for i in range(70))
        prompts = [Prompt("t", f"Article: {long}\nWhat is it?"), Prompt("t", "short"), Prompt("t", f"{long}\nother")]
        assert given_passages(prompts) == [long]

    def test_tasks_come_by_turns_and_by_seed(self) -> None:
        tasks = given_tasks([f"passage {i}. more" for i in range(9)], ["Who is it?"], 20, seed=4)
        assert [task.kind for task in tasks] == ["summarise", "answer"] * 10
        assert tasks == given_tasks([f"passage {i}. more" for i in range(9)], ["Who is it?"], 20, seed=4)
        assert tasks != given_tasks([f"passage {i}. more" for i in range(9)], ["Who is it?"], 20, seed=5)

    def test_opened_turns_and_given_tasks_become_texts(self, target: Target, tmp_path: Path) -> None:
        path = tmp_path / "long.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{'ab ' * (70 + i)}\nx"}) + "\n" for i in range(3)))
        data = dataclasses.replace(options(path, tmp_path).data, sampled_answers=0.0, max_prompt_tokens=900)
        plain = make_corpus(target, data, tmp_path, SilentProgress())
        more = make_corpus(target, dataclasses.replace(data, given_tasks=4), tmp_path, SilentProgress())
        opened = make_corpus(target, dataclasses.replace(data, opened_prompts=6), tmp_path, SilentProgress())
        assert len(plain) < len(more) <= len(plain) + 4
        assert len(plain) < len(opened) <= len(plain) + 6


class TestVocabulary:
    def test_ranks_answers_alone(self) -> None:
        corpus = Corpus(np.array([9, 9, 9, 1, 2, 2, 9, 2, 3, 1], np.uint32), np.array([0, 6, 10]), np.array([3, 1]))
        ranked = ranking(corpus, 11)
        assert ranked[:4].tolist() == [2, 1, 3, 0]
        assert sorted(ranked.tolist()) == list(range(11))
        assert coverage_of(ranked, corpus, [0, 1], (1, 2, 3)) == {1: 0.5, 2: pytest.approx(5 / 6), 3: 1.0}


class TestTeacher:
    def test_what_fits_is_kept_and_what_is_kept_is_the_same(self, target: Target) -> None:
        source = np.random.default_rng(0)
        lengths = source.integers(6, 40, 40)
        tokens = source.integers(5, 30, lengths.sum()).astype(np.uint32)
        corpus = Corpus(tokens, np.cumsum([0, *lengths]), np.full(40, 3))
        room = int((lengths - 3).sum() * 0.5) * 2 * 32 * 4  # half of the rows, of two states of 32 floats
        teacher = Teacher(target, corpus, (2,), room)
        fresh = Teacher(target, corpus, (2,), 0)
        runs: list[int] = []
        handle = target.layers[0].register_forward_hook(lambda *_: runs.append(1))
        for epoch in range(3):
            runs.clear()
            count = 0
            for batch in batches(corpus, range(40), 64, epoch):
                lesson = teacher.lesson(batch)
                before = len(runs)
                for one, two in zip(
                    (lesson.final, lesson.exits[2]), (lambda x: (x.final, x.exits[2]))(fresh.lesson(batch)), strict=True
                ):
                    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
                del runs[before:]
                count += 1
            if epoch == 0:
                assert len(runs) == count
            else:
                assert 0 < len(runs) < count
        handle.remove()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernel needs Triton")
def test_attention_over_filled_slots_is_attention() -> None:
    code = """
import torch
from mirror.distill.row_attention import row_attention
torch.manual_seed(0)
for group, dim in ((3, 64), (1, 16), (8, 32)):
    query, keys, values = (torch.randn(5, 2, n, dim) for n in (group, 96, 96))
    lengths = torch.tensor([0, 5, 63, 64, 95])
    scores = query @ keys.transpose(2, 3) * dim**-0.5
    hidden = torch.arange(96) > lengths[:, None, None, None]
    wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(row_attention(query, keys, values, lengths, dim**-0.5), wanted)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_evaluation_sets_defaults(letters_model: Path, letters_prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    distill(str(letters_model), folder, options(letters_prompts, tmp_path, steps=20))
    lines = [{"question_id": i, "category": "abc"[i % 3], "turns": ["abcd"[: 1 + i % 4]]} for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [str(letters_model), str(folder), str(tmp_path / "questions.jsonl"), str(tmp_path / "result.json")]
    done = CliRunner().invoke(evaluate, [*arguments, "--max-new-tokens", "24", "--set-defaults"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "result.json").read_text())
    assert read_facts(folder)["defaults"] == result["suggested"]
    assert result["questions"] + result["left_out"] == 6
    assert sum(result["suggested"]["fanout"]) <= 64
    assert sorted(load_ranking(folder)) == list(range(36))
