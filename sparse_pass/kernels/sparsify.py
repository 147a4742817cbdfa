"""W [N, K] -> S(W) and S(W)^T packed in the SM90 layout, in one read of W (Triton).

Definition, ties, order of additions and bytes: `sparse_pass.reference` (mask24, pack); the results are equal bit for
bit. Bytes moved for 16-bit W: 2 read and 2 * 1.125 written an element.

One program handles a 64x64 block of W, which is one 512-byte block of metadata in either direction. It works on 4x4
tiles: a "tensor" below is [16, 16], a number for each tile, R the tile row and C the tile column, and the sixteen
entries of a tile are sixteen tensors. A tile's mask is one int32: bit 4 * i + j says that row i keeps column j, and
bit 16 + 4 * j + i says the same in the transposed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

_PAIRS = [(left, right) for left in range(4) for right in range(left + 1, 4)]


def _pair_bits(row: int, pair: int) -> int:
    """The tile mask in which `row` keeps the columns of `pair` and no other row keeps any."""
    return sum(1 << (4 * row + column) | 1 << (16 + 4 * column + row) for column in _PAIRS[pair])


def _signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits


# 36 * half + 6 * a + b: rows 2 * half and 2 * half + 1 keep pairs a and b. Pairs are in lexicographic order, so that
# 5 - a is the complement of a.
_BITS = tl.constexpr(
    tuple(
        _signed(_pair_bits(2 * half, a) | _pair_bits(2 * half + 1, b))
        for half in range(2)
        for a in range(6)
        for b in range(6)
    )
)


def _sorting_network() -> tuple[int, ...]:
    """Batcher's odd-even merge sort of sixteen: 63 pairs of places, flat."""
    pairs: list[int] = []
    size = 1
    while size < 16:
        step = size
        while step:
            for start in range(step % size, 16 - step, 2 * step):
                for place in range(start, min(start + step, 16 - step)):
                    if place // (2 * size) == (place + step) // (2 * size):
                        pairs += [place, place + step]
            step //= 2
        size *= 2
    return tuple(pairs)


