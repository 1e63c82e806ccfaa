"""Products with int4 and int8 weights on GPUs by mirror's own kernels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from mirror.bench.gpu_products import gated_half_model, open_session, product_model, random_weights
from mirror.targets import cuda
from tests.nvrtc import compile_log

# Outputs that no thread block divides, inputs that no step does, parts of the input, and a matrix of a real model.
SIZES = [(40, 64), (1000, 576), (576, 1536), (2048, 5120)]
OWN_ROWS = range(2, 17)  # ONNX Runtime takes the others


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "compute_80"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [(1000, 18), (5120, 544)])
@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_compiles_for_every_kind_of_gpu(
    architecture: str, bits: int, sizes: tuple[int, int], gated: bool
) -> None:
    """NVRTC needs no GPU."""
    outputs, blocks = sizes
    facts = {"BITS": bits, "TILES": 2, "ACROSS": 2, "ALONG": 8, "AHEAD": 1, "MIN_BLOCKS": 1, "PARTS": 3}
    sources = ("gated.cu", "products.cu") if gated else ("products.cu",)
    for row_tiles in (1, 2):
        given = {**facts, "ROW_TILES": row_tiles, "OUTPUTS": outputs, "BLOCKS": blocks, "GATED": int(gated)}
        log = compile_log(sources, architecture, given)
        assert "bytes spill stores" not in log or " 0 bytes spill stores" in log


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


def gated(product: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `silu(gate) * up` of a product's halves, `[rows, inner]`."""
    gate, up = np.split(product, 2, axis=-1)
    result: NDArray[np.float32] = gate / (1 + np.exp(-gate)) * up
    return result


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("sizes", SIZES)
def test_gated_products_are_those_of_the_matrix_and_independent_of_a_rows_place(
    sizes: tuple[int, int], bits: int
) -> None:
    if reason := cuda.cuda_missing():
        pytest.skip(reason)
    generator = np.random.default_rng(5)
    if bits == 16:
        matrix = (0.02 * generator.standard_normal(sizes, np.float32)).astype(np.float16)
        model, matrix = gated_half_model(matrix), matrix.astype(np.float32)
    else:
        blocks, scales = random_weights(*sizes, bits, seed=3)
        model, matrix = product_model([(blocks, scales)], bits, gated=True), dequantised(blocks, scales, bits)
    session, other = open_session(model, "own"), open_session(model, "onnxruntime")
    for rows in (1, 2, 8, 11, 16, 17, 100):
        x = (0.1 * generator.standard_normal((1, rows, sizes[1]), np.float32)).astype(np.float16)
        found, expected = session.run(None, {"x": x})[0], gated(x[0].astype(np.float32) @ matrix.T)
        assert found.shape == (1, rows, sizes[0] // 2)
        for given in (found, other.run(None, {"x": x})[0]):
            np.testing.assert_allclose(given[0], expected, rtol=0, atol=5e-3 * np.abs(expected).max())
        if bits != 16 and rows in OWN_ROWS:
            for row in (0, rows - 1):
                twice = session.run(None, {"x": x[:, [row, row]]})[0]
                np.testing.assert_array_equal(twice[0], found[0, [row, row]])
