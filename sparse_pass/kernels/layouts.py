"""Write a 64x64 block of a matrix in any of the layouts of `vocabulary.LAYOUTS` (Triton device functions).

The layouts, byte for byte, are those of `ops.reference.weights.pack`. Tensors and tile masks are those of `masks`:
[16, 16] for a block, R the tile's row in it and C its column. The block is at row n and column k of [N, K].
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from . import layout
from .layout import pair_up, word_for_each_row


@triton.jit
def store_metadata(metadata_ptr, codes, n, k, N, K, LAYOUT: tl.constexpr):
    """codes: [16, 16], R by C, byte i the metadata nibble of row 4R + i. metadata_ptr: int32, that of [N, K]."""
    if LAYOUT == "sm90":
        layout.store_metadata(metadata_ptr + ((n.to(tl.int64) * K + k * 64) >> 5), codes)
    elif LAYOUT == "sm80":
        # A tile of 128x64, 256 words, has its left half first; the block is the upper or the lower half of both.
        panel = (k >> 6).to(tl.int64) * N * 2
        _store_quarters(metadata_ptr + panel + (n >> 7) * 256 + (n & 64), codes, 128)
    else:
        # "cutlass": panels of 32 columns, a word for each row of one.
        _store_quarters(metadata_ptr + (k >> 5).to(tl.int64) * N + n, codes, N)


@triton.jit
def _store_quarters(block_ptr, codes, RIGHT):
    """Writes four tiles of 32x32, 32 words each: the lower ones behind the upper, the right ones RIGHT words further.

    In a tile a nibble's position is, high bit first, R0 i1 i0 R2 C2 R1 C1 C0: a word holds two R and four C.
    """
    bits = tl.reshape(codes, [2, 2, 2, 2, 2, 2, 2, 2])  # R3 R2 R1 R0 C3 C2 C1 C0
    low, high = tl.split(tl.permute(bits, (0, 4, 3, 1, 5, 2, 6, 7)))  # R3 C3 R0 R2 C2 R1 C1, C0 split off
    even, odd = tl.split(low + high * 16)  # by C1
    byte0, byte2 = tl.split(even)  # by R1
    byte1, byte3 = tl.split(odd)
    words = word_for_each_row(byte0, byte1, byte2, byte3)
    tile = tl.arange(0, 4)[:, None]  # R3 C3
    word = tl.arange(0, 8)[None, :]  # R0 R2 C2
    at = block_ptr + (tile >> 1) * 32 + (tile & 1) * RIGHT + (word >> 2) * 16 + (word & 3)
    for i in tl.static_range(4):
        tl.store(at + 4 * i, tl.reshape(words[i], [4, 8]))


@triton.jit
def store_dense(out_ptr, x, n, k, K, DTYPE: tl.constexpr):
    """The block as it is. x: sixteen tensors; out_ptr: [N, K] of 16-bit values as int32, two a word."""
    rows = 4 * tl.arange(0, 16)[:, None]
    cols = tl.arange(0, 32)[None, :]
    out_ptr += n.to(tl.int64) * (K >> 1) + (k >> 1)
    for i in tl.static_range(4):
        words = tl.join(pair_up(x[4 * i], x[4 * i + 1], DTYPE), pair_up(x[4 * i + 2], x[4 * i + 3], DTYPE))
        tl.store(out_ptr + (rows + i) * (K >> 1) + cols, tl.reshape(words, [16, 32]))


@triton.jit
def _word_of_column(x, j: tl.constexpr, upper: tl.constexpr, DTYPE: tl.constexpr):
    """Two entries of a tile's column j, of rows 0 and 1 or of rows 2 and 3."""
    return pair_up(x[upper * 8 + j], x[upper * 8 + 4 + j], DTYPE)


@triton.jit
def _columns(x, upper: tl.constexpr, DTYPE: tl.constexpr):
    even = tl.join(_word_of_column(x, 0, upper, DTYPE), _word_of_column(x, 2, upper, DTYPE))
    odd = tl.join(_word_of_column(x, 1, upper, DTYPE), _word_of_column(x, 3, upper, DTYPE))
    return tl.join(even, odd)  # R C j1 j0


@triton.jit
def store_dense_transposed(out_ptr, x, n, k, N, DTYPE: tl.constexpr):
    """The block's transpose, at row k and column n of [K, N]."""
    block = tl.join(_columns(x, 0, DTYPE), _columns(x, 1, DTYPE))  # R C j1 j0, and which half of the column
    block = tl.reshape(tl.permute(block, (1, 2, 3, 0, 4)), [64, 32])
    rows = tl.arange(0, 64)[:, None]
    cols = tl.arange(0, 32)[None, :]
    out_ptr += k.to(tl.int64) * (N >> 1) + (n >> 1)
    tl.store(out_ptr + rows * (N >> 1) + cols, block)
