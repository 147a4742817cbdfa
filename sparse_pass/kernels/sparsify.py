"""W [N, K] -> S(W) and S(W)^T packed in the SM90 layout, in one read of W (Triton).

Definition, ties, order of additions and bytes: `sparse_pass.reference` (mask24, pack); the results are equal bit for
bit. Bytes moved for 16-bit W: 2 read and 2 * 1.125 written an element.

One program handles a 64x64 block of W, which is one 512-byte block of metadata in either direction. It works on 4x4
tiles: a "tensor" below is [16, 16], a number for each tile, R the tile row and C the tile column, and the sixteen
entries of a tile are sixteen tensors. A tile's mask is one int32: bit 4 * i + j says that row i keeps column j, and
bit 16 + 4 * j + i says the same in the transposed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bits of a tile mask in which row i keeps the columns of pair c, at 6 * i + c. Pairs are in lexicographic order.
_PAIRS = [(left, right) for left in range(4) for right in range(left + 1, 4)]
_PAIR_BITS = tl.constexpr(
    tuple(
        sum(1 << (4 * row + column) | 1 << (16 + 4 * column + row) for column in pair)
        for row in range(4)
        for pair in _PAIRS
    )
)


@triton.jit
def _bits(a: tl.constexpr, b: tl.constexpr, row: tl.constexpr):
    """Mask bits of pair a in `row` and pair b in the next row."""
    return _PAIR_BITS[6 * row + a] | _PAIR_BITS[6 * row + 6 + b]


@triton.jit
def _bits_of(x):
    """The bits of non-negative floats, which compare like them: setp + selp on integers is one VIMNMX on SM90."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _half_class(upper, lower, a: tl.constexpr, b: tl.constexpr, row: tl.constexpr):
    """The two rows keep pairs a and b, either way round; a first wins a tie."""
    one = _bits_of(upper[a] + lower[b])
    two = _bits_of(upper[b] + lower[a])
    first = one >= two
    largest = tl.where(first, one, two)
    return largest.to(tl.float32, bitcast=True), tl.where(first, _bits(a, b, row), _bits(b, a, row))


@triton.jit
def _half_disjoint(upper, lower, row: tl.constexpr):
    """The two rows together keep every column once: six pairs for the upper row, the lower has the rest."""
    largest = _bits_of(upper[0] + lower[5])
    mask = tl.full(largest.shape, _bits(0, 5, row), tl.int32)
    for a in tl.static_range(1, 6):
        candidate = _bits_of(upper[a] + lower[5 - a])
        first = largest >= candidate
        largest = tl.where(first, largest, candidate)
        mask = tl.where(first, mask, _bits(a, 5 - a, row))
    return largest.to(tl.float32, bitcast=True), mask


@triton.jit
def _better(best, mask, above, below, class_mask):
    total = _bits_of(above + below)
    keep = best >= total
    return tl.where(keep, best, total), tl.where(keep, mask, class_mask)


@triton.jit
def _same(best, mask, p, a: tl.constexpr):
    """A class whose rows 0 and 1 both keep pair a; rows 2 and 3 both keep the other two columns."""
    class_mask: tl.constexpr = _bits(a, a, 0) | _bits(5 - a, 5 - a, 2)
    return _better(best, mask, p[0][a] + p[1][a], p[2][5 - a] + p[3][5 - a], class_mask)


@triton.jit
def _shared(best, mask, p, a: tl.constexpr, b: tl.constexpr):
    """A class whose rows 0 and 1 keep pairs a < b, which share a column; rows 2 and 3 keep their complements."""
    above, above_mask = _half_class(p[0], p[1], a, b, 0)
    below, below_mask = _half_class(p[2], p[3], 5 - b, 5 - a, 2)
    return _better(best, mask, above, below, above_mask | below_mask)


@triton.jit
def _row_pairs(a, b, c, d):
    return a + b, a + c, a + d, b + c, b + d, c + d


@triton.jit
def _choose_optimal(a):
    """a: magnitudes of the sixteen entries, row-major. Returns the tile masks; classes by column counts of rows 0, 1."""
    p = (
        _row_pairs(a[0], a[1], a[2], a[3]),
        _row_pairs(a[4], a[5], a[6], a[7]),
        _row_pairs(a[8], a[9], a[10], a[11]),
        _row_pairs(a[12], a[13], a[14], a[15]),
    )
    best = tl.full(a[0].shape, -1, tl.int32)
    mask = tl.full(a[0].shape, 0, tl.int32)
    best, mask = _same(best, mask, p, 5)  # 0022
    best, mask = _shared(best, mask, p, 4, 5)  # 0112
    best, mask = _shared(best, mask, p, 3, 5)  # 0121
    best, mask = _same(best, mask, p, 4)  # 0202
    best, mask = _shared(best, mask, p, 3, 4)  # 0211
    best, mask = _same(best, mask, p, 3)  # 0220
    best, mask = _shared(best, mask, p, 2, 5)  # 1012
    best, mask = _shared(best, mask, p, 1, 5)  # 1021
    best, mask = _shared(best, mask, p, 2, 4)  # 1102
    above, above_mask = _half_disjoint(p[0], p[1], 0)  # 1111
    below, below_mask = _half_disjoint(p[2], p[3], 2)
    best, mask = _better(best, mask, above, below, above_mask | below_mask)
    best, mask = _shared(best, mask, p, 1, 3)  # 1120
    best, mask = _shared(best, mask, p, 0, 4)  # 1201
    best, mask = _shared(best, mask, p, 0, 3)  # 1210
    best, mask = _same(best, mask, p, 2)  # 2002
    best, mask = _shared(best, mask, p, 1, 2)  # 2011
    best, mask = _same(best, mask, p, 1)  # 2020
    best, mask = _shared(best, mask, p, 0, 2)  # 2101
    best, mask = _shared(best, mask, p, 0, 1)  # 2110
    best, mask = _same(best, mask, p, 0)  # 2200
    return mask
