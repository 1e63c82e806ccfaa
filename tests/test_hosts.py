"""The hosts in C, C++ and C#: built here from pinned packages, on the shared vectors, and against this package."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tokenizers
from filelock import FileLock
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

import mirror
from hosts.answering import PYTHON, Host, HostError, mode_number
from hosts.compare import compare
from hosts.toolchain import (
    DEFAULT_FOLDER,
    HOSTS,
    Toolchain,
    build_consumer,
    build_cpp,
    build_csharp,
    compile_netstandard,
    fetch,
    missing_tools,
    pack_csharp,
)
from mirror.bench.prompts import load_prompts
from mirror.runtime.text import TextCodec, TextStream
from mirror.targets.kernel_library import kernels_here
from tests.vectors.generate import FOLDER, write_bundles

SPEC_BENCH = Path(__file__).parents[2] / "shared" / "data" / "spec_bench.jsonl"
PLAIN_MODES = ("plain", "serial", "mirror")


def fetched(*, dotnet: bool = False) -> Toolchain:
    """Return what builds the hosts; one process at a time fills its folder."""
    if (missing := missing_tools(dotnet=dotnet)) is not None:
        pytest.skip(missing)
    DEFAULT_FOLDER.parent.mkdir(exist_ok=True)
    with FileLock(DEFAULT_FOLDER.with_suffix(".lock")):
        return fetch(dotnet=dotnet)


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    return fetched()


@pytest.fixture(scope="module")
def cpp(toolchain: Toolchain) -> Path:
    return build_cpp(toolchain, DEFAULT_FOLDER / "cpp") / "tests"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts") / "bundles"
    folder.mkdir()
    write_bundles(folder)
    return folder


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose draft has a program for our own kernels, and is its target once more."""
    pytest.importorskip("torch")
    from mirror.export.build import ExportOptions, export_bundle
    from tests.families import make_checkpoint

    folder = tmp_path_factory.mktemp("drafted")
    sizes = {"hidden_size": 64, "intermediate_size": 48, "head_dim": 16}
    model = str(make_checkpoint("llama", folder / "model", **sizes))
    export_bundle(model, folder / "bundle", ExportOptions(draft=model, int8_draft=True, gamma=3, max_length=128))
    return folder / "bundle"


