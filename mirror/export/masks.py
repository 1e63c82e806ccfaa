"""Attention masks, computed inside the graph from the cursor's small integers.

Every mask is additive, `[1, 1, width, keys]`: 0 where a row sees a key, a large negative number where
it does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from mirror.bundle import Form
from mirror.export.emit import Emitter

_HIDDEN = {ir.DataType.FLOAT: -1e30, ir.DataType.FLOAT16: -6e4, ir.DataType.BFLOAT16: -1e30}


@dataclass
class Masks:
    """The masks of one segment, one per attention window, made on first use.

    With `branches` a row sees the slots below its `row_visible` and those of its own branch; without,
    the mask is causal.
    """

    emit: Emitter
    form: Form
    branches: bool
    dtype: ir.DataType
    capacity: ir.Value | None = None
    _made: dict[int, ir.Value] = field(default_factory=dict)

    def get(self, window: int) -> ir.Value | None:
        """Return the mask for layers whose attention reaches `window` positions back (0: all).

        None where the attention operator's own causality is enough.
        """
        if self.form is Form.INPLACE and not self.branches:
            return None
        if window not in self._made:
            self._made[window] = self._additive(
                self._inplace(window) if self.form is Form.INPLACE else self._rows(window)
            )
        return self._made[window]

    def _inplace(self, window: int) -> ir.Value:
        """Return bool `[width, total]`: keys are the buffer's first `total_sequence_length` slots.

        That is the only number that leaves the host; passes that are given the same can be recorded.
        """
        emit = self.emit
        slots = emit.range_to(emit.input("total_sequence_length"))
        owners = emit.op("Gather", [emit.input("slot_branch"), slots], {"axis": 0})
        return emit.op("Or", [self._trunk(slots, window), self._same_branch(owners)])

    def _rows(self, window: int) -> ir.Value:
        """Return bool `[width, capacity + width]`: keys are the buffer's slots, then this pass's rows."""
        emit = self.emit
        assert self.capacity is not None
        past = emit.input("past_length")
        slots = emit.range(self.capacity)
        filled = emit.row(emit.op("Less", [slots, past]))
        rows = emit.range(emit.width())
        new_slots = emit.op("Add", [rows, past])
        earlier = emit.op("LessOrEqual", [emit.row(rows), emit.column(rows)])
        old = emit.op("And", [filled, self._trunk(slots, window)])
        new = self._trunk(new_slots, window)
        if self.branches:
            old = emit.op("Or", [old, emit.op("And", [filled, self._same_branch(emit.input("slot_branch"))])])
            new = emit.op("Or", [new, self._same_branch(emit.input("row_branch"))])
        return emit.op("Concat", [old, emit.op("And", [earlier, new])], {"axis": 1})

    def _trunk(self, slots: ir.Value, window: int) -> ir.Value:
        """Return bool `[width, slots]` or `[width, 1]`: trunk slots that a row sees."""
        emit = self.emit
        conditions = []
        if self.branches:
            conditions.append(emit.op("Less", [emit.row(slots), emit.column(emit.input("row_visible"))]))
        if window:
            positions = emit.cast(emit.reshape(emit.input("position_ids"), -1), ir.DataType.INT32)
            oldest = emit.op("Sub", [positions, emit.int32(window)])
            conditions.append(emit.op("Greater", [emit.row(slots), emit.column(oldest)]))
        if not conditions:
            every_row = emit.column(emit.range(emit.width()))
            conditions.append(emit.op("GreaterOrEqual", [every_row, emit.int32(0)]))
        return conditions[0] if len(conditions) == 1 else emit.op("And", conditions)

    def _same_branch(self, owners: ir.Value) -> ir.Value:
        return self.emit.op("Equal", [self.emit.row(owners), self.emit.column(self.emit.input("row_branch"))])

    def _additive(self, seen: ir.Value) -> ir.Value:
        emit = self.emit
        dtype = self.dtype.numpy()
        shown = emit.constant("mask_seen", np.array(0, dtype))
        hidden = emit.constant("mask_hidden", np.array(_HIDDEN[self.dtype], dtype))
        return emit.op("Unsqueeze", [emit.op("Where", [seen, shown, hidden]), emit.int64s(0, 1)])
