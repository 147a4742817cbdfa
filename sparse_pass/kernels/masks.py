"""Choose the transposable 2:4 mask of 4x4 tiles (Triton device functions).

The definition, ties and order of additions included, is `ops.reference.weights`; the results are equal bit for bit.

A *tensor* here holds one number for each tile. A tile's sixteen entries are sixteen tensors, row-major. A tile mask is
one int32: bit 4 * i + j says that row i keeps column j, and bit 16 + 4 * j + i says it in the transposed order.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def _tile_mask(*places: tuple[int, int]) -> int:
    bits = sum(1 << (4 * row + col) | 1 << (16 + 4 * col + row) for row, col in places)
    return bits - (1 << 32) if bits >> 31 else bits


# Tile masks of the two ways, straight and swapped, of `crossed` of the upper half, of the lower half, and of `halved`.
_CROSSED_UPPER = tl.constexpr(tuple(_tile_mask((0, x), (1, y)) for pair in _PAIRS for x, y in (pair, pair[::-1])))
_CROSSED_LOWER = tl.constexpr(tuple(_tile_mask((2, x), (3, y)) for pair in _PAIRS for x, y in (pair, pair[::-1])))
_HALVED = tl.constexpr(
    tuple(_tile_mask((0, x), (1, x), (2, y), (3, y)) for pair in _PAIRS for x, y in (pair, pair[::-1]))
)


def _sorting_network() -> tuple[int, ...]:
    """Batcher's odd-even merge sort of sixteen: 63 pairs of places, flat."""
    pairs: list[int] = []
    for size in (1, 2, 4, 8):
        step = size
        while step:
            for start in range(step % size, 16 - step, 2 * step):
                for place in range(start, min(start + step, 16 - step)):
                    if place // (2 * size) == (place + step) // (2 * size):
                        pairs += [place, place + step]
            step //= 2
    return tuple(pairs)


_NETWORK = tl.constexpr(_sorting_network())
_COMPARATORS = tl.constexpr(63)


