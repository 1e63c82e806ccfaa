"""Markers, which tests this machine can run, how they share processes, and what some of them share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# torch's threads spin while they wait for each other: on busy cores two take twenty times the CPU time of one, and
# what it computes here is small. It reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL_DRAFT = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
# Files that join another one in its process: for the real model's bundle, or to have the GPU alone.
TOGETHER = {"test_exact_real": "test_hosts", "test_npu_default": "test_hosts", "test_gpu_memory": "test_devices"}
# Groups of tests that take a process half a minute or more: begun last, one would keep the other process waiting.
LONGEST = (
    "test_hosts",
    "test_exact_families",
    "test_sanitizers_find_nothing",
    "test_pinned_int4_gives_one_text_in_every_mode",
    "test_export",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs on an NVIDIA GPU; skipped where there is none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _skip_without_gpu(items)
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(_group(item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole groups, in the order of the items (`pytest --numprocesses 2`)."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)


def _group(nodeid: str) -> str:
    """Return the name that the tests of one process have in common: their file's, their own, or one of `TOGETHER`."""
    file, _, test = nodeid.partition("::")
    test = test.partition("[")[0]
    if test in LONGEST:
        return test
    name = Path(file).stem
    return TOGETHER.get(name, name)


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    from mirror.targets.cuda import cuda_missing

    missing = cuda_missing()
    if missing is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session", autouse=True)
def _each_architecture_is_traced_once() -> Iterator[None]:
    if "torch" not in sys.modules:  # no test of this session exports
        yield
        return
    from mirror.export import build
    from mirror.export.trace import remembering

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "trace", remembering(build.trace))
        yield


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
