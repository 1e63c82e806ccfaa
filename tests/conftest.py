"""Markers, which tests this machine can run, and the real model that some of them share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

MODEL_DRAFT = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on an NVIDIA GPU; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from mirror.targets.cuda import cuda_missing

    missing = cuda_missing()
    if missing is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2 in float32 with the shipped draft, exported once; half a gigabyte, removed when the tests are over."""
    if given := os.environ.get("MIRROR_HOSTS_BUNDLE"):
        yield Path(given)
        return
    pytest.importorskip("torch")
    from mirror.default_model import locate_model
    from mirror.errors import ExportError
    from mirror.export.build import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("smollm2")
    try:
        export_bundle(str(locate_model()), folder / "bundle", ExportOptions(draft=str(MODEL_DRAFT), max_length=512))
    except ExportError as error:
        if "not installed" in str(error):
            pytest.skip(str(error))
        raise
    yield folder / "bundle"
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target for distillation, made and taught once."""
    pytest.importorskip("torch")
    from tests.letters import make_model

    return make_model(tmp_path_factory.mktemp("distill") / "tiny")


@pytest.fixture(scope="session")
def letters_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that the tiny target answers."""
    pytest.importorskip("torch")
    from tests.letters import write_prompts

    return write_prompts(tmp_path_factory.mktemp("prompts") / "letters.jsonl")