@triton.jit
def magnitude(x):
    """|x| as float32, NaN as +inf."""
    if x.dtype == tl.bfloat16:
        # The same as a cast, which Triton's interpreter gets wrong for denormals.
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32).to(tl.int32, bitcast=True) << 16
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    # Above the bits of +inf there is only NaN.
    return tl.minimum(bits & 0x7FFFFFFF, 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _larger(a, a_mask, b, b_mask):
    """The larger of two non-negative sums and its mask; a wins a tie."""
    # As integers, which order them the same: one max instruction, where floats would need care for NaN.
    a_bits = a.to(tl.int32, bitcast=True)
    b_bits = b.to(tl.int32, bitcast=True)
    first = a_bits >= b_bits
    sums = tl.where(first, a_bits, b_bits).to(tl.float32, bitcast=True)
    return sums, tl.where(first, a_mask, b_mask)


@triton.jit
def _crosswise(above, below, x: tl.constexpr, y: tl.constexpr, pair: tl.constexpr, masks: tl.constexpr):
    """Pair (x, y): above[x] + below[y] or above[y] + below[x]."""
    return _larger(above[x] + below[y], masks[2 * pair], above[y] + below[x], masks[2 * pair + 1])


@triton.jit
def _crosswise_pairs(above, below, masks: tl.constexpr):
    """The six pairs in lexicographic order, each (sum, mask)."""
    return (
        _crosswise(above, below, 0, 1, 0, masks),
        _crosswise(above, below, 0, 2, 1, masks),
        _crosswise(above, below, 0, 3, 2, masks),
        _crosswise(above, below, 1, 2, 3, masks),
        _crosswise(above, below, 1, 3, 4, masks),
        _crosswise(above, below, 2, 3, 5, masks),
    )


@triton.jit
def _columns(above, below):
    return above[0] + below[0], above[1] + below[1], above[2] + below[2], above[3] + below[3]


@triton.jit
def _both(a, b):
    return a[0] + b[0], a[1] | b[1]


@triton.jit
def _once(crossed):
    """A half keeps every column once: the best of the three splits into two pairs."""
    one = _both(crossed[0], crossed[5])
    two = _both(crossed[1], crossed[4])
    three = _both(crossed[2], crossed[3])
    best = _larger(one[0], one[1], two[0], two[1])
    return _larger(best[0], best[1], three[0], three[1])


@triton.jit
def choose_optimal(a):
    """a: sixteen magnitudes, float32. Returns the tile masks of largest sum; names as in the reference, `_optimal`."""
    upper = _crosswise_pairs(a[0:4], a[4:8], _CROSSED_UPPER)
    lower = _crosswise_pairs(a[8:12], a[12:16], _CROSSED_LOWER)
    halved = _crosswise_pairs(_columns(a[0:4], a[4:8]), _columns(a[8:12], a[12:16]), _HALVED)

    best = _both(_both(upper[0], lower[0]), halved[5])
    for e in tl.static_range(1, 6):
        mixed = _both(_both(upper[e], lower[e]), halved[5 - e])
        best = _larger(best[0], best[1], mixed[0], mixed[1])
    for e in tl.static_range(3):
        twice = _both(halved[e], halved[5 - e])
        best = _larger(best[0], best[1], twice[0], twice[1])
    once = _both(_once(upper), _once(lower))
    best = _larger(best[0], best[1], once[0], once[1])
    return best[1]


@triton.jit
def _replaced(items, place: tl.constexpr, item):
    return items[:place] + (item,) + items[place + 1 :]


@triton.jit
def _exchanged(items, left: tl.constexpr, right: tl.constexpr):
    larger = tl.maximum(items[left], items[right])
    smaller = tl.minimum(items[left], items[right])
    return _replaced(_replaced(items, left, larger), right, smaller)


@triton.jit
def _key(x, place: tl.constexpr):
    """An integer that orders entries: the magnitude's bits, then the lower place first. No two are equal."""
    size = magnitude(x)
    if x.dtype == tl.float16:
        bits = size.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    elif x.dtype == tl.bfloat16:
        bits = size.to(tl.int32, bitcast=True) >> 16
    else:
        bits = size.to(tl.int32, bitcast=True).to(tl.int64)
    return (bits << 4) | (15 - place)


@triton.jit
def choose_greedy(x):
    """x: sixteen entries as stored. Returns the tile masks; they may keep fewer than two in a row or column."""
    keys = (_key(x[0], 0),)
    for place in tl.static_range(1, 16):
        keys = keys + (_key(x[place], place),)
    for comparator in tl.static_range(_COMPARATORS):
        keys = _exchanged(keys, _NETWORK[2 * comparator], _NETWORK[2 * comparator + 1])

    # How many are kept so far in each row (low half) and column (high half), four bits a count, in reverse order
    # since the keys hold 15 - place. Two kept are bit 1 of a count.
    counts = tl.full(keys[0].shape, 0, tl.int32)
    kept = tl.full(keys[0].shape, 0, tl.int32)
    for visit in tl.static_range(16):
        place = keys[visit].to(tl.int32) & 15
        one = (1 << (place & 12)) | (65536 << ((place & 3) * 4))
        keep = (counts & (one * 2)) == 0
        counts += tl.where(keep, one, 0)
        kept |= tl.where(keep, 32768 >> place, 0)
    # Transpose the 4x4 bits: swap within 2x2 blocks, then the blocks.
    swap = (kept ^ (kept >> 3)) & 0x0A0A
    transposed = kept ^ swap ^ (swap << 3)
    swap = (transposed ^ (transposed >> 6)) & 0x00CC
    transposed = transposed ^ swap ^ (swap << 6)
    return kept | (transposed << 16)


@triton.jit
def fill(mask):
    """Give each row (low half) and column (high half) that keeps fewer than two its lowest free places."""
    for bit in tl.static_range(2):
        one, two, three = mask >> 1, mask >> 2, mask >> 3
        enough = (mask & one) | (two & three) | ((mask | one) & (two | three))
        mask |= (~enough & 0x11111111) << bit
    return mask
