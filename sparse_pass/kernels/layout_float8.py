"""Pack tiles into the SM90 layout of cuSPARSELt for 8-bit types (Triton device functions).

The layout, byte for byte, is that of `ops.reference.weights.pack`. Tensors and tile masks are those of `masks`:
[16, 16] for a 64x64 block, with R the row of the tile in it and C its column.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .layout import CODES, KEPT, byte_table, look_up, permute_bytes, word_for_each_row

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
def _number(scaled):
    """e4m3 of a number, from 0 to 255, in the interpreter; NaN stays one."""
    scaled = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return _as_hardware_rounds(scaled).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def pair(first, second, scale):
    """e4m3 of two tensors times a scale: int32, the first in the low byte and the second in the next. What is larger
    than 448 is cut off, by the conversion itself."""
    first, second = first.to(tl.float32) * scale, second.to(tl.float32) * scale
    if _INTERPRETED:
        return _number(first) | (_number(second) << 8)
    else:
        # Both in one instruction. Triton 3.6 miscompiled one of two separate conversions in mvue_float8: a constant.
        asm: tl.constexpr = "{ .reg .b16 both; cvt.rn.satfinite.e4m3x2.f32 both, $2, $1; cvt.u32.u16 $0, both; }"
        return tl.inline_asm_elementwise(asm, "=r,f,f", [first, second], tl.int32, True, 1)


@triton.jit
def word(x, FIRST: tl.constexpr, STEP: tl.constexpr, scale):
    """The group x[FIRST], x[FIRST + STEP], ... of the sixteen tensors of a block, in float8: int32, four bytes."""
    low = pair(x[FIRST], x[FIRST + STEP], scale)
    return low | (pair(x[FIRST + 2 * STEP], x[FIRST + 3 * STEP], scale) << 16)


@triton.jit
def _kept(x, FIRST: tl.constexpr, STEP: tl.constexpr, scale, selector):
    """The two kept bytes of a group."""
    values = word(x, FIRST, STEP, scale)
    return (permute_bytes(values, values, selector & 0x77) & 0xFFFF).to(tl.int16)


@triton.jit
def compress(x, mask, ALONG: tl.constexpr, ACROSS: tl.constexpr, scale):
    """Four groups of a tile -> two kept bytes each, int16, and their four metadata nibbles, one in each byte."""
    selectors = look_up(_BOTH, mask)
    pairs = (
        _kept(x, 0, ALONG, scale, selectors),
        _kept(x, ACROSS, ALONG, scale, selectors >> 8),
        _kept(x, 2 * ACROSS, ALONG, scale, selectors >> 16),
        _kept(x, 3 * ACROSS, ALONG, scale, selectors >> 24),
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
    words = word_for_each_row(byte0, byte1, byte2, byte3)
    at = block_ptr + 16 * tl.arange(0, 8)[:, None] + tl.arange(0, 4)[None, :]
    for i in tl.static_range(4):
        tl.store(at + 4 * i, tl.reshape(words[i], [8, 4]))
