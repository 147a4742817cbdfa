"""dY [M, N] -> MVUE(dY)^T, packed in the SM90 layout of cuSPARSELt, or MVUE(dY) as it is, in one read (Triton).

The definition is `sparse_pass.reference_mvue`; the results are equal bit for bit, but for the payload of a NaN. Bytes
moved for 16-bit dY: 2 read and 1.125 written an element (2 for the dense one). One program handles a 64x64 block of
dY, one thread's tile is 4x4 as in `masks`: four groups, which take the four words of one philox call.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# As Inductor's code calls it: half the host time of torch.empty.
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from . import layout, tiles

_WARPS = 4


@triton.jit
def _size(x):
    """|x| as float32, NaN as NaN."""
    if x.dtype == tl.bfloat16:
        # The same as a cast, which Triton's interpreter gets wrong for denormals.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32).to(tl.int32, bitcast=True) << 16
        return (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    else:
        return tl.abs(x.to(tl.float32))


@triton.jit
def _draw(a, word):
    """a: four magnitudes, float32; word: of philox. Names as in `reference_mvue.choose`.

    Returns h, first, second, whether they would be the same, and the sure element, 4 if there is none.
    """
    half = (((a[0] + a[1]) + a[2]) + a[3]) * 0.5
    # At most one is sure.
    sure = tl.where(a[0] > half, 0, tl.where(a[1] > half, 1, tl.where(a[2] > half, 2, tl.where(a[3] > half, 3, 4))))
    any_sure = sure < 4
    e0 = tl.where(sure == 0, 0.0, a[0])
    e1 = e0 + tl.where(sure == 1, 0.0, a[1])
    e2 = e1 + tl.where(sure == 2, 0.0, a[2])
    e3 = e2 + tl.where(sure == 3, 0.0, a[3])
    h = tl.where(any_sure, e3, e3 * 0.5)
    h = tl.where(e3 < float("inf"), h, float("nan"))
    u = (word.to(tl.uint32, bitcast=True) >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
    t = u * h
    first = (t >= e0).to(tl.int32) + (t >= e1).to(tl.int32) + (t >= e2).to(tl.int32)
    second = (t >= e0 - h).to(tl.int32) + (t >= e1 - h).to(tl.int32) + (t >= e2 - h).to(tl.int32)
    second = tl.where(any_sure, sure, second)
    same = first == second
    second = tl.where(same, first ^ 1, second)
    return h, first, second, same, sure


@triton.jit
def _group(x, FIRST: tl.constexpr, word, DTYPE: tl.constexpr):
    """The group x[FIRST], x[FIRST + 4], ... -> its two kept values as a word, and its metadata nibble."""
    g = (x[FIRST], x[FIRST + 4], x[FIRST + 8], x[FIRST + 12])
    h, first, second, same, sure = _draw((_size(g[0]), _size(g[1]), _size(g[2]), _size(g[3])), word)
    left = tl.minimum(first, second)
    right = tl.maximum(first, second)
    # Of each, two bytes: as in `layout`, of the eight bytes of the group.
    selector = (left * 0x22 + 0x10) | ((right * 0x22 + 0x10) << 8)
    chosen = layout.permute_bytes(layout.pair_up(g[0], g[1], DTYPE), layout.pair_up(g[2], g[3], DTYPE), selector)
    # -2147450880 is 0x80008000, the signs.
    scaled = layout.pair_up(h, h, DTYPE) | (chosen & -2147450880)
    sure_bits = tl.where(left == sure, 0xFFFF, 0) | tl.where(right == sure, -65536, 0)
    words = (chosen & sure_bits) | (scaled & ~sure_bits)
    # The neighbour of an element that was drawn twice is zero.
    zeroed = tl.where(same, tl.where(second == left, -65536, 0xFFFF), -1)
    return words & zeroed, left | (right << 2)


@triton.jit
def _dense_row(words, codes, i: tl.constexpr, DTYPE: tl.constexpr):
    """Element i of groups that are packed."""
    low = words.to(tl.uint32, bitcast=True).to(tl.uint16)
    high = (words.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    bits = tl.where((codes & 3) == i, low, tl.where((codes >> 2) == i, high, tl.zeros_like(low)))
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _mvue_kernel(
    grad_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    stride_gm,
    stride_gn,
    DTYPE: tl.constexpr,
    PACKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """out_ptr: if PACKED int32, two values a word, metadata after N * Mp / 4 words; else [M, N] of DTYPE."""
    m = tl.program_id(1) * 64
    n = tl.program_id(0) * 64
    x = tiles.load(grad_ptr, m, n, M, N, stride_gm, stride_gn, BOUNDED)
    groups = tl.num_programs(1) * 16  # of a column, Mp / 4
    R = tl.arange(0, 16)[:, None]
    C = tl.arange(0, 16)[None, :]
    offset = (n // 4 + C).to(tl.int64) * groups + (m // 4 + R)
    words4 = tl.randint4x(tl.load(seed_ptr), offset)
    group0 = _group(x, 0, words4[0], DTYPE)
    group1 = _group(x, 1, words4[1], DTYPE)
    group2 = _group(x, 2, words4[2], DTYPE)
    group3 = _group(x, 3, words4[3], DTYPE)

    if PACKED:
        values = out_ptr + n.to(tl.int64) * groups + m // 4
        # Neighbouring words belong to neighbouring R: transpose, all four at once, so that the stores coalesce.
        block = tl.join(tl.join(group0[0], group2[0]), tl.join(group1[0], group3[0]))  # R C j1 j0
        block = tl.reshape(tl.permute(block, (1, 2, 3, 0)), [64, 16])
        rows = tl.arange(0, 64)[:, None]
        tl.store(values + rows * groups + tl.arange(0, 16)[None, :], block)
        codes = group0[1] | (group1[1] << 8) | (group2[1] << 16) | (group3[1] << 24)
        metadata = out_ptr + N.to(tl.int64) * groups
        layout.store_metadata(metadata + (n.to(tl.int64) * (groups * 4) + m * 64) // 32, tl.trans(codes))
    else:
        for i in tl.static_range(4):
            even = tl.join(_dense_row(group0[0], group0[1], i, DTYPE), _dense_row(group2[0], group2[1], i, DTYPE))
            odd = tl.join(_dense_row(group1[0], group1[1], i, DTYPE), _dense_row(group3[0], group3[1], i, DTYPE))
            row = tl.reshape(tl.join(even, odd), [16, 64])
            at_row = m + 4 * R + i
            at_col = n + tl.arange(0, 64)[None, :]
            tl.store(out_ptr + at_row.to(tl.int64) * N + at_col, row, mask=(at_row < M) & (at_col < N))


def sparsify_mvue(grad: Tensor, seed: Tensor) -> Tensor:
    """Pack MVUE(grad)^T; `reference_mvue.sparsify_mvue` defines the result.

    grad: [M, N] float16 or bfloat16, M > 0, N a multiple of 64, any strides. seed: one int64. Both on the current
    device.
    """
    rows, cols = grad.shape
    blocks = triton.cdiv(rows, 64)
    packed: Tensor = _empty_strided_cuda((cols * blocks * 18,), (1,), torch.int32)
    _launch(grad, seed, packed, True, (cols // 64, blocks), rows % 64 != 0)
    return packed.view(grad.dtype)


def mvue24(grad: Tensor, seed: Tensor) -> Tensor:
    """The dense estimate [M, N]; `reference_mvue.mvue24` defines it. As above, N any."""
    rows, cols = grad.shape
    estimate: Tensor = _empty_strided_cuda((rows, cols), (cols, 1), grad.dtype)
    grid = triton.cdiv(cols, 64), triton.cdiv(rows, 64)
    _launch(grad, seed, estimate, False, grid, rows % 64 != 0 or cols % 64 != 0)
    return estimate


def _launch(grad: Tensor, seed: Tensor, out: Tensor, packed: bool, grid: tuple[int, int], bounded: bool) -> None:
    _mvue_kernel[grid](
        grad,
        seed,
        out,
        *grad.shape,
        *grad.stride(),
        DTYPE=tiles.TRITON_DTYPE[grad.dtype],
        PACKED=packed,
        BOUNDED=bounded,
        num_warps=_WARPS,
    )
