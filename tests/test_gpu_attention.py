"""Attention on GPUs by mirror's own kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from mirror.bench.gpu_attention import Attention, Heads, random_inputs
from mirror.targets import cuda
from mirror.targets.kernel_library import LIBRARY
from tests.nvrtc import compile_log

# A draft's, a 14B model's, one query head to a key head, and wide heads.
SIZES = [(9, 3, 64), (40, 8, 128), (4, 4, 128), (8, 1, 256)]
CAPACITY = 2048


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120", "compute_80"])
@pytest.mark.parametrize(("head", "group"), [(64, 3), (128, 5), (256, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_compiles_for_every_kind_of_gpu(architecture: str, head: int, group: int, masked: bool) -> None:
    """NVRTC needs no GPU."""
    for rotary in (0, 1):
        facts = {"HEAD": head, "GROUP": group, "ROTARY": rotary, "BIAS": int(masked)}
        log = compile_log(["attention.cu"], architecture, facts)
        assert "bytes spill stores" not in log or " 0 bytes spill stores" in log


def prepare() -> None:
    """Skip where there is no GPU, even if someone asked for these tests."""
    if reason := cuda.cuda_missing():
        pytest.skip(reason)
    ort.preload_dlls()


def run(session: Attention, inputs: dict[str, NDArray[Any]], past: int) -> tuple[NDArray[np.float32], ...]:
    """Return what one layer gives, its keys and its values."""
    binding, values = session.bind(inputs, past)
    session.session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return tuple(values[name].numpy()[0].astype(np.float32) for name in ("y0", "k0", "v0"))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_attention_is_that_of_onnxruntime(sizes: tuple[int, int, int], masked: bool) -> None:
    prepare()
    heads = Heads(*sizes, CAPACITY)
    for past in (0, 1, 63, 64, 500, 1700):
        for rows in (1, 2, 8, 16, 300) if masked else (1, 2, 8, 16, 64):
            inputs = dict(random_inputs(heads, rows, past, masked=masked))
            if not masked and past == 0:
                inputs["total"] = np.array(rows, np.int32)  # what ONNX Runtime knows a prompt's first pass by
            found, expected = (
                run(Attention(heads, 1, library, masked=masked), inputs, past) for library in (LIBRARY, None)
            )
            for mine, theirs, tolerance in zip(found, expected, (4e-3, 2e-3, 0), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
            assert np.abs(found[1][:, past + rows :]).max(initial=0) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_queries_keys_and_values_may_come_apart(masked: bool) -> None:
    """As where a model norms them."""
    prepare()
    heads = Heads(9, 3, 64, CAPACITY)
    for rows in (1, 8):
        found, expected = (
            run(
                Attention(heads, 1, LIBRARY, masked=masked, apart=apart),
                dict(random_inputs(heads, rows, 500, masked=masked, apart=apart)),
                500,
            )
            for apart in (True, False)
        )
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
def test_a_positions_result_is_the_same_in_every_row_of_a_window(sizes: tuple[int, int, int]) -> None:
    prepare()
    heads, rows = Heads(*sizes, CAPACITY), 8
    session = Attention(heads, 1, LIBRARY, masked=False)
    for past in (5, 60, 500, 1700):
        inputs = dict(random_inputs(heads, 2 * rows, past, masked=False))
        binding, values = session.bind({**inputs, "x": inputs["x"][:, :rows]}, past)
        seen: dict[int, NDArray[Any]] = {}
        for start in (0, 3, 7, 8):
            # The caches stay: rows before the window were written by passes before this one.
            values["x"].update_inplace(np.ascontiguousarray(inputs["x"][:, start : start + rows]))
            values["filled"].update_inplace(np.array([past + start + rows - 1], np.int32))
            session.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            for row, result in enumerate(values["y0"].numpy()[0]):
                np.testing.assert_array_equal(seen.setdefault(start + row, result), result)
        assert len(seen) == 2 * rows
