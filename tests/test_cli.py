"""The command line, over real sessions on lookup-table bundles."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from click.testing import CliRunner, Result
from tokenizers import models, pre_tokenizers

import mirror
from mirror import default_model
from mirror.bundle import Settings, read_manifest, write_manifest
from mirror.cli import auto_mode, main
from mirror.default_model import DEFAULT_OPTIONS, OWN_DRAFT_OPTIONS, DefaultOptions, default_bundle_path
from mirror.errors import ExportError
from tests.cli_reference import reference
from tests.lookup import Lookup, LookupBundle, agreeing_table, random_table, write_bundle

VOCAB = 24
PROMPT = "w1 w2 w3"
MODES = ["auto", "plain", "serial", "mirror"]


def make_bundle(folder: Path, *, draft: bool = True, max_length: int = 96) -> Path:
    """Write a lookup bundle whose tokenizer knows the words w0..w23 and whose chat is their sequence."""
    table = random_table(3, 60, VOCAB)
    guess = Lookup(agreeing_table(table, 0.7, 5)) if draft else None
    write_bundle(folder, LookupBundle(Lookup(table), guess, max_length=max_length))
    words = tokenizers.Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cli") / "bundle")


@pytest.fixture
def own_bundle(tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return make_bundle(tmp_path / "own")


@pytest.fixture
def cached(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lookup bundle, in the place of the cached default bundle."""
    monkeypatch.setenv("MIRROR_CACHE", str(tmp_path / "cache"))
    shutil.copytree(bundle, default_bundle_path(options=OWN_DRAFT_OPTIONS))
    return Path(shutil.copytree(bundle, default_bundle_path()))


def call(*arguments: object, given: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=given, prog_name="mirror")


def ok(result: Result) -> Result:
    assert result.exit_code == 0, result.output
    return result


def answer_of(bundle: Path, prompt: str = PROMPT, **options: object) -> mirror.Result:
    with mirror.load(bundle, mode="plain") as engine:
        return engine.generate(prompt, max_new_tokens=20, **options)  # type: ignore[arg-type]


def told(result: Result, name: str) -> str:
    """Return a figure of the statistics block on stderr."""
    return next(line.split()[-1] for line in result.stderr.splitlines() if line.startswith(name + " "))


# run


@pytest.mark.parametrize("mode", MODES)
def test_run_prints_the_text_on_stdout_and_statistics_on_stderr(bundle: Path, mode: str) -> None:
    result = ok(call("run", bundle, PROMPT, "--mode", mode, "--max-new-tokens", 20))
    assert result.stdout == f"{answer_of(bundle).text}\n"
    assert told(result, "generated_tokens") == "20"
    assert told(result, "finish_reason") == "length"


def test_an_untuned_mode_on_one_cpu_comes_with_a_tip(bundle: Path) -> None:
    assert "mirror tune" in ok(call("run", bundle, PROMPT)).stderr
    assert "mirror tune" not in ok(call("run", bundle, PROMPT, "--mode", "mirror")).stderr


@pytest.mark.parametrize(
    ("target", "suffix", "draft", "mode"),
    [
        (None, None, None, "serial"),
        ("openvino:cpu:f32", None, "cpu", "serial"),
        ("cuda:0", None, None, "mirror"),
        ("cuda:0", "cpu", "openvino:CPU", "serial"),
        (None, None, "npu", "mirror"),
        ("cuda:0", None, "cuda:0:0.25", "mirror"),
        ("cuda:0", None, "CUDA:0", "serial"),
        ("cuda:0", None, "cuda:1", "mirror"),
        ("cuda:0", "cuda:1", "cuda:1", "serial"),
        ("openvino:GPU:f16", None, "openvino:gpu", "serial"),
        ("openvino:GPU", None, "openvino:NPU", "mirror"),
    ],
)
def test_an_untuned_draft_on_its_targets_device_goes_first(
    bundle: Path, target: str | None, suffix: str | None, draft: str | None, mode: str
) -> None:
    assert auto_mode(bundle, target, suffix, draft) == (mode, False)


