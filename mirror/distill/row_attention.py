"""Decode attention that reads only the cache slots a row has filled: a Triton kernel, for CUDA.

One program serves one KV head of one row, with all its query heads, so that no key is read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SLOTS = 64  # cache slots per step of a program's loop
_LEAST_QUERIES = 16  # rows that the matrix unit wants at least


def row_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Return the attention of one query row over each row's filled slots, `[rows, kv_heads, group, head_dim]`.

    Args:
        query: `[rows, kv_heads, group, head_dim]`, `head_dim` a power of two from 16 on.
        keys: `[rows, kv_heads, capacity, head_dim]`, contiguous; values alike.
        lengths: int64 `[rows]`; slots `0..lengths` are seen, the one just written included.
        scale: what scores are multiplied with.
    """
    rows, heads, group, dim = query.shape
    query = query.contiguous()
    out = torch.empty_like(query)
    padded = max(_LEAST_QUERIES, triton.next_power_of_2(group))
    _kernel[(rows, heads)](query, keys, values, lengths, out, scale, heads, group, keys.shape[2], padded, dim, _SLOTS)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: ANN202 (a kernel's arguments are pointers)
    query,  # noqa: ANN001
    keys,  # noqa: ANN001
    values,  # noqa: ANN001
    lengths,  # noqa: ANN001
    out,  # noqa: ANN001
    scale,  # noqa: ANN001
    heads,  # noqa: ANN001
    group,  # noqa: ANN001
    capacity,  # noqa: ANN001
    queries: tl.constexpr,
    dim: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0)
    place = row.to(tl.int64) * heads + tl.program_id(1)
    count = (tl.load(lengths + row) + 1).to(tl.int32)
    members, dims, slots = tl.arange(0, queries), tl.arange(0, dim), tl.arange(0, width)
    mine = (place * group + members[:, None]) * dim + dims[None, :]
    q = tl.load(query + mine, mask=members[:, None] < group, other=0.0)  # [queries, dim]
    best = tl.full([queries], float("-inf"), tl.float32)
    total = tl.zeros([queries], tl.float32)
    found = tl.zeros([queries, dim], tl.float32)
    for start in range(0, count, width):
        at = start + slots
        where = (place * capacity + at[:, None]) * dim + dims[None, :]
        k = tl.load(keys + where, mask=at[:, None] < count, other=0.0)  # [width, dim]
        v = tl.load(values + where, mask=at[:, None] < count, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [queries, width]
        scores = tl.where(at[None, :] < count, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp(best - higher)
        odds = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(odds, 1)
        found = found * shrink[:, None] + tl.dot(odds.to(v.dtype), v, input_precision="ieee")
        best = higher
    result = found / total[:, None]
    tl.store(out + mine, result.to(out.dtype.element_ty), mask=members[:, None] < group)