def passes(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    """Run a test program; it must say how many checks it passed, and fail none."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    said = result.stdout[-4000:] + result.stderr[-4000:]
    assert result.returncode == 0, said
    assert result.stdout.rstrip().endswith(" passed, 0 failed"), said


def test_cpp_passes_the_vectors(cpp: Path, bundles: Path) -> None:
    passes([cpp / "mirror_vectors", FOLDER, bundles])


def test_cpp_meets_faults(cpp: Path, bundles: Path) -> None:
    passes([cpp / "mirror_faults", bundles])


def test_cpp_kernels_compute_the_plain_pass(cpp: Path) -> None:
    passes([cpp / "mirror_kernels"])


def test_cpp_runs_drafts_by_kernels(cpp: Path, drafted: Path) -> None:
    passes([cpp / "mirror_program", drafted])


def test_cpp_knows_the_kernels_for_gpus(cpp: Path, bundles: Path) -> None:
    """As far as a machine without a GPU can tell: what is missing is said, and sessions take the operator."""
    passes([cpp / "mirror_gpu_operators"])
    if sys.platform == "linux":
        passes([cpp / "mirror_gpu_operators", cpp / "stand_ins", bundles])


PASSED_ON = """
import ctypes, sys
import numpy as np
import onnxruntime as ort
from mirror.bench.gpu_attention import Attention, Heads, random_inputs
from mirror.bench.gpu_products import product_model, random_weights
from tests.test_gpu_products import dequantised
from tests.test_pass_inputs import computed, embedding_model, inputs_of, mask_model, name_pass_inputs

folder = sys.argv[1]
library = f"{folder}/operators_on_cpu.so"
kept = [ctypes.CDLL(f"{folder}/{name}") for name in ("libcuda.so.1", "libnvrtc.so.13")]
for bits in (4, 8):
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    weights = [random_weights(40, 96, bits, seed) for seed in range(2)]
    session = ort.InferenceSession(product_model(weights, bits), options, providers=["CPUExecutionProvider"])
    for rows in (1, 3, 20):
        x = np.random.default_rng(rows).standard_normal((1, rows, 96), np.float32).astype(np.float16)
        for found, (blocks, scales) in zip(session.run(None, {"x": x}), weights):
            expected = x[0].astype(np.float32) @ dequantised(blocks, scales, bits).T
            np.testing.assert_allclose(found[0], expected, rtol=0, atol=5e-3 * np.abs(expected).max())
    model = product_model(weights[:1], bits, gated=True)
    gated = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    for rows in (1, 20):
        x = np.random.default_rng(rows).standard_normal((1, rows, 96), np.float32).astype(np.float16)
        found, whole = gated.run(None, {"x": x})[0], session.run(["y0"], {"x": x})[0]
        np.testing.assert_array_equal(found, whole[..., 20:])
for masked, apart in ((False, False), (True, False), (False, True)):
    heads, kind = Heads(6, 2, 64, 128), {"masked": masked, "apart": apart}
    ours, theirs = (Attention(heads, 2, given, **kind, device="cpu") for given in (library, None))
    for rows in (1, 5):
        found = []
        for session in (ours, theirs):
            inputs = random_inputs(heads, rows, 20, **kind)
            total = {} if masked else {"total": np.array(20 + rows, np.int32)}
            binding, values = session.bind({**inputs, **total}, 20)
            session.session.run_with_iobinding(binding)
            found.append([values[name].numpy() for name in ("y0", "k0", "v0", "y1", "k1", "v1")])
        for mine, other in zip(*found):
            np.testing.assert_array_equal(mine, other)
        assert found[0][0].any() and found[0][1][:, :, 20 + rows - 1].any()
for make in (mask_model, embedding_model):
    named = make()
    name_pass_inputs(named)
    for rows, total in ((1, 1), (3, 17), (30, 40)):
        given = inputs_of(named, rows, total)
        np.testing.assert_array_equal(computed(named, given, library), computed(make(), given))
print("passed on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels for GPUs are built on Linux")
def test_passes_that_are_not_for_the_kernels_are_passed_on_to_onnxruntime(cpp: Path) -> None:
    """By operators for the CPU's provider, which stand-ins give a GPU that is too old."""
    command = [sys.executable, "-c", PASSED_ON, str(cpp / "stand_ins")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "passed on", done.stderr


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_both_hosts_draft_by_the_same_kernels(cpp: Path, drafted: Path, temperature: str) -> None:
    """Where this package has kernels, so has the library: drafts are then right as often in both, to the token."""
    settings = {"mode": mode_number("serial"), "threads": "1", "tokens": "60", "temperature": temperature}
    found = []
    for program in (PYTHON, [str(cpp / "mirror_speed")]):
        with Host(program, drafted, settings) as host:
            found.append([host.answer(prompt) for prompt in ((1, 2, 3), (1, 50, 7, 9))])
    for python, native in zip(*found, strict=True):
        assert native["tokens"] == python["tokens"]
        if kernels_here() is not None:
            assert native["draft_kernels"] == kernels_here()
            assert native["draft_tokens_accepted"] == python["draft_tokens_accepted"] > 0


def test_the_c_surface(cpp: Path, bundles: Path) -> None:
    passes([cpp / "mirror_c_api", bundles])


SANITIZED = ("mirror_vectors", "mirror_faults", "mirror_kernels", "mirror_program", "mirror_gpu_operators")


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, toolchain: Toolchain) -> Path:
    folder = DEFAULT_FOLDER / f"cpp-{request.param.partition(',')[0]}"
    options = [f"-DMIRROR_SANITIZE={request.param}", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"]
    # Sources by the dozen in one unit: much of their compilation is headers. The other build compiles each alone.
    options += ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=12"]
    return build_cpp(toolchain, folder, *options, targets=[*SANITIZED]) / "tests"


@pytest.mark.parametrize("program", SANITIZED)
def test_sanitizers_find_nothing(sanitized: Path, bundles: Path, drafted: Path, program: str) -> None:
    """No suppressions: ONNX Runtime itself is not instrumented, and nothing is said of it."""
    halt = {"UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    arguments = {"mirror_vectors": [FOLDER, bundles], "mirror_faults": [bundles], "mirror_program": [drafted]}
    if sys.platform == "linux":
        arguments["mirror_gpu_operators"] = [sanitized / "stand_ins", bundles]
    passes([sanitized / program, *arguments.get(program, [])], halt)


def test_hosts_to_be_compared_answer_alike(cpp: Path, bundles: Path) -> None:
    settings = {"mode": mode_number("mirror"), "threads": "1", "tokens": "12"}
    found = []
    for program in (PYTHON, [str(cpp / "mirror_speed")]):
        with Host(program, bundles / "context", settings) as host:
            found.append([host.answer(prompt)["tokens"] for prompt in ((1, 2, 3), (5,))])
        wrong = Host(program, bundles / "context", {**settings, "target": "gpu"})
        with wrong, pytest.raises(HostError, match="error: no device is called 'gpu'"):
            wrong.answer((1, 2, 3))
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0]] == [12, 12]


@pytest.mark.skipif(sys.platform != "linux", reason="the share of other processes is Linux's to tell")
def test_speeds_are_compared_in_pairs(cpp: Path, bundles: Path) -> None:
    options = argparse.Namespace(
        bundle=bundles / "context",
        programs=cpp,
        threads=1,
        tokens=12,
        loads=2,
        repeats=2,
        others=1.0,
        patience_s=60.0,
    )
    found = compare(options, [(1, 2, 3), (5,)], "serial")
    ratio = found["cpp_to_python_decode_ratio"]
    assert len(ratio["loads"]) == len(found["others_share_of_cpu"]) == 2
    assert ratio["interval_95"][0] <= ratio["median_of_loads"] <= ratio["interval_95"][1]
    assert min(ratio["loads"]) <= ratio["median_of_loads"] <= max(ratio["loads"])


def test_the_installed_package_is_found(toolchain: Toolchain, cpp: Path, tmp_path: Path, bundles: Path) -> None:
    """`cmake --install`, then a project of its own that says find_package(mirror)."""
    prefix, project, build = tmp_path / "prefix", tmp_path / "project", tmp_path / "build"
    subprocess.run(["cmake", "--install", str(cpp.parent), "--prefix", str(prefix)], check=True, capture_output=True)
    shutil.copytree(HOSTS / "cpp" / "examples", project)
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(consumer CXX)\nset(CMAKE_CXX_STANDARD 17)\n"
        "find_package(mirror 0.1 REQUIRED)\nadd_executable(generate generate.cpp)\n"
        "target_link_libraries(generate PRIVATE mirror::mirror)\n"
    )
    found = [f"-DCMAKE_PREFIX_PATH={prefix}", *toolchain.cmake_options]
    configure = ["cmake", "-S", str(project), "-B", str(build), *found]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(build)], check=True, capture_output=True)
    result = subprocess.run(
        [str(build / "generate"), str(bundles / "context"), "hello"],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_LIBRARY_PATH": f"{prefix}/lib:{toolchain.library_folder}"},
    )
    assert result.returncode == 1
    assert "error:" in result.stderr
    assert "no chat format" in result.stderr


