"""Who may import whom. The rules are those of docs/design.md; a new edge has to be allowed here first."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import mirror

PACKAGE = Path(mirror.__file__).parent
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino"}
SHARED = {"bundle", "errors", "prompt_files", "version"}
COMMAND_LINE = {"__main__", "cli", "console", "answering", "default_model", "summary"}
# Modules of `runtime` that compute on numbers alone.
PURE = {
    "acceptance",
    "candidates",
    "contenders",
    "noise",
    "options",
    "records",
    "sampling",
    "sequence",
    "spans",
    "statistics",
    "stopping",
    "trace",
}
TEXT = {"text": "tokenizers", "chat_template": "jinja2"}


@dataclass(frozen=True)
class Import:
    """One import statement: who, whom, and whether it runs when the importer is loaded."""

    importer: str  # dotted, without the leading `mirror.`
    imported: str
    at_load: bool

    @property
    def part(self) -> str:
        return self.importer.split(".")[0]

    @property
    def top(self) -> str:
        return self.imported.split(".")[0]

    @property
    def mirror_part(self) -> str | None:
        """The part of this package that is imported, None for a module from elsewhere."""
        names = self.imported.split(".")
        return None if names[0] != "mirror" else names[1] if len(names) > 1 else "__init__"


@functools.cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for path in sorted(PACKAGE.rglob("*.py")) for found in imports_of(path))


def imports_of(path: Path) -> Iterator[Import]:
    importer = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, at_load in walk(tree, True):
        for name in names_in(node):
            if name.split(".")[0] not in sys.stdlib_module_names and name != "__future__":
                yield Import(importer, name, at_load)


def walk(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node, and whether it runs at load: outside functions and `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield child, at_load
        yield from walk(child, at_load and not lazy and not typing_only)


def names_in(node: ast.AST) -> list[str]:
    """Return the modules of an import statement; `from mirror.targets import cpu` counts as mirror.targets.cpu too."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.module is not None, "imports are absolute"
    submodules = [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module, *(name for name in submodules if is_module(name))]


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return name.startswith("mirror.") and (path.is_dir() or path.with_suffix(".py").is_file())


def allowed_parts(found: Import) -> set[str]:
    """Return the parts of this package that an import statement may name."""
    part = found.part
    if part in SHARED:
        return {"errors", "version"}
    if part == "export":
        return SHARED | {"export"}
    if part == "distill":
        return SHARED | {"export", "distill"}
    if part == "targets":
        return SHARED | {"targets"}
    if part == "runtime":
        return SHARED | {"runtime", "targets"}
    if part == "compile":
        return SHARED | {"compile", "runtime", "targets", "bench"} | (set() if found.at_load else {"export"})
    if part in COMMAND_LINE and found.at_load:
        return SHARED | COMMAND_LINE
    if part == "plan":
        return SHARED | {"plan", "runtime"}
    if part == "tune":
        return SHARED | {"tune", "runtime", "targets", "bench"} | (set() if found.at_load else {"export"})
    inner = {"__init__", "export", "distill", "runtime", "targets", "bench", "tune", "compile", "plan"}
    return SHARED | COMMAND_LINE | inner


def test_the_walk_finds_the_imports() -> None:
    found = {(item.importer, item.imported, item.at_load) for item in all_imports()}
    assert ("bundle", "mirror.errors", True) in found
    assert ("bundle", "jsonschema", False) in found
    assert ("targets.onnxruntime_session", "onnxruntime", True) in found


def test_parts_import_only_the_parts_they_may() -> None:
    wrong = [item for item in all_imports() if item.mirror_part and item.mirror_part not in allowed_parts(item)]
    assert wrong == []


def test_no_part_imports_the_command_line() -> None:
    inner = [item for item in all_imports() if item.part not in COMMAND_LINE]
    assert [item for item in inner if item.mirror_part in COMMAND_LINE] == []


def test_the_runtime_gets_its_devices_passed_in() -> None:
    """Only the engine's door opens devices by name; the rest knows their protocol."""
    runtime = [item for item in all_imports() if item.part == "runtime" and item.mirror_part == "targets"]
    others = [item for item in runtime if item.imported not in ("mirror.targets", "mirror.targets.base")]
    assert others == []
    doors = {item.importer for item in runtime if item.imported == "mirror.targets" and item.at_load}
    openers = {item.importer for item in runtime if item.imported == "mirror.targets" and not item.at_load}
    assert doors == set()
    assert openers <= {"runtime.engine"}


def test_pure_modules_import_numpy_alone() -> None:
    for name in PURE:
        assert (PACKAGE / "runtime" / f"{name}.py").is_file(), f"{name} is gone: update PURE"
    pure = [item for item in all_imports() if item.importer in {f"runtime.{name}" for name in PURE}]
    assert [item for item in pure if item.mirror_part is None and item.top != "numpy"] == []
    inside = {f"mirror.runtime.{name}" for name in PURE} | {"mirror.errors", "mirror.runtime"}
    assert [item for item in pure if item.mirror_part and item.imported not in inside] == []


def test_the_runtime_knows_numpy_and_the_text_libraries() -> None:
    for item in all_imports():
        if item.part == "runtime" and item.mirror_part is None:
            allowed = {"numpy", TEXT.get(item.importer.removeprefix("runtime."), "numpy")}
            assert item.top in allowed, item


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_stay_in_their_parts(library: str) -> None:
    allowed = {"export", "distill", "bench"} | ({"targets"} if library in ("onnxruntime", "openvino") else set())
    users = {item.importer for item in all_imports() if item.top == library}
    assert {name for name in users if name.split(".")[0] not in allowed} == set()
    assert "targets.base" not in users


def test_the_command_line_loads_nothing_but_click() -> None:
    loaded = [item for item in all_imports() if item.part in COMMAND_LINE and item.at_load]
    assert {item.top for item in loaded} == {"click", "mirror"}


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after running some code."""
    script = f"{code}\nimport sys\nprint('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def from_elsewhere(modules: set[str]) -> set[str]:
    # Editable installs and coverage start files load modules of their own; they are in the bare set.
    return modules - modules_after("") - set(sys.stdlib_module_names) - {"mirror"}


def test_importing_mirror_loads_nothing_else() -> None:
    assert from_elsewhere(modules_after("import mirror")) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["export", "--help"], ["--version"]])
def test_help_loads_nothing_but_click(arguments: list[str]) -> None:
    code = (
        "import contextlib, io\nfrom mirror.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()):\n    main({arguments!r}, standalone_mode=False)"
    )
    assert from_elsewhere(modules_after(code)) <= {"click", "colorama"}
