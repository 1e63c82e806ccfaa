"""A model argument (folder, hub id or GGUF file) -> config, weights, tokenizer files.

Everything that can be refused is refused here, before any work is done.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from mirror.errors import ExportError
from mirror.export.trace import hollow
from mirror.export.weights import MemorySource, SafetensorsSource, WeightSource

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Pre-tokenizers that GGUF names but transformers' import of them leaves incomplete.
_GGUF_DIGITS = {"smollm"}
_VOLATILE_KEYS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"}


@dataclass(frozen=True)
class Checkpoint:
    """A decoder that can be exported.

    `path` is a folder with `config.json`, or a GGUF file; `name` is what the user wrote.
    """

    name: str
    path: Path
    config: PretrainedConfig
    scope: str = ""

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in one GGUF file."""
        return self.path.is_file()

    @property
    def architecture(self) -> str:
        """The name of transformers' class for this model."""
        cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        return str(cls.__name__)

    @cached_property
    def weights(self) -> WeightSource:
        """The checkpoint's tensors; read through transformers only where its files don't hold them by name."""
        if not self.is_gguf:
            skeleton = hollow(copy.deepcopy(self.config), torch.float32)
            source = SafetensorsSource.open(self.path, str(getattr(skeleton, "base_model_prefix", "")), self.scope)
            if all(source.find(names) is not None for names in _aliases(skeleton)):
                return source
        return MemorySource(self._loaded(), self.scope)

    def _loaded(self) -> dict[str, np.ndarray]:
        """Load the model through transformers and return its tensors as float32 arrays."""
        folder, file = (self.path.parent, self.path.name) if self.is_gguf else (self.path, None)
        extra: dict[str, Any] = {"gguf_file": file} if file else {}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
        except (OSError, ValueError, RuntimeError) as error:
            raise ExportError(f"{self.name} can't be loaded by transformers: {error}") from error
        return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the architecture's config and the bytes of its files' beginnings: which target this is."""
        facts = {key: value for key, value in self.config.to_dict().items() if key not in _VOLATILE_KEYS}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for path in [self.path] if self.is_gguf else sorted(self.path.glob("*.safetensors")):
            digest.update(str(path.stat().st_size).encode())
            with path.open("rb") as stream:
                digest.update(stream.read(2**20))
        return digest.hexdigest()

    def write_tokenizer(self, folder: Path) -> Path | None:
        """Put the tokenizer's files into a folder; return `tokenizer.json`, None where there is none."""
        if self.is_gguf:
            _gguf_tokenizer(self.path).save_pretrained(folder)
        else:
            for name in TOKENIZER_FILES:
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, folder / name)
            if not (folder / "tokenizer.json").is_file():
                self._convert_slow_tokenizer(folder)
        path = folder / "tokenizer.json"
        return path if path.is_file() else None

    def _convert_slow_tokenizer(self, folder: Path) -> None:
        known = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
        if any((self.path / name).is_file() for name in known):
            AutoTokenizer.from_pretrained(self.path).save_pretrained(folder)


def open_checkpoint(model: str, scope: str = "") -> Checkpoint:
    """Return the checkpoint that a folder, hub id or GGUF path names.

    Args:
        scope: put in front of its tensors' keys, to tell two checkpoints of one bundle apart.

    Raises:
        ExportError: there is none, or it is not a decoder that can be exported (named, with the reason).
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    elif path.is_dir():
        config = _folder_config(path, model)
    elif path.exists() or path.suffix == ".gguf" or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ExportError(
            f"{model} is neither a model folder nor a GGUF file; give one of these, or a hub id like owner/name"
        )
    else:
        path = _from_hub(model)
        config = _folder_config(path, model)
    config = config.get_text_config()
    _refuse(config, model)
    return Checkpoint(model, path, config, scope)


def tokenizer_fingerprint(tokenizer_json: Path | None) -> str:
    """Return the sha256 of a tokenizer's token-to-id map; two models with equal maps can share tokens."""
    if tokenizer_json is None:
        return hashlib.sha256(b"no tokenizer").hexdigest()
    vocab = Tokenizer.from_file(str(tokenizer_json)).get_vocab(with_added_tokens=True)
    return hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()


def eos_ids(checkpoint: Checkpoint, folder: Path) -> tuple[int, ...]:
    """Return the ids that end a text, from the generation config where it names them."""
    path = folder / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    found = checkpoint.config.eos_token_id if found is None else found
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _folder_config(path: Path, model: str) -> PretrainedConfig:
    if not (path / "config.json").is_file():
        raise ExportError(f"{model} has no config.json; give a Hugging Face model folder, a hub id or a GGUF file")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise ExportError(f"{model} has no *.safetensors weights; fetch the whole checkpoint")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        raise ExportError(f"{model}: transformers does not know this model ({error})") from error
    return config


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # network, authentication and naming errors of the hub client
        raise ExportError(
            f"{model} is not a folder here and could not be fetched from the hub ({type(error).__name__}); "
            "check the name and the connection, or give a folder"
        ) from error


def _refuse(config: PretrainedConfig, model: str) -> None:
    name = (config.architectures or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{model} is {name}, an encoder-decoder; only decoder-only models can be exported")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ExportError(
            f"{model} is {name}, which transformers has no causal language model for; only decoders can be exported"
        )
    quantised = getattr(config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if quantised is not None and str(method).rpartition(".")[2].lower() != "gguf":
        raise ExportError(
            f"{model} is quantised with {method}; give the unquantised checkpoint and --precision int4 or int8"
        )
    if int(getattr(config, "num_hidden_layers", 0)) < 2:
        raise ExportError(f"{model} has fewer than 2 layers; there is nothing to split")


def _aliases(model: torch.nn.Module) -> list[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values()]


def _gguf_tokenizer(path: Path) -> Any:
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in _GGUF_DIGITS:
        byte_level = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    return tokenizer
