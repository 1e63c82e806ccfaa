"""The greatest logits of a row, found by blocks.

`TopK` and `ArgMax` walk a whole vocabulary one number at a time: on ONNX Runtime's CPU `TopK` of 8 rows of 49,152
takes 0.56 ms, `ArgMax` of 64 rows 5 to 7 ms. A maximum per block is fast, and the k blocks with the greatest
maxima hold the k greatest numbers: 0.05 and 0.6 ms. On an H100, where both are quick (0.05 and 0.02 ms), the
detour costs 0.05 ms.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mirror.export.emit import Emitter

BLOCK = 128  # divides most vocabularies
_SORTED_AT_ONCE = 512  # CUDA's TopK sorts so many numbers in one step
_LEAST_BLOCKS = 16  # fewer aren't worth the detour
_LOWEST = np.float32(-3e38)


def greatest(emit: Emitter, numbers: ir.Value, size: int, count: int) -> tuple[ir.Value, ir.Value]:
    """Return the `count` greatest of each row, in falling order, and their places.

    Args:
        numbers: float32 `[1, rows, size]`.
        count: at most `size`.

    Returns:
        float32 and int64 `[1, rows, count]`. Of equal numbers any may come first.
    """
    blocks = -(-size // BLOCK)
    if blocks < max(_LEAST_BLOCKS, count) or count > BLOCK:
        return _sorted(emit, numbers, size, count)
    padded = _padded(emit, numbers, size, blocks * BLOCK)
    _, chosen = _sorted(emit, _block_maxima(emit, padded, blocks), blocks, count)
    places = _places_in(emit, chosen, count)
    some = emit.op("GatherElements", [padded, places], {"axis": -1})
    values, at = _sorted(emit, some, count * BLOCK, count)
    return values, emit.op("GatherElements", [places, at], {"axis": -1})


def first_greatest(emit: Emitter, numbers: ir.Value, size: int) -> ir.Value:
    """Return the place of each row's greatest number, the first on ties, int64 `[1, rows]`.

    Args:
        numbers: float32 `[1, rows, size]`.
    """
    blocks = -(-size // BLOCK)
    if blocks < _LEAST_BLOCKS:
        return emit.op("ArgMax", [numbers], {"axis": -1, "keepdims": 0})
    padded = _padded(emit, numbers, size, blocks * BLOCK)
    maxima = _block_maxima(emit, padded, blocks)
    places = _places_in(emit, emit.op("ArgMax", [maxima], {"axis": -1, "keepdims": 1}), 1)
    some = emit.op("GatherElements", [padded, places], {"axis": -1})
    at = emit.op("ArgMax", [some], {"axis": -1, "keepdims": 1})
    return emit.op("Squeeze", [emit.op("GatherElements", [places, at], {"axis": -1}), emit.int64s(2)])


def first_greatest_plainly(emit: Emitter, numbers: ir.Value, size: int) -> ir.Value:
    """Return what `first_greatest` does, as int32, in operators that OpenVINO and NPUs are quick at.

    OpenVINO makes a slow full TopK of an ArgMax.

    Args:
        numbers: `[1, rows, size]`, of any float type.
    """
    if size % BLOCK or size // BLOCK < _LEAST_BLOCKS:
        return _place_of_greatest(emit, numbers, size)
    blocks = size // BLOCK
    block = _place_of_greatest(emit, _block_maxima(emit, numbers, blocks), blocks)
    before = emit.op("Mul", [emit.range(emit.size(numbers, 1)), emit.int32(blocks)])  # blocks of the rows above
    apart = emit.reshape(numbers, -1, BLOCK)
    lanes = emit.op("Gather", [apart, emit.op("Add", [before, block])], {"axis": 0})  # [1, rows, BLOCK]
    lane = _place_of_greatest(emit, lanes, BLOCK)
    return emit.op("Add", [emit.op("Mul", [block, emit.int32(BLOCK)]), lane])


def _place_of_greatest(emit: Emitter, numbers: ir.Value, size: int) -> ir.Value:
    """`[1, rows, size]` -> int32 `[1, rows]`; walks the numbers four times."""
    top = emit.op("ReduceMax", [numbers, emit.int64s(-1)], {"keepdims": 1})
    places = emit.constant(f"places_{size}", np.arange(size, dtype=np.int32))
    found = emit.op("Where", [emit.op("GreaterOrEqual", [numbers, top]), places, emit.int32(size - 1)])
    return emit.op("ReduceMin", [found, emit.int64s(-1)], {"keepdims": 0})


def _block_maxima(emit: Emitter, numbers: ir.Value, blocks: int) -> ir.Value:
    """`[1, rows, blocks * BLOCK]` -> `[1, rows, blocks]`."""
    apart = emit.reshape(numbers, 1, -1, blocks, BLOCK)
    return emit.op("ReduceMax", [apart, emit.int64s(-1)], {"keepdims": 0})


def _places_in(emit: Emitter, chosen: ir.Value, count: int) -> ir.Value:
    """Return the places of all numbers in some blocks, int64 `[1, rows, count]` -> `[1, rows, count * BLOCK]`."""
    lanes = emit.constant("block_lanes", np.arange(BLOCK, dtype=np.int64))
    starts = emit.op("Unsqueeze", [emit.op("Mul", [chosen, emit.int64s(BLOCK)]), emit.int64s(3)])
    return emit.reshape(emit.op("Add", [starts, lanes]), 1, -1, count * BLOCK)


def _sorted(emit: Emitter, numbers: ir.Value, size: int, count: int) -> tuple[ir.Value, ir.Value]:
    """Return the `count` greatest and their places: of the whole row, or of groups of it first."""
    groups = -(-size // _SORTED_AT_ONCE)
    width = -(-size // groups)
    if groups == 1 or groups * count >= size or width < count:
        values, places = emit.ops("TopK", [numbers, emit.int64s(count)], {"axis": -1, "sorted": 1}, count=2)
        return values, places
    apart = emit.reshape(_padded(emit, numbers, size, groups * width), 1, -1, groups, width)
    best, at = emit.ops("TopK", [apart, emit.int64s(count)], {"axis": -1, "sorted": 1}, count=2)
    starts = emit.constant(f"groups_{groups}_{width}", (np.arange(groups, dtype=np.int64) * width)[:, None])
    places = emit.reshape(emit.op("Add", [at, starts]), 1, -1, groups * count)
    values, chosen = _sorted(emit, emit.reshape(best, 1, -1, groups * count), groups * count, count)
    return values, emit.op("GatherElements", [places, chosen], {"axis": -1})


def _padded(emit: Emitter, numbers: ir.Value, size: int, wanted: int) -> ir.Value:
    if size == wanted:
        return numbers
    pads = emit.int64s(0, 0, 0, 0, 0, wanted - size)
    return emit.op("Pad", [numbers, pads, emit.constant("lowest", np.array(_LOWEST))])