def test_run_prints_no_statistics_when_told_so(bundle: Path) -> None:
    assert ok(call("run", bundle, PROMPT, "--no-stats")).stderr == ""


@pytest.mark.parametrize("mode", MODES)
def test_run_json_is_one_object(bundle: Path, mode: str) -> None:
    result = ok(call("run", bundle, PROMPT, "--mode", mode, "--max-new-tokens", 20, "--json"))
    found = json.loads(result.stdout)
    expected = answer_of(bundle)
    assert set(found) >= {"text", "tokens", "finish_reason", "statistics", "events"}
    assert (found["text"], tuple(found["tokens"])) == (expected.text, expected.tokens)
    assert set(found["statistics"]) >= {"tokens_per_round", "reuse_rate", "ttft_s", "rounds", "acceptance_rate"}
    assert result.stderr == ""


def test_the_prompt_may_come_from_anywhere(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    options = ("--max-new-tokens", 20)
    expected = f"{answer_of(bundle).text}\n"
    assert ok(call("run", bundle, *options, given=PROMPT)).stdout == expected
    assert ok(call("run", bundle, *options, "--prompt-file", tmp_path / "prompt.txt")).stdout == expected
    assert ok(call("run", bundle, *options, "--prompt-file", "-", given=PROMPT)).stdout == expected


@pytest.mark.parametrize(
    ("options", "kernels", "expected"),
    [
        ((), "avx512", OWN_DRAFT_OPTIONS),
        (("--target-device", "cpu", "--draft-device", "cpu"), "amx", OWN_DRAFT_OPTIONS),
        (("--mode", "serial"), "avx2", OWN_DRAFT_OPTIONS),
        ((), None, DEFAULT_OPTIONS),
        (("--mode", "mirror"), "avx512", DEFAULT_OPTIONS),
        (("--draft-device", "openvino:CPU"), "avx512", DEFAULT_OPTIONS),
        (("--target-device", "cuda:0"), "avx512", DEFAULT_OPTIONS),
    ],
)
def test_on_a_cpu_with_kernels_the_default_model_drafts_for_itself(
    options: tuple[str, ...], kernels: str | None, expected: DefaultOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[DefaultOptions] = []

    def ensure(export: object, *, options: DefaultOptions) -> Path:
        asked.append(options)
        raise ExportError("asked")

    monkeypatch.setattr(default_model, "ensure_default_bundle", ensure)
    monkeypatch.setattr("mirror.targets.kernel_library.chosen_kernels", lambda: kernels)
    assert "asked" in call("run", "Why?", *options).output
    assert asked == [expected]


def test_one_argument_that_is_no_folder_is_the_prompt_of_the_cached_bundle(cached: Path) -> None:
    expected = f"{answer_of(cached).text}\n"
    assert ok(call("run", PROMPT, "--max-new-tokens", 20)).stdout == expected
    assert ok(call("run", "--max-new-tokens", 20, given=PROMPT)).stdout == expected
    long_prompt = "w1 " * 3000  # longer than a path may be
    assert "3000" in call("run", long_prompt).stderr


@pytest.mark.parametrize("mode", MODES)
def test_sampling_options_reach_the_engine(bundle: Path, mode: str) -> None:
    options = ["--temperature", 1.2, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1]
    result = ok(call("run", bundle, PROMPT, "--mode", mode, "--max-new-tokens", 20, "--seed", 7, *options))
    expected = answer_of(bundle, temperature=1.2, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=7)
    assert result.stdout == f"{expected.text}\n"
    assert expected.text != answer_of(bundle).text


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1, "kappa": 1, "threads": 1},
        {"candidates": "exit", "mode": "mirror", "max_length": 50},
        {"pinned": True, "target_device": "cpu", "draft_device": "cpu"},
    ],
)
def test_loading_options_reach_the_engine_and_keep_the_text(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    load, given = mirror.load, {}

    def noting(folder: Path, **choices: object) -> mirror.Engine:
        given.update(choices)
        return load(folder, **choices)  # type: ignore[arg-type]

    monkeypatch.setattr(mirror, "load", noting, raising=False)
    flags = [["--" + name.replace("_", "-"), *([] if value is True else [value])] for name, value in options.items()]
    result = ok(call("run", bundle, PROMPT, "--max-new-tokens", 20, *itertools.chain(*flags)))
    assert given | options == given
    assert result.stdout == f"{answer_of(bundle).text}\n"


def test_stop_strings_end_the_text(bundle: Path) -> None:
    text = answer_of(bundle).text or ""
    stop = " ".join(text.split()[4:6])
    result = ok(call("run", bundle, PROMPT, "--max-new-tokens", 20, "--stop", stop, "--stop", "never"))
    assert result.stdout == f"{text[: text.index(stop)]}\n"
    assert told(result, "finish_reason") == "stop"


def test_max_length_is_the_capacity(bundle: Path) -> None:
    result = ok(call("run", bundle, PROMPT, "--max-length", 12))
    assert told(result, "finish_reason") == "length"
    assert told(result, "generated_tokens") in ("9", "10")


def test_a_bundle_without_a_draft_runs_in_plain_mode_and_says_so(tmp_path: Path) -> None:
    result = ok(call("run", make_bundle(tmp_path / "bundle", draft=False), PROMPT))
    assert "notice: the bundle has no draft" in result.stderr


def test_trace_is_written(bundle: Path, tmp_path: Path) -> None:
    ok(call("run", bundle, PROMPT, "--trace", tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {"prefix", "suffix"} <= {event["name"] for event in events}


def test_without_a_chat_template_applied_the_prompt_is_continued(own_bundle: Path) -> None:
    (own_bundle / "chat_template.jinja").write_text("w9 {{ messages[0].content }}", encoding="utf-8")
    asked = ok(call("run", own_bundle, PROMPT, "--json"))
    continued = ok(call("run", own_bundle, PROMPT, "--json", "--no-chat-template"))
    assert json.loads(asked.stdout)["statistics"]["prompt_tokens"] == 4
    assert json.loads(continued.stdout)["statistics"]["prompt_tokens"] == 3


# run --chat


def test_a_conversation_keeps_its_cache_between_turns(bundle: Path) -> None:
    result = ok(call("run", bundle, "--chat", "--max-new-tokens", 4, given="w1 w2\n\nw3\n/exit\nw4\n"))
    with mirror.load(bundle, mode="plain") as engine:
        conversation = engine.conversation()
        expected = [conversation.say(text, max_new_tokens=4).text for text in ("w1 w2", "w3")]
    assert result.stdout == "".join(f"{text}\n" for text in expected)
    reused = [int(line.split()[-1]) for line in result.stderr.splitlines() if line.startswith("reused_prompt_tokens ")]
    assert len(reused) == 2
    assert reused[1] > reused[0] == 0


def test_reset_forgets_the_conversation(bundle: Path) -> None:
    result = ok(call("run", bundle, "w1 w2", "--chat", "--max-new-tokens", 4, "--no-stats", given="/reset\nw1 w2\n"))
    first, second = result.stdout.splitlines()
    assert first == second
    assert "starts anew" in result.stderr


def test_a_turn_that_does_not_fit_is_reported_and_the_conversation_goes_on(bundle: Path) -> None:
    given = f"{'w1 ' * 200}\nw1 w2\n"
    result = ok(call("run", bundle, "--chat", "--max-new-tokens", 4, "--no-stats", given=given))
    assert result.stderr.count("error: ") == 1
    assert len(result.stdout.split()) == 4


# run, interrupted


def start(*arguments: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(mirror.__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-m", "mirror", *map(str, arguments)]
    # Unbuffered, since communicate() forgets what a buffered read took ahead.
    return subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("cli") / "long", max_length=200_000)


@pytest.mark.parametrize("mode", MODES)
def test_ctrl_c_prints_what_was_committed(long_bundle: Path, mode: str) -> None:
    process = start("run", long_bundle, PROMPT, "--mode", mode, "--max-new-tokens", 199_000)
    assert process.stdout is not None
    first = process.stdout.read(16)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    text = (first + rest).decode()
    assert process.returncode == 130
    assert text.endswith("\n")
    lines = [line for line in errors.decode().splitlines() if line and not line.startswith("notice: ")]
    figures = dict(line.split() for line in lines)
    assert figures["finish_reason"] == "cancelled"
    assert int(figures["generated_tokens"]) == len(text.split())
    with mirror.load(long_bundle, mode="plain") as engine:
        shown = min(len(text.split()), 200)
        expected = engine.generate(PROMPT, max_new_tokens=shown).text
    assert text.split()[:shown] == (expected or "").split()


def test_ctrl_c_ends_an_answer_that_shows_no_text(tmp_path: Path) -> None:
    silent = make_bundle(tmp_path / "silent", max_length=200_000)
    words = tokenizers.Tokenizer.from_file(str(silent / "tokenizer.json"))
    words.add_special_tokens([f"w{index}" for index in range(VOCAB)])
    words.save(str(silent / "tokenizer.json"))
    process = start("run", silent, PROMPT, "--max-new-tokens", 199_000)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert shown.strip() == b""


def test_a_reader_that_leaves_is_no_error_worth_telling(long_bundle: Path) -> None:
    process = start("run", long_bundle, PROMPT, "--max-new-tokens", 100_000)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        process.stdout.read(4)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1
    assert errors == ""


# Errors


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["run", "nowhere", "hello"], "no bundle at nowhere"),
        (["inspect", "nowhere"], "no bundle at nowhere"),
        (["run", ".", "hello"], "is not a bundle"),
        (["run", "--prompt-file", "nowhere.txt"], "nowhere.txt can't be read"),
    ],
)
def test_errors_say_what_was_found_and_what_to_do(arguments: list[str], found: str) -> None:
    result = call(*arguments)
    first, second = result.stderr.splitlines()
    assert result.exit_code == 1
    assert first.startswith("error: ")
    assert found in first
    assert second.startswith("hint: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["run", "a", "b", "c"], "quote the prompt"),
        (["run", "a", "--prompt-file", "b"], "leave one out"),
        (["run", "--chat", "--json"], "--chat"),
        (["run", "hello", "--mode", "fast"], "fast"),
        (["run", "hello", "--top-p", "0"], "--top-p"),
        (["run"], "the prompt is empty"),
        (["recut", "bundle"], "nothing to change"),
        (["export", "model"], "--output"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], found: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert found in result.stderr


def test_a_prompt_that_is_not_text_is_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.bin").write_bytes(b"w1 \xff")
    result = call("run", bundle, "--prompt-file", tmp_path / "prompt.bin")
    assert result.exit_code == 1
    assert "is not UTF-8" in result.stderr


def test_a_prompt_beyond_the_capacity_is_refused_with_both_figures(bundle: Path) -> None:
    result = call("run", bundle, "w1 " * 200)
    assert result.exit_code == 1
    assert "200" in result.stderr
    assert "96" in result.stderr


def test_debug_keeps_the_traceback() -> None:
    result = call("inspect", "nowhere", "--debug")
    assert type(result.exception).__name__ == "BundleError"


def test_what_nobody_expected_is_one_line_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(mirror, "load", broken, raising=False)
    result = call("run", bundle, PROMPT)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "error: ZeroDivisionError: division by zero"
    assert "--debug" in result.stderr


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_bundle_is_refused_with_the_name_of_the_file(own_bundle: Path, damage: str) -> None:
    path = own_bundle / "target_suffix.onnx"
    content = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(content[:-1])
    for result in (call("run", own_bundle, PROMPT), call("inspect", own_bundle)):
        assert result.exit_code == 1
        assert result.stderr.startswith("error: target_suffix.onnx ")


# inspect, devices, docs


def test_inspect_tells_segments_cut_draft_and_devices(bundle: Path) -> None:
    output = ok(call("inspect", bundle)).stdout
    for word in ("target_prefix", "exit_head", "target_suffix", "draft_trunk", "exit after", "gamma 3", "openvino:NPU"):
        assert word in output


def test_inspect_json_has_the_same_facts(bundle: Path) -> None:
    found = json.loads(ok(call("inspect", bundle, "--json")).stdout)
    suffix = next(segment for segment in found["segments"] if segment["name"] == "target_suffix")
    # One key and one value of 4 bytes in its one layer; its table is its only weight of some size.
    assert (suffix["slot_bytes"], suffix["kv_bytes"]) == (8, 8 * 96)
    assert 60 * VOCAB * 4 <= suffix["weight_bytes"] < 2 * 60 * VOCAB * 4
    assert found["draft_memory"]["slot_bytes"] == 16
    assert (found["gamma"], found["kappa"], found["max_length"]) == (3, 2, 96)


def test_settings_in_a_bundle_hold_where_the_command_says_nothing(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    settings = Settings(mode="serial", gamma=2, target_device="cpu")
    write_manifest(own_bundle, dataclasses.replace(manifest, settings=settings))
    assert "mode serial, gamma 2, target_device cpu" in ok(call("inspect", own_bundle)).stdout
    tuned = json.loads(ok(call("run", own_bundle, PROMPT, "--max-new-tokens", 20, "--json")).stdout)["statistics"]
    assert tuned["branches_per_round"] is None  # serial prepares no branches
    assert tuned["draft_tokens_proposed"] <= 2 * tuned["rounds"]
    told = ok(call("run", own_bundle, PROMPT, "--max-new-tokens", 20, "--json", "--mode", "mirror", "--gamma", 3))
    assert json.loads(told.stdout)["statistics"]["branches_per_round"] > 0


def test_run_takes_a_fan_out_and_the_most_draft_tokens(bundle: Path) -> None:
    options = ("--max-new-tokens", 20, "--json", "--mode", "mirror", "--candidates", "draft")
    shaped = ok(call("run", bundle, PROMPT, *options, "--fanout", "2,1,0,0", "--tokens-per-pass", "1"))
    assert json.loads(shaped.stdout)["statistics"]["branches_per_round"] <= 3
    short = ok(call("run", bundle, PROMPT, *options, "--num-assistant-tokens", 1))
    statistics = json.loads(short.stdout)["statistics"]
    assert statistics["draft_tokens_proposed"] <= statistics["rounds"]
    assert call("run", bundle, PROMPT, "--fanout", "2,x").exit_code == 2
    refused = call("run", bundle, PROMPT, "--fanout", "2,1")
    assert refused.exit_code == 1
    assert "with gamma 3 it must have 4" in refused.stderr


def test_inspect_verify_finds_an_edit_that_keeps_the_size(own_bundle: Path) -> None:
    path = own_bundle / "draft.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ok(call("inspect", own_bundle))
    result = call("inspect", own_bundle, "--verify")
    assert result.exit_code == 1
    assert "draft.onnx does not have the sha256" in result.stderr


def test_devices_lists_this_cpu_and_says_why_others_are_missing() -> None:
    result = ok(call("devices"))
    assert any(line.split()[:1] == ["cpu"] for line in result.stdout.splitlines())
    found = json.loads(ok(call("devices", "--json")).stdout)["devices"]
    missing = [device for device in found if not device["available"]]
    assert all(device["reason"] in result.stderr for device in missing)


def test_the_reference_page_fits_the_commands() -> None:
    page = Path(__file__).parents[1] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_export_of_nothing_is_refused_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = call("export", tmp_path / "nowhere", "-o", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert list(tmp_path.iterdir()) == []