def test_the_library_stays_small_and_depends_on_little(cpp: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "libmirror.so"
    subprocess.run(["strip", "-o", str(stripped), str(cpp.parent / "libmirror.so")], check=True)
    assert stripped.stat().st_size < 1_200_000
    needed = subprocess.run(["readelf", "-d", str(stripped)], check=True, capture_output=True, text=True).stdout
    names = {line.split("[")[1].split(".so")[0] for line in needed.splitlines() if "(NEEDED)" in line}
    assert names <= {"libonnxruntime", "libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl"}


def test_examples_are_short_enough_to_copy() -> None:
    for example in (HOSTS / "cpp/examples/generate.cpp", HOSTS / "csharp/MirrorSd.Example/Program.cs"):
        assert len(example.read_text(encoding="utf-8").splitlines()) < 60, example


# C#.


@pytest.fixture(scope="module")
def dotnet(toolchain: Toolchain) -> Toolchain:
    return fetched(dotnet=True)


@pytest.fixture(scope="module")
def csharp(dotnet: Toolchain) -> Path:
    return build_csharp(dotnet, DEFAULT_FOLDER / "csharp")


def run_csharp(dotnet: Toolchain, programs: Path, cpp: Path, *arguments: Path) -> None:
    command = [dotnet.dotnet, programs / "MirrorSd.Tests.dll", *arguments]
    passes(command, dict(dotnet.dotnet_environment(cpp.parent)))


def test_csharp_passes_the_vectors(dotnet: Toolchain, csharp: Path, cpp: Path, bundles: Path) -> None:
    run_csharp(dotnet, csharp, cpp, FOLDER, bundles)


def test_csharp_library_is_netstandard(dotnet: Toolchain, tmp_path: Path) -> None:
    compile_netstandard(dotnet, tmp_path)
    # The documentation of every public member came out with it.
    assert "M:MirrorSd.Engine.Stream" in (tmp_path / "MirrorSd.xml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def package(dotnet: Toolchain, cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_csharp(dotnet, cpp.parent, tmp_path_factory.mktemp("package"))


def test_the_nuget_package_has_what_it_should(package: Path) -> None:
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if name.startswith(("lib/", "runtimes/"))}
        nuspec = ElementTree.fromstring(archive.read("MirrorSd.nuspec"))
    assert names == {
        "lib/netstandard2.0/MirrorSd.dll",
        "lib/netstandard2.0/MirrorSd.xml",
        "runtimes/linux-x64/native/libmirror.so",
        "runtimes/linux-x64/native/libonnxruntime.so.1",
    }
    fields = {item.tag.rpartition("}")[2]: item for item in nuspec.iter()}
    assert fields["id"].text == "MirrorSd"
    assert fields["version"].text == mirror.__version__
    assert fields["license"].attrib == {"type": "expression"}
    assert fields["license"].text == "Apache-2.0"
    assert str(fields["description"].text).startswith("Mirror Speculative Decoding")
    assert "dependency" not in fields


def test_a_program_runs_on_the_package_alone(dotnet: Toolchain, package: Path, bundles: Path, tmp_path: Path) -> None:
    """Restored offline from its folder; no library path names libmirror or ONNX Runtime."""
    program = build_consumer(dotnet, package, tmp_path)
    environment = {**dotnet.dotnet_environment(), "LD_LIBRARY_PATH": str(dotnet.folder / "openssl")}
    command = [str(dotnet.dotnet), str(program / "Consumer.dll"), str(bundles / "context"), "hello"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1, result.stderr
    assert "error: the bundle has no chat format" in result.stderr


# Text.

ODD_TEXTS = (
    "",
    " ",
    "  \n\n  a",
    "<|im_start|>user\nhi<|im_end|>\n",
    "x<|im_start|><|endoftext|>y",
    "héllo wörld ñ 12345 ½ ² Ⅷ 123.456,789",
    "日本語テキスト、漢字",
    "😀👩‍👩‍👧‍👦 emoji 🇩🇪",
    "don't we'LL I'm they'd 'tis",
    "a\t\tb\r\nc\n\n\nd   ",
    "\u00a0nbsp\u2003em\u3000wide",
    "עברית عربى हिन्दी ไทย",
    "e\u0301 o\u0302\u0323 \u1112\u1161\u11ab\uac00\u11a8 \u212b \u0958 \u0344 q\u0323\u0307 a\u0301\u0316\u0300",
    "\ufffd broken \ufffd",
)


def texts() -> Sequence[str]:
    """Return odd texts, and every prompt of Spec-Bench where it is at hand."""
    found = list(ODD_TEXTS) + [prompt.text for prompt in load_prompts()]
    if SPEC_BENCH.is_file():
        for line in SPEC_BENCH.read_text(encoding="utf-8").splitlines():
            found += json.loads(line)["turns"]
    return found


def composed_texts() -> Sequence[str]:
    """Return every character that Unicode decomposes, as it is, decomposed, and with more marks after it."""
    points = [chr(point) for point in range(0x30000) if unicodedata.decomposition(chr(point))[:1].isalnum()]
    lines = ["".join(points[start : start + 100]) for start in range(0, len(points), 100)]
    marked = ["\u0301\u0323".join(line) for line in lines]
    return [*lines, *(unicodedata.normalize("NFD", line) for line in lines), *marked]


def text_cases(codec: TextCodec, some: Sequence[str], vocab: int) -> list[dict[str, Any]]:
    cases = [_encode_case(codec, text, special) for text in some for special in (True, False)]
    # Ids in any order: characters that begin and never end, bytes that are no character, special tokens.
    strides = [[(start * 7919 + step * 104729) % vocab for step in range(40)] for start in range(60)]
    cases += [{"text": None, "special": False, "tokens": ids, "decoded": codec.decode(ids)} for ids in strides]
    return cases


def _encode_case(codec: TextCodec, text: str, special: bool) -> dict[str, Any]:
    tokens = codec.encode(text, add_special_tokens=special)
    return {"text": text, "special": special, "tokens": tokens, "decoded": codec.decode(tokens)}


def stop_cases(codec: TextCodec) -> list[dict[str, Any]]:
    cases = []
    for stop in (["the"], ["\n\n", "a b"], ["zzzz"], ["é", "éx"], ["漢"], ["b\r", "\n\n\nd"]):
        for text in (*ODD_TEXTS, "all of the words of the day"):
            tokens = codec.encode(text)
            stream = TextStream(codec, stop)
            decoded = stream.push(tokens) + stream.finish()
            kept = stream.kept_tokens
            cases.append({"stop": stop, "tokens": tokens, "decoded": decoded, "stopped": stream.stopped, "kept": kept})
    return cases


def byte_level(pattern: str | None) -> tokenizers.Tokenizer:
    """Return a trained byte-level tokenizer, split by GPT-2's pattern or by another one."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pattern is not None))
    if pattern is not None:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=True)
        if pattern is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|im_start|>", "<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([prompt.text for prompt in load_prompts()], trainer)
    return tokenizer


def with_byte_fallback() -> tokenizers.Tokenizer:
    """Return a trained tokenizer of the SentencePiece kind, as Llama 2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    words = [word for prompt in load_prompts() for word in prompt.text.replace(" ", " ▁").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in ("<unk>", "<s>")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


PATTERNS = {
    "qwen": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "llama3": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "cased": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt2": None,
}


@pytest.mark.parametrize("kind", [*PATTERNS, "byte fallback"])
def test_cpp_reads_tokenizers_of_other_families(cpp: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = with_byte_fallback() if kind == "byte fallback" else byte_level(PATTERNS[kind])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec.load(tmp_path)
    cases = text_cases(codec, [*composed_texts(), *texts()[:200]], tokenizer.get_vocab_size()) + stop_cases(codec)
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    passes([cpp / "mirror_text", tmp_path, tmp_path / "cases.json"])


# A real model.


SAMPLINGS: Sequence[dict[str, Any]] = (
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1, "seed": 2**63 + 1},
)
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def smollm2_cases(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of what this package says of texts and prompts."""
    codec = TextCodec.load(smollm2)
    cases = text_cases(codec, texts(), 49152) + stop_cases(codec) + answer_cases(smollm2, codec)
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    path.write_text(json.dumps(cases), encoding="utf-8")
    return path


def answer_cases(bundle: Path, codec: TextCodec) -> list[dict[str, Any]]:
    cases = []
    messages = [{"role": "user", "content": "Name three colours, then say why the sky is blue."}]
    prompt = codec.render(messages)
    with mirror.load(bundle, max_length=256) as engine:
        for sampling, stop in [(item, ()) for item in SAMPLINGS] + [({}, (" the", "zz"))]:
            for mode in PLAIN_MODES:
                answer = engine.generate_tokens(
                    codec.encode(prompt, add_special_tokens=False),
                    max_new_tokens=16,
                    mode=mode,
                    stop=stop,
                    **sampling,
                )
                text = TextStream(codec, stop)
                cases.append(
                    {
                        "messages": messages,
                        "prompt": prompt,
                        "mode": mode,
                        "max_new_tokens": 16,
                        "sampling": {**GREEDY, **sampling, "seed": str(sampling.get("seed", 0))},
                        "stop_strings": list(stop),
                        "answer": text.push(answer.tokens) + text.finish(),
                        "answer_tokens": list(answer.tokens),
                    }
                )
    return cases


def test_cpp_gives_this_packages_text(cpp: Path, smollm2: Path, smollm2_cases: Path) -> None:
    passes([cpp / "mirror_text", smollm2, smollm2_cases])


def test_csharp_gives_this_packages_text(
    dotnet: Toolchain, csharp: Path, cpp: Path, bundles: Path, smollm2: Path, smollm2_cases: Path
) -> None:
    run_csharp(dotnet, csharp, cpp, FOLDER, bundles, smollm2, smollm2_cases)
