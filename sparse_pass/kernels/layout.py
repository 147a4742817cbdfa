"""Pack tiles: what all layouts share, and the metadata of cuSPARSELt's on SM90 (Triton device functions).

The layout, byte for byte, is "sm90" of `ops.reference.weights.pack`; `layouts` has the others. Tensors and tile masks
are those of `masks`; here they are [16, 16] for a 64x64 block, R the tile's row in it and C its column.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def byte_table(entry: dict[tuple[int, int], int]) -> tuple[int, ...]:
    """Eight bytes as two int32, indexed by the low three bits of a mask nibble, which tell the six pairs apart."""
    table = [0] * 8
    for (i0, i1), byte in entry.items():
        table[(1 << i0 | 1 << i1) & 7] = byte
    return tuple(int.from_bytes(bytes(table[at : at + 4]), "little", signed=True) for at in (0, 4))


KEPT = [(i0, i1) for i0 in range(4) for i1 in range(i0 + 1, 4)]
# A mask nibble's metadata nibble, and the byte-permutation selectors of its first and its second kept 16-bit value.
CODES = tl.constexpr(byte_table({(i0, i1): i0 | i1 << 2 for i0, i1 in KEPT}))
_FIRST = tl.constexpr(byte_table({(i0, i1): 0x22 * i0 + 0x10 for i0, i1 in KEPT}))
_SECOND = tl.constexpr(byte_table({(i0, i1): 0x22 * i1 + 0x10 for i0, i1 in KEPT}))


@triton.jit
def permute_bytes(low, high, selector):
    """PTX prmt: byte n of the result is byte (selector >> 4 n) & 7 of the eight bytes high:low."""
    if _INTERPRETED:
        both = low.to(tl.uint32, bitcast=True).to(tl.uint64)
        both |= high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        result = (both >> ((selector & 7) * 8).to(tl.uint64)) & 255
        for n in tl.static_range(1, 4):
            byte = (both >> (((selector >> (4 * n)) & 7) * 8).to(tl.uint64)) & 255
            result |= byte << (8 * n)
        return result.to(tl.uint32).to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], tl.int32, True, 1
        )


@triton.jit
def shuffled(low, high, SELECTOR: tl.constexpr):
    return permute_bytes(low, high, tl.full(low.shape, SELECTOR, tl.int32))


@triton.jit
def look_up(table: tl.constexpr, mask):
    """Four mask nibbles, the low half of `mask`, give four bytes of the table."""
    low = tl.full(mask.shape, table[0], tl.int32)
    high = tl.full(mask.shape, table[1], tl.int32)
    return permute_bytes(low, high, mask & 0x7777)


@triton.jit
def pair_up(a, b, DTYPE: tl.constexpr):
    """Two values as one 32-bit word of 16-bit values, a in the low half."""
    low = a.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = b.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def round_pair(a, b, DTYPE: tl.constexpr):
    """Two float32, rounded to 16 bits, as a word: a in the low half."""
    if _INTERPRETED:
        return pair_up(a, b, DTYPE)
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, True, 1)


@triton.jit
def larger_halves(a, b):
    """Of both halves of two words the larger one, as integers that are not negative."""
    if tl.target_info.cuda_capability_geq(9, 0) and not _INTERPRETED:  # older ones have no such instruction
        return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        return tl.maximum(a & 0xFFFF, b & 0xFFFF) | tl.maximum(a & 0x7FFF0000, b & 0x7FFF0000)


@triton.jit
def _kept_values(x, FIRST: tl.constexpr, STEP: tl.constexpr, selector, DTYPE: tl.constexpr):
    """The two kept values of the group x[FIRST], x[FIRST + STEP], ... as a word."""
    low = pair_up(x[FIRST], x[FIRST + STEP], DTYPE)
    high = pair_up(x[FIRST + 2 * STEP], x[FIRST + 3 * STEP], DTYPE)
    return permute_bytes(low, high, selector)


@triton.jit
def compress(x, mask, ALONG: tl.constexpr, ACROSS: tl.constexpr, DTYPE: tl.constexpr):
    """Four groups of a tile -> the four words of kept values, and their four metadata nibbles, one in each byte."""
    first = look_up(_FIRST, mask)
    second = look_up(_SECOND, mask)
    low = shuffled(first, second, 0x5140)
    high = shuffled(first, second, 0x7362)
    words = (
        _kept_values(x, 0, ALONG, low, DTYPE),
        _kept_values(x, ACROSS, ALONG, low >> 16, DTYPE),
        _kept_values(x, 2 * ACROSS, ALONG, high, DTYPE),
        _kept_values(x, 3 * ACROSS, ALONG, high >> 16, DTYPE),
    )
    return words, look_up(CODES, mask)


@triton.jit
def word_for_each_row(byte0, byte1, byte2, byte3):
    """Transpose 4x4 bytes: from a word for each place in the word, whose byte i is of row i, to a word for each row."""
    low01, low23 = shuffled(byte0, byte1, 0x5140), shuffled(byte0, byte1, 0x7362)
    high01, high23 = shuffled(byte2, byte3, 0x5140), shuffled(byte2, byte3, 0x7362)
    return (
        shuffled(low01, high01, 0x5410),
        shuffled(low01, high01, 0x7632),
        shuffled(low23, high23, 0x5410),
        shuffled(low23, high23, 0x7632),
    )


@triton.jit
def store_metadata(block_ptr, codes):
    """codes: [16, 16], R by C, byte i the metadata nibble of row 4R + i. Writes 128 words.

    In the block a nibble's position is, high bit first, C3 R3 R2 R0 i1 i0 C1 C0 C2 R1: a byte holds two R, a word
    four C.
    """
    bits = tl.reshape(codes, [4, 2, 2, 2, 2, 2, 2])  # R32 R1 R0 C3 C2 C1 C0
    low, high = tl.split(tl.permute(bits, (3, 0, 2, 5, 6, 4, 1)))  # C3 R32 R0 C1 C0 C2, R1 split off
    even, odd = tl.split(low + high * 16)  # by C2
    byte0, byte2 = tl.split(even)  # by C0
    byte1, byte3 = tl.split(odd)
    words = word_for_each_row(byte0, byte1, byte2, byte3)
    at = block_ptr + 8 * tl.arange(0, 16)[:, None] + tl.arange(0, 2)[None, :]
    for i in tl.static_range(4):
        tl.store(at + 2 * i, tl.reshape(words[i], [16, 2]))
