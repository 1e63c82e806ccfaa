"""Modes beside each other over one target: what is compared, what is shared, and what overlapped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers

from mirror.bench import gpu_overlap, gpu_rounds, gpu_sweep
from mirror.bench.gpu_budget import merge
from mirror.bench.gpu_rounds import overlap, streams_of
from mirror.bench.gpu_shared import SharedDevice
from mirror.bench.settings import read_settings
from mirror.bundle import read_manifest
from mirror.runtime.options import EngineOptions
from mirror.targets.base import LoadRequest, PassShape
from mirror.targets.cpu import CpuDevice
from tests.lookup import Lookup, LookupBundle, agreeing_table, random_table, write_bundle

VOCAB, ROWS = 23, 97


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = Lookup(random_table(1, ROWS, VOCAB))
    spec = LookupBundle(target, Lookup(agreeing_table(target.table, 0.8, 2)), random_table(3, ROWS, VOCAB))
    folder = write_bundle(tmp_path_factory.mktemp("rounds") / "bundle", spec)
    tokenizer = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(VOCAB)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    lines = [(1, "writing", "abc"), (2, "math", "xyz"), (3, "qa", "hello"), (4, "qa", "what"), (5, "qa", "why")]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question_id": n, "category": c, "turns": [t]}) + "\n" for n, c, t in lines))
    return path


def test_arms_answer_the_same_questions_over_one_target(bundle: Path, questions: Path, tmp_path: Path) -> None:
    out, traces = tmp_path / "rounds.json", tmp_path / "traces"
    options = ["--target-device", "cpu", "--draft-device", "cpu", "--tokens", "40", "--max-length", "64"]
    options += ["--settings", "candidates=both"]  # or no exit head would run
    files = ["--questions", str(questions), "--per-category", "2", "--traces", str(traces), "--out", str(out)]
    run = CliRunner().invoke(
        gpu_rounds.main,
        [str(bundle), *options, *files, "--preface", "6", "--temperature", "0", "--temperature", "1"],
    )
    assert run.exit_code == 0, run.output
    found = json.loads(out.read_text())
    assert {row["prompt_tokens"] for row in found["rows"]} == {6 + len("\n\n") + 3.75}
    assert found["questions"]["numbers"] == [1, 2, 3, 4]  # two of each category, MT-bench's kinds being one
    assert [row["arm"] for row in found["rows"]] == ["plain", "serial + cpu", "mirror + cpu"] * 2
    assert [row["temperature"] for row in found["rows"]] == [0.0] * 3 + [1.0] * 3
    assert all(row["same_text"] for row in found["rows"])
    plain, serial, mirror = found["rows"][:3]
    assert set(mirror["over_plain"]["by_category"]) == {"mt_bench", "qa"}
    assert plain["over_plain"]["mean_over_categories"] == 1.0
    assert mirror["tokens_per_round"] == serial["tokens_per_round"] > plain["tokens_per_round"] == 1.0
    assert mirror["reuse_rate"] > 0.2
    assert found["memory"][0]["foreseen_bytes"]["cpu"]["target_prefix"]["weights"] > 0
    for row in found["rows"]:
        goes = row["where_time_goes_ms"]
        terms = sum(part for name, part in goes.items() if name not in ("round", "draft", "draft_hidden"))
        assert terms == pytest.approx(goes["round"])
    trace = json.loads((traces / "mirror-cpu-t0.json").read_text())
    assert {event["name"] for event in trace["traceEvents"]} > {"prefix", "suffix", "exit_head", "trunk", "rollout"}


def test_variants_run_with_their_settings(bundle: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    options = ["--target-device", "cpu", "--draft-device", "cpu", "--tokens", "40", "--questions", str(questions)]
    texts = ["gamma=1", "fanout=1,0,0,0 candidates=draft", "mode=serial"]
    variants = [part for text in texts for part in ("--variant", text)]
    run = CliRunner().invoke(gpu_sweep.main, [str(bundle), *options, *variants, "--out", str(out)])
    assert run.exit_code == 0, run.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["plain", "mirror", "mirror", "mirror", "serial"]
    assert [row["settings"] for row in rows] == ["", "", *texts]
    assert all(row["same_text"] for row in rows)
    _, own, narrow, one_branch, serial = rows
    assert narrow["tokens_per_round"] <= 2 < own["tokens_per_round"] == serial["tokens_per_round"]
    assert one_branch["branches_per_round"] == 1
    assert one_branch["reuse_rate"] < own["reuse_rate"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fanout=8;4", "'8;4' is no list of numbers; write them like 8,4,2,1"),
        ("branches=4", "'branches=4' is no setting; write name=value, with mode, candidates"),
        ("gamma", "'gamma' is no setting"),
        ("candidates=mine", "'candidates=mine' can't be read"),
    ],
)
def test_settings_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(click.ClickException, match=re.escape(message)):
        read_settings(text, EngineOptions())


def test_step_and_rollout_run_alone_and_at_once(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "overlap.json"
    options = ["--target-device", "cpu", "--draft-device", "cpu", "--context", "20", "--context", "30"]
    variants = ["--settings", "", "--settings", "gamma=2 fanout=2,2,1", "--max-length", "64"]
    run = CliRunner().invoke(gpu_overlap.main, [str(bundle), *options, *variants, "--out", str(out)])
    assert run.exit_code == 0, run.output
    rows = json.loads(out.read_text())["rows"]
    assert [row["context"] for row in rows] == [20, 30, 20, 30]
    assert [row["branches"] for row in rows[2:]] == [5, 5]
    for found in rows:
        assert found["hidden"] == 1 - (found["both_ms"] - found["step_ms"]) / found["rollout_ms"]
        assert found["both_ms"] >= found["step_beside_ms"] > 0
        assert 0 <= found["device_overlap"] <= 1


def test_a_shared_device_loads_a_segment_once(bundle: Path) -> None:
    manifest, device = read_manifest(bundle), SharedDevice(CpuDevice())
    requests = [
        LoadRequest(bundle, manifest.segments[name], [PassShape(width)], slots, 1)
        for name, width, slots in (
            ("target_prefix", 4, 64),
            ("target_prefix", 4, 64),
            ("target_prefix", 2, 64),
            ("target_prefix", 4, 128),
            ("target_suffix", 4, 64),
        )
    ]
    first, again, *others = (device.load_segment(request) for request in requests)
    assert first is again
    assert len({id(first), *map(id, others)}) == 4
    layers = manifest.segments["target_prefix"].kv
    assert device.make_cache(layers, 64) is device.make_cache(layers, 64)
    assert device.make_cache(layers, 64) is not device.make_cache(layers, 32)


# --- what the GPU did -------------------------------------------------------------------------------


def _kernel(stream: int, start_us: float, duration_us: float, cat: str = "kernel") -> dict[str, object]:
    return {"cat": cat, "ts": start_us, "dur": duration_us, "args": {"stream": stream}}


def test_intervals_that_touch_or_contain_each_other_become_one() -> None:
    assert merge([(5, 6), (0, 2), (1, 3), (3, 4), (0, 1)]) == [(0, 4), (5, 6)]


def test_the_busiest_stream_is_the_targets_and_only_common_time_counts() -> None:
    events = [
        _kernel(7, 0, 100),
        _kernel(9, 50, 20),
        _kernel(9, 60, 60),
        _kernel(9, 200, 10),
        _kernel(1, 0, 5, "cpu_op"),
    ]
    found = overlap(streams_of(events))
    assert found == {"target_busy_ms": 0.1, "draft_busy_ms": 0.08, "both_busy_ms": 0.05, "span_ms": 0.21}


def test_work_one_after_the_other_does_not_overlap() -> None:
    found = overlap(streams_of([_kernel(1, 0, 10), _kernel(2, 10, 4), _kernel(1, 14, 10)]))
    assert found["both_busy_ms"] == 0.0
