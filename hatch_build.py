"""Builds the package's kernels (hosts/kernels) where there is a C++ compiler for them.

Without one the package works all the same: ONNX Runtime runs drafts on the CPU then, and `mirror devices` says so.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "mirror/targets/libmirror_kernels.so"

_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"]
# Each file runs on CPUs that have what it is compiled for, and is asked for on no other.
_FLAGS = {
    "draft_pass.cpp": [],
    "choice.cpp": [],
    "avx2.cpp": ["-mavx2", "-mfma", "-mavxvnni"],
    "avx512.cpp": _AVX512,
    "amx.cpp": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}
# Operators for GPUs, whose kernels travel as text in the library and are compiled for the GPU at hand.
_GPU_FILES = tuple(
    f"cuda/{name}.cpp" for name in ("attention", "cuts", "driver", "inputs", "operators", "products", "workspace")
)
_COMMON = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    # GCC 12 warns about its own header.
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]


class KernelsHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, and to the source tree of an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless this machine is of another kind; a failure is told and ends nothing."""
        library = Path(self.root, LIBRARY)
        library.unlink(missing_ok=True)
        if self.target_name != "wheel" or platform.machine().lower() not in ("x86_64", "amd64"):
            return
        compiler = _compiler()
        if compiler is None or sys.platform == "win32":
            self.app.display_warning("mirror's CPU kernels are left out: they want g++ or clang++ on Linux or macOS")
            return
        try:
            _compile(compiler, Path(self.root, "hosts", "kernels"), library)
        except subprocess.CalledProcessError as error:
            self.app.display_warning(f"mirror's CPU kernels are left out: {compiler} said {error.stderr}")
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compile(compiler: str, sources: Path, library: Path) -> None:
    def run(*arguments: str) -> None:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True)

    files: dict[str, list[str]] = dict(_FLAGS)
    if sys.platform == "linux":
        files |= {name: [f'-DMIRROR_CUDA_FOLDER="{sources / "cuda"}"'] for name in _GPU_FILES}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        objects = {name: str(Path(folder, f"{Path(name).name}.o")) for name in files}
        jobs = [
            pool.submit(run, *_COMMON, *flags, "-c", str(sources / name), "-o", objects[name])
            for name, flags in files.items()
        ]
        for job in jobs:
            job.result()
        whole = Path(folder, library.name)
        run("-shared", "-o", str(whole), *objects.values(), "-pthread", "-ldl")
        # Moved in place as one: a process that has the old one loaded keeps it.
        beside = library.with_suffix(".new")
        shutil.copy(whole, beside)
        os.replace(beside, library)