_NETWORK = tl.constexpr(_sorting_network())
_COMPARATORS = tl.constexpr(len(_sorting_network()) // 2)


@triton.jit
def _bits_of(x):
    """The bits of non-negative floats, which compare like them: setp + selp on integers is one VIMNMX on SM90."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _half_class(upper, lower, a: tl.constexpr, b: tl.constexpr, half: tl.constexpr):
    """The two rows keep pairs a and b, either way round; a first wins a tie."""
    one = _bits_of(upper[a] + lower[b])
    two = _bits_of(upper[b] + lower[a])
    first = one >= two
    mask = tl.where(first, _BITS[36 * half + 6 * a + b], _BITS[36 * half + 6 * b + a])
    return tl.where(first, one, two).to(tl.float32, bitcast=True), mask


@triton.jit
def _half_disjoint(upper, lower, half: tl.constexpr):
    """The two rows together keep every column once: any pair for the upper row, the lower has the rest."""
    largest = _bits_of(upper[0] + lower[5])
    mask = tl.full(largest.shape, _BITS[36 * half + 5], tl.int32)
    for a in tl.static_range(1, 6):
        candidate = _bits_of(upper[a] + lower[5 - a])
        first = largest >= candidate
        largest = tl.where(first, largest, candidate)
        mask = tl.where(first, mask, _BITS[36 * half + 5 * a + 5])
    return largest.to(tl.float32, bitcast=True), mask


@triton.jit
def _better(best, mask, above, below, class_mask):
    total = _bits_of(above + below)
    keep = best >= total
    return tl.where(keep, best, total), tl.where(keep, mask, class_mask)


@triton.jit
def _same(best, mask, p, a: tl.constexpr):
    """A class whose rows 0 and 1 both keep pair a; rows 2 and 3 both keep the other two columns."""
    class_mask: tl.constexpr = _BITS[7 * a] | _BITS[36 + 7 * (5 - a)]
    return _better(best, mask, p[0][a] + p[1][a], p[2][5 - a] + p[3][5 - a], class_mask)


@triton.jit
def _shared(best, mask, p, a: tl.constexpr, b: tl.constexpr):
    """A class whose rows 0 and 1 keep pairs a < b, which share a column; rows 2 and 3 keep their complements."""
    above, above_mask = _half_class(p[0], p[1], a, b, 0)
    below, below_mask = _half_class(p[2], p[3], 5 - b, 5 - a, 1)
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
    below, below_mask = _half_disjoint(p[2], p[3], 1)
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


@triton.jit
def _replaced(items, place: tl.constexpr, item):
    return items[:place] + (item,) + items[place + 1 :]


@triton.jit
def _exchanged(items, left: tl.constexpr, right: tl.constexpr):
    larger = tl.maximum(items[left], items[right])
    smaller = tl.minimum(items[left], items[right])
    return _replaced(_replaced(items, left, larger), right, smaller)


@triton.jit
def _choose_greedy(keys):
    """keys: sixteen integers, magnitude << 4 | 15 - place, which are all different. Returns the tile masks."""
    for comparator in tl.static_range(_COMPARATORS):
        keys = _exchanged(keys, _NETWORK[2 * comparator], _NETWORK[2 * comparator + 1])
    # Counts of kept entries, four bits a row (low half) and a column (high half), rows and columns backwards.
    counts = tl.full(keys[0].shape, 0, tl.int32)
    mask = tl.full(keys[0].shape, 0, tl.int32)
    for visit in tl.static_range(16):
        place = keys[visit].to(tl.int32) & 15
        one = (1 << (place & 12)) | (65536 << ((place & 3) * 4))
        keep = (counts & (one * 2)) == 0
        counts += tl.where(keep, one, 0)
        mask |= tl.where(keep, 32768 >> place, 0)
    # The transpose of a 4x4 bit matrix: swap 1x1 blocks, then 2x2 blocks.
    swap = (mask ^ (mask >> 3)) & 0x0A0A
    transposed = mask ^ swap ^ (swap << 3)
    swap = (transposed ^ (transposed >> 6)) & 0x00CC
    transposed = transposed ^ swap ^ (swap << 6)
    return mask | (transposed << 16)


@triton.jit
def _load_quad(pointers, inside):
    """Four neighbours [16, 16, 4] as four tensors."""
    quad = tl.load(pointers, mask=inside)
    even, odd = tl.split(tl.reshape(quad, [16, 16, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _load_tiles(w_ptr, stride_wn, stride_wk, n, k, N, K, BOUNDED: tl.constexpr):
    """The 64x64 block at row n, column k of W: sixteen tensors in row-major order of the tile."""
    w_ptr += n.to(tl.int64) * stride_wn + k.to(tl.int64) * stride_wk
    rows = 4 * tl.arange(0, 16)[:, None, None]
    cols = 4 * tl.arange(0, 16)[None, :, None] + tl.arange(0, 4)[None, None, :]
    inside = None
    if BOUNDED:
        inside = (n + rows < N) & (k + cols < K)
    pointers = w_ptr + rows * stride_wn + cols * stride_wk
    return (
        _load_quad(pointers, inside)
        + _load_quad(pointers + stride_wn, inside)
        + _load_quad(pointers + 2 * stride_wn, inside)
        + _load_quad(pointers + 3 * stride_wn, inside)
    )


@triton.jit
def _magnitude(x):
    magnitude = tl.abs(x.to(tl.float32))
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))  # NaN too


@triton.jit
def _key(x, place: tl.constexpr):
    bits = _bits_of(_magnitude(x))
    if x.dtype == tl.float32:
        bits = bits.to(tl.int64)
    elif x.dtype == tl.bfloat16:
        bits = bits >> 16
    else:
        bits = _magnitude(x).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (bits << 4) | (15 - place)


@triton.jit
def _choose(x, GREEDY: tl.constexpr):
    if GREEDY:
        keys = (_key(x[0], 0),)
        for place in tl.static_range(1, 16):
            keys = keys + (_key(x[place], place),)
        mask = _choose_greedy(keys)
    else:
        magnitudes = (_magnitude(x[0]),)
        for place in tl.static_range(1, 16):
            magnitudes = magnitudes + (_magnitude(x[place]),)
        mask = _choose_optimal(magnitudes)
    return mask


@triton.jit
def _filled(mask):
    """Give each of the eight groups of a tile mask its lowest free columns until it has two."""
    for _ in tl.static_range(2):
        one, two, three = mask >> 1, mask >> 2, mask >> 3
        enough = (mask & one) | (two & three) | ((mask | one) & (two | three))
        mask |= (~enough & 0x11111111) << _
    return mask


@triton.jit
def _index_codes(mask):
    """Mask nibble -> metadata nibble i0 | i1 << 2 of the two columns i0 < i1 kept, for eight groups at once."""
    up, down = mask << 1, mask >> 1
    code = (down & ~mask & 0x11111111) | (~mask & ~up & 0x22222222)
    return code | ((down | ~mask) & 0x44444444) | ((mask | up) & -0x77777778)


@triton.jit
def _two_kept(x0, x1, x2, x3, mask, shift: tl.constexpr, DTYPE: tl.constexpr):
    """The two values kept of a group, in column order, as one 32-bit word."""
    first = tl.where(mask & (1 << shift) != 0, x0, tl.where(mask & (2 << shift) != 0, x1, x2))
    second = tl.where(mask & (8 << shift) != 0, x3, tl.where(mask & (4 << shift) != 0, x2, x1))
    low = first.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = second.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _store(packed_ptr, words, codes, row, col, N, K):
    """Write one 64x64 block of a packed [N, K].

    packed_ptr: int32. words: values of rows 4R, 4R + 1, ... as four [16, 16]. codes: int32 [16, 16], four nibbles, the
    metadata of rows 4R, ... from the low end.
    """
    even = tl.join(words[0], words[2])
    odd = tl.join(words[1], words[3])
    rows = tl.permute(tl.join(even, odd), (0, 2, 3, 1)) # R, C, i1, i0
    r = row + tl.arange(0, 64)[:, None]
    values = packed_ptr + row.to(tl.int64) * (K // 4) + col // 4
    tl.store(values + tl.arange(0, 64)[:, None] * (K // 4) + tl.arange(0, 16)[None, :], tl.reshape(rows, [64, 16]))

    # Position of a nibble in the block, high bit first: C3 R3 R2 R0 i1 i0 C1 C0 C2 R1.
    bits = tl.reshape(codes, [4, 2, 2, 2, 2, 4])  # R32 R1 R0 C3 C2 C10
    low, high = tl.split(tl.permute(bits, (3, 0, 2, 5, 4, 1)))  # C3 R32 R0 C10 C2
    low = tl.reshape(low, [16, 8])
    high = tl.reshape(high, [16, 8]) << 4
    byte0 = (low & 15) | (high & 0xF0)
    byte1 = ((low >> 4) & 15) | ((high >> 4) & 0xF0)
    byte2 = ((low >> 8) & 15) | ((high >> 8) & 0xF0)
    byte3 = ((low >> 12) & 15) | ((high >> 12) & 0xF0)
    even = tl.join(byte0.to(tl.int8), byte2.to(tl.int8))
    odd = tl.join(byte1.to(tl.int8), byte3.to(tl.int8))
    metadata = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), [512])
    block = (row // 64) * (K // 64) + col // 64
    meta_ptr = (packed_ptr + (N // 4) .to(tl.int64)* K).to(tl.pointer_type(tl.int8)) + block.to(tl.int64) * 512
    tl.store(meta_ptr + tl.arange(0, 512), metadata)


@triton.jit
def _sparsify_kernel(
    w_ptr, packed_ptr, packed_t_ptr, N, K, stride_wn, stride_wk,
    DTYPE: tl.constexpr, GREEDY: tl.constexpr,
):
    n = tl.program_id(1) * 64
    k = tl.program_id(0) * 64
    x = _load_tiles(w_ptr, stride_wn, stride_wk, n, k, N, K, False)
    mask = _choose(x, GREEDY)
    if GREEDY:
        kept = mask
        mask = _filled(mask)
        zeroed = (tl.where(kept & 1 != 0, x[0], 0.0),)
        for place in tl.static_range(1, 16):
            zeroed = zeroed + (tl.where(kept & (1 << place) != 0, x[place], 0.0),)
        x = zeroed
    codes = _index_codes(mask)
    w = (
        _two_kept(x[0], x[1], x[2], x[3], mask, 0, DTYPE),
        _two_kept(x[4], x[5], x[6], x[7], mask, 4, DTYPE),
        _two_kept(x[8], x[9], x[10], x[11], mask, 8, DTYPE),
        _two_kept(x[12], x[13], x[14], x[15], mask, 12, DTYPE),
    )
    _store(packed_ptr, w, codes & 0xFFFF, n, k, N, K)
    if GREEDY:
        cols = mask >> 16
    else:
        cols = mask >> 16
    w = (
        tl.trans(_two_kept(x[0], x[4], x[8], x[12], cols, 0, DTYPE)),
        tl.trans(_two_kept(x[1], x[5], x[9], x[13], cols, 4, DTYPE)),
        tl.trans(_two_kept(x[2], x[6], x[10], x[14], cols, 8, DTYPE)),
        tl.trans(_two_kept(x[3], x[7], x[11], x[15], cols, 12, DTYPE)),
    )
    _store(packed_t_ptr, w, tl.trans((codes >> 16) & 0xFFFF), k, n, K, N)
