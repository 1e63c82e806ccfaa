"""Prompts in files: what a line may be, and what is said of one that is none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mirror.bundle import read_manifest
from mirror.errors import RequestError
from mirror.prompt_files import read_prompt_file
from mirror.tune.measure import sample_prompts
from tests.lookup import Lookup, LookupBundle, random_table, write_bundle


def test_a_line_has_its_prompt_under_one_of_three_names(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "One?", "answer": "1"},
        {"question": "Two?", "prompt": 2},
        {"instruction": "Add.", "input": "1 and 2"},
        {"instruction": "Say.", "instances": [{"input": "it", "output": "it"}]},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_prompt_file(path) == ["One?", "Two?", "Add.\n1 and 2", "Say.\nit"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a JSONL file with a prompt, instruction or question on every line"),
        (b"\n \n", "is empty"),
        (b'{"prompt": "a"}\n\nWhat?\n', "prompts.jsonl:3 is no JSON ("),
        (b'["a"]\n', "prompts.jsonl:1 is no JSON object"),
        (b'{"text": "a"}\n', "prompts.jsonl:1 has none of the fields prompt, instruction, question"),
        (b'{"prompt": "\xff"}\n', "is not UTF-8 (invalid start byte at byte 12)"),
        (None, "no prompts at "),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=re.escape(message)):
        read_prompt_file(path)


def test_tuning_may_answer_prompts_of_a_file(tmp_path: Path) -> None:
    folder, path = write_bundle(tmp_path / "b", LookupBundle(Lookup(random_table(1, 97, 23)))), tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {number}"}) + "\n" for number in range(10)))
    with pytest.raises(RequestError, match=r"b has no tokenizer\.json, so it can't read .*p\.jsonl; leave the prompts"):
        sample_prompts(folder, read_manifest(folder), 2, path)
    (folder / "tokenizer.json").write_text("{}")
    assert sample_prompts(folder, read_manifest(folder), 3, path) == ("Question 0", "Question 3", "Question 6")
    assert len(sample_prompts(folder, read_manifest(folder), 3)) == 3
