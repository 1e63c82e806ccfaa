"""Products with int4 and int8 weights on GPUs by mirror's own kernels."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from mirror.bench.gpu_products import open_session, product_model, random_weights
from mirror.targets import cuda, kernel_library

SOURCE = Path(__file__).parents[1] / "hosts" / "kernels" / "cuda" / "products.cu"
# Outputs that no thread block divides, inputs that no step does, parts of the input, and a matrix of a real model.
SIZES = [(40, 64), (1000, 576), (576, 1536), (2048, 5120)]
OWN_ROWS = range(2, 17)  # ONNX Runtime takes the others


def test_without_a_driver_the_library_says_what_is_missing() -> None:
    if cuda.driver_gpus():
        pytest.skip("this machine has a driver")
    assert "no NVIDIA driver (libcuda.so.1); install it" in str(kernel_library.products_missing())
    assert not kernel_library.chosen_products()
    with pytest.raises(Exception, match=r"no NVIDIA driver"):
        ort.SessionOptions().register_custom_ops_library(str(kernel_library.LIBRARY))


def test_the_variable_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "products_missing", lambda: None)
    assert kernel_library.chosen_products()
    monkeypatch.setenv(kernel_library.VARIABLE, "off")
    assert not kernel_library.chosen_products()


def test_a_package_built_without_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "_library", lambda: None)
    assert "install a C++ compiler" in str(kernel_library.products_missing())
    monkeypatch.setattr(kernel_library, "_library", lambda: object())
    assert "Linux alone" in str(kernel_library.products_missing())


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "compute_80"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [(1000, 18), (5120, 544)])
def test_the_kernel_compiles_for_every_kind_of_gpu(architecture: str, bits: int, sizes: tuple[int, int]) -> None:
    """NVRTC needs no GPU."""
    outputs, blocks = sizes
    facts = {"BITS": bits, "TILES": 2, "ACROSS": 2, "ALONG": 8, "AHEAD": 1, "MIN_BLOCKS": 1, "PARTS": 3}
    for row_tiles in (1, 2):
        given = {**facts, "ROW_TILES": row_tiles, "OUTPUTS": outputs, "BLOCKS": blocks}
        log = _compiled(architecture, given)
        assert "bytes spill stores" not in log or " 0 bytes spill stores" in log


def _compiled(architecture: str, facts: dict[str, int]) -> str:
    """Return what the compiler said."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    libraries = [path for folder in folders for path in folder.glob("**/libnvrtc.so.*")]
    if not libraries:
        pytest.skip("nvidia-cuda-nvrtc isn't installed")
    library, program = ctypes.CDLL(str(libraries[0])), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.read_bytes(), b"products.cu", 0, None, None)
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


def dequantised(blocks: NDArray[np.uint8], scales: NDArray[np.float16], bits: int) -> NDArray[np.float32]:
    """Return a matrix, `[outputs, inputs]`, each number rounded to float16 as kernels do."""
    values = np.stack([blocks & 15, blocks >> 4], axis=-1) if bits == 4 else blocks
    numbers = values.reshape(*blocks.shape[:2], 32).astype(np.float16) - np.float16(1 << (bits - 1))
    return (numbers * scales[..., None]).astype(np.float32).reshape(blocks.shape[0], -1)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_those_of_the_matrix_and_independent_of_a_rows_place(sizes: tuple[int, int], bits: int) -> None:
    if reason := cuda.cuda_missing():
        pytest.skip(reason)
    blocks, scales = random_weights(*sizes, bits, seed=3)
    model = product_model([(blocks, scales)] * 2, bits)
    session, other = open_session(model, "own"), open_session(model, "onnxruntime")
    generator = np.random.default_rng(4)
    for rows in (1, 2, 8, 11, 16, 17, 100):
        x = generator.standard_normal((1, rows, sizes[1]), np.float32).astype(np.float16)
        first, second = session.run(None, {"x": x})
        expected = x[0].astype(np.float32) @ dequantised(blocks, scales, bits).T
        largest = np.abs(expected).max()
        np.testing.assert_allclose(first[0], expected, rtol=0, atol=2e-3 * largest)
        np.testing.assert_array_equal(first, second)
        if rows not in OWN_ROWS:
            np.testing.assert_array_equal(first, other.run(["y0"], {"x": x})[0])
            continue
        for row in (0, rows - 1):
            twice = session.run(["y0"], {"x": x[:, [row, row]]})[0]
            np.testing.assert_array_equal(twice[0], first[0, [row, row]])
