"""Pack tiles into the SM90 layout of cuSPARSELt for 8-bit types (Triton device functions).

The layout, byte for byte, is that of `ops.reference.weights.pack`. Tensors and tile masks are those of `masks`:
[16, 16] for a 64x64 block, with R the row of the tile in it and C its column.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .layout import CODES, KEPT, byte_table, look_up, permute_bytes, shuffled

# The byte-permutation selector of the two kept bytes of a group, as one byte.
_BOTH = tl.constexpr(byte_table({(i0, i1): i0 | i1 << 4 for i0, i1 in KEPT}))


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _as_hardware_rounds(x):
    """What e4m3 holds exactly, to nearest with ties to even: Triton's interpreter rounds half up, and loses a carry."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (tl.abs(x) + 16384.0) - 16384.0  # steps of 2^-9
    small = tl.where(bits < 0, -small, small)
    return tl.where(tl.abs(x) < 0.015625, small, normal)


@triton.jit
def quantized(x, scale):
    """e4m3 of clamp(x * scale), as a number from 0 to 255; NaN stays one. The conversion of the hardware clamps."""
    scaled = x.to(tl.float32) * scale
    if _INTERPRETED:
        scaled = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        scaled = _as_hardware_rounds(scaled)
    return scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def quantize(x, scale):
    """The sixteen tensors of a block, as `masks` has them, in float8: numbers from 0 to 255."""
    q = (quantized(x[0], scale),)
    for place in tl.static_range(1, 16):
        q = q + (quantized(x[place], scale),)
    return q


@triton.jit
def _kept(q, FIRST: tl.constexpr, STEP: tl.constexpr, selector):
    """The two kept bytes of the group q[FIRST], q[FIRST + STEP], ..."""
    word = q[FIRST] | (q[FIRST + STEP] << 8) | (q[FIRST + 2 * STEP] << 16) | (q[FIRST + 3 * STEP] << 24)
    return (permute_bytes(word, word, selector & 0x77) & 0xFFFF).to(tl.int16)


@triton.jit
def compress(q, mask, ALONG: tl.constexpr, ACROSS: tl.constexpr):
    """Four groups of a tile -> two kept bytes each, int16, and their four metadata nibbles, one in each byte."""
    selectors = look_up(_BOTH, mask)
    pairs = (
        _kept(q, 0, ALONG, selectors),
        _kept(q, ACROSS, ALONG, selectors >> 8),
        _kept(q, 2 * ACROSS, ALONG, selectors >> 16),
        _kept(q, 3 * ACROSS, ALONG, selectors >> 24),
    )
    return pairs, look_up(CODES, mask)


@triton.jit
def store_metadata(block_ptr, codes):
    """codes: [16, 16], R by C, byte i the metadata nibble of row 4R + i. Writes 128 words.

    In the block a nibble's position is, high bit first, R3 R2 R0 i1 i0 C2 C1 C3 R1 C0: a byte holds two C, a word two
    R and the C of both halves.
    """
    bits = tl.reshape(codes, [4, 2, 2, 2, 4, 2])  # R32 R1 R0 C3 C21 C0
    even, odd = tl.split(bits)
    both = tl.permute(even + odd * 16, (0, 2, 4, 3, 1))  # R32 R0 C21 C3 R1
    upper, lower = tl.split(both)
    byte0, byte2 = tl.split(upper)  # by C3
    byte1, byte3 = tl.split(lower)
    # Transpose 4x4 bytes: from a word for each place in the word, to a word for each i.
    low01, low23 = shuffled(byte0, byte1, 0x5140), shuffled(byte0, byte1, 0x7362)
    high01, high23 = shuffled(byte2, byte3, 0x5140), shuffled(byte2, byte3, 0x7362)
    at = block_ptr + 16 * tl.arange(0, 8)[:, None] + tl.arange(0, 4)[None, :]
    tl.store(at, tl.reshape(shuffled(low01, high01, 0x5410), [8, 4]))
    tl.store(at + 4, tl.reshape(shuffled(low01, high01, 0x7632), [8, 4]))
    tl.store(at + 8, tl.reshape(shuffled(low23, high23, 0x5410), [8, 4]))
    tl.store(at + 12, tl.reshape(shuffled(low23, high23, 0x7632), [8, 4]))
