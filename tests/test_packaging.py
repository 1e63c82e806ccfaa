"""What the package promises to pip: a light runtime, extras for the rest, files that travel along."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "openvino", "accelerate", "gguf", "optimum"}


def needs(requirement: str) -> set[str]:
    """Return everything that a requirement installs on this machine, itself included."""
    found: set[str] = set()
    waiting = [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += [Requirement(text) for text in metadata.requires(name) or []]
    return found


def extra(name: str) -> list[Requirement]:
    return [Requirement(text) for text in PROJECT["optional-dependencies"][name]]


def test_a_light_install_brings_no_torch_directly_or_by_the_way() -> None:
    installed = set().union(*(needs(requirement) for requirement in PROJECT["dependencies"]))
    assert {"numpy", "onnxruntime", "tokenizers"} <= installed
    assert installed & HEAVY == set()


def test_every_requirement_has_an_upper_bound() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    own = [item for item in requirements if item.name == PROJECT["name"] or item.name.startswith("types-")]
    unbounded = [item.name for item in requirements if not any("<" in part.operator for part in item.specifier)]
    assert set(unbounded) == {item.name for item in own}


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["export"]])
def test_what_is_installed_here_lies_within_the_bounds(requirement: str) -> None:
    wanted = Requirement(requirement)
    assert metadata.version(wanted.name) in wanted.specifier


def test_torch_is_bounded_below_the_builds_that_bring_cuda() -> None:
    torch = next(item for item in extra("export") if item.name == "torch")
    assert "2.13" in torch.specifier
    assert "2.14" not in torch.specifier


def test_the_command_is_where_the_entry_point_says() -> None:
    module, _, name = PROJECT["scripts"]["mirror"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_schema_and_the_typing_mark_travel_with_the_package() -> None:
    for name in ("bundle.schema.json", "py.typed"):
        assert resources.files("mirror").joinpath(name).is_file()


def test_one_version_everywhere() -> None:
    import mirror
    from mirror.version import __version__

    assert mirror.__version__ == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_optimum_keeps_its_namespace() -> None:
    """A file `__init__.py` here would hide optimum itself."""
    assert list((ROOT / "optimum").rglob("__init__.py")) == []


def test_optimum_cli_export_mirror_takes_the_options_of_mirror_export(tmp_path: Path) -> None:
    pytest.importorskip("optimum.commands.optimum_cli")
    code = "import sys; from optimum.commands.optimum_cli import main; main()"

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "export", "mirror", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    assert "--exit-layer" in call("--help").stdout
    failed = call(str(tmp_path / "nowhere"), "-o", str(tmp_path / "bundle"), "--gamma", "3")
    assert failed.returncode == 1
    assert "error: " in failed.stderr
    wrong = call(str(tmp_path), "-o", str(tmp_path / "bundle"), "--gamma", "none")
    assert wrong.returncode == 2
