"""Markers, and which tests this machine can run."""

from __future__ import annotations

import pytest


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
