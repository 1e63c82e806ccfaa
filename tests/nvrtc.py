"""NVRTC, which compiles for GPUs that aren't there."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "hosts" / "kernels" / "cuda"


def compile_log(sources: Sequence[str], architecture: str, facts: Mapping[str, int]) -> str:
    """Return what the compiler said of some files of the kernels, one behind the other and all behind numbers.cu."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    libraries = [path for folder in folders for path in folder.glob("**/libnvrtc.so.*")]
    if not libraries:
        pytest.skip("nvidia-cuda-nvrtc isn't installed")
    library, program = ctypes.CDLL(str(libraries[0])), ctypes.c_void_p()
    text = b"".join((SOURCES / source).read_bytes() for source in ("numbers.cu", *sources))
    library.nvrtcCreateProgram(ctypes.byref(program), text, sources[-1].encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v"]
    words = [word.encode() for word in (*options, *(f"-D{name}={value}" for name, value in facts.items()))]
    result = library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert result == 0, log.value.decode()
    return log.value.decode()
