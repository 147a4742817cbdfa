"""W [N, K] -> S(q(W)) and S(q(W))^T, packed in the SM90 layout of cuSPARSELt for 8-bit types, in one read (Triton).

The definition is `ops.reference.float8.sparsify`; the results are equal bit for bit. Bytes moved for 16-bit W: 2 read
and 2 * 0.625 written an element. One program handles a 64x64 block of W, as in `sparsify`.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..vocabulary import FLOAT8, KERNEL_TILE
from . import layout_float8, masks, tiles
from .launch import launch
from .memory import empty_packed
from .sparsify import choose, scaled, zero_unkept

_WARPS = 4


@triton.jit
def _sparsify_kernel(
    w_ptr,
    scale_ptr,
    packed_ptr,
    packed_t_ptr,
    N,
    K,
    stride_wn,
    stride_wk,
    GREEDY: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """packed_ptr, packed_t_ptr: int16, two values each, metadata after N * K / 4 of them."""
    n = tl.program_id(1) * 64
    k = tl.program_id(0) * 64
    scale = tl.load(scale_ptr)
    x = tiles.load(w_ptr, n, k, N, K, stride_wn, stride_wk, False)
    mask = choose(x, GREEDY)
    if GREEDY:
        x = zero_unkept(x, mask)
        mask = masks.fill(mask)
    if FACTOR != 1.0:
        x = scaled(x, FACTOR)
    R = tl.arange(0, 16)[:, None]
    C = tl.arange(0, 16)[None, :]
    metadata = (N.to(tl.int64) * K) >> 2

    pairs, codes = layout_float8.compress(x, mask, 1, 4, scale)
    values = packed_ptr + n.to(tl.int64) * (K >> 2) + (k >> 2)
    for i in tl.static_range(4):
        tl.store(values + (4 * R + i) * (K >> 2) + C, pairs[i])
    block = packed_ptr + metadata + ((n.to(tl.int64) * K + k * 64) >> 4)
    layout_float8.store_metadata(block.to(tl.pointer_type(tl.int32), bitcast=True), codes)

    pairs, codes = layout_float8.compress(x, mask >> 16, 4, 1, scale)
    values = packed_t_ptr + k.to(tl.int64) * (N >> 2) + (n >> 2)
    for j in tl.static_range(4):
        tl.store(values + (4 * C + j) * (N >> 2) + R, pairs[j])
    block = packed_t_ptr + metadata + ((k.to(tl.int64) * N + n * 64) >> 4)
    layout_float8.store_metadata(block.to(tl.pointer_type(tl.int32), bitcast=True), tl.trans(codes))


def sparsify_float8(weight: Tensor, scale: Tensor, mask: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pack S(q(factor * W)) and its transpose; `ops.reference.float8.sparsify` defines the result.

    weight: [N, K] float16, bfloat16 or float32, N and K multiples of 64, any strides, on the current device, as is
    scale: one float32. The mask is chosen on `weight` as stored.
    """
    rows, cols = weight.shape
    # Two allocations: a backward that keeps packed_t must not keep packed with it.
    packed, packed_t = empty_packed(rows, cols, FLOAT8), empty_packed(cols, rows, FLOAT8)
    launch(
        _sparsify_kernel,
        (cols // KERNEL_TILE, rows // KERNEL_TILE),
        (weight, scale, packed, packed_t),
        (rows, cols, *weight.stride()),
        (mask == "greedy", factor),
        _WARPS,
    )
    return packed.view(FLOAT8), packed_t.view(FLOAT8)
