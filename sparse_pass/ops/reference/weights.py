"""The reference of 2:4 weights, plain torch on any device, and of the packed layouts.

Letters: W is a weight [N, K]; a *tile* is 4 rows by 4 columns of it; a *group* is four neighbours of one row.
The Triton kernels give the same bits as these functions, ties and rounding included.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ...vocabulary import Layout

# The six pairs of columns in lexicographic order, so that pair 5 - e is the complement of pair e, and the three ways
# to split the four columns into two pairs.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_SPLITS = ((0, 5), (1, 4), (2, 3))


def _crossed(pair: int, top: int, swapped: int) -> set[int]:
    """Rows top and top + 1 keep one column of `pair` each: the left one above, or below if swapped."""
    left, right = _PAIRS[pair]
    above, below = (right, left) if swapped else (left, right)
    return {4 * top + above, 4 * top + 4 + below}


def _halved(pair: int, swapped: int) -> set[int]:
    """Rows 0 and 1 both keep the left column of `pair` and rows 2 and 3 the right one, or the other way round."""
    left, right = _PAIRS[pair]
    upper, lower = (right, left) if swapped else (left, right)
    return {upper, 4 + upper, 8 + lower, 12 + lower}


def _list_masks() -> tuple[frozenset[int], ...]:
    """List all transposable tile masks as sets of row-major places, in the order that settles ties.

    204 entries for 90 masks: a mask ranks where it comes first. Three kinds, by what rows 0 and 1 do with a column:
    48 keep one pair of columns once each and one of the other two columns twice; 12 keep two columns twice;
    144 keep every column once. Rows 2 and 3 keep the rest.
    """
    bits = (0, 1)
    mixed = (
        _crossed(e, 0, upper) | _crossed(e, 2, lower) | _halved(5 - e, half)
        for e in range(6)
        for upper, lower, half in itertools.product(bits, bits, bits)
    )
    twice = (
        _halved(one, left) | _halved(two, right)
        for one, two in _SPLITS
        for left, right in itertools.product(bits, bits)
    )
    once = (
        _crossed(one, 0, a) | _crossed(two, 0, b) | _crossed(three, 2, c) | _crossed(four, 2, d)
        for (one, two), a, b, (three, four), c, d in itertools.product(_SPLITS, bits, bits, _SPLITS, bits, bits)
    )
    return tuple(frozenset(places) for places in itertools.chain(mixed, twice, once))


MASK_LIST = _list_masks()
_MASK_TABLE = torch.tensor([[place in places for place in range(16)] for places in MASK_LIST], device="cpu")


def mask24(weight: Tensor, mask: str) -> Tensor:
    """Choose the transposable 2:4 mask of `weight`: at most two kept in every row and every column of a 4x4 tile.

    weight: [N, K] floating point, N and K multiples of 4, any strides. Returns bool [N, K], contiguous.
    Magnitudes are compared in float32 (in float64 for float64); NaN counts as +inf.

    "optimal": the mask of largest sum of magnitudes among the 90 that keep two per row and per column; ties go to
    the one that comes first in MASK_LIST. In floating point the sums are rounded, so `_optimal` is the definition:
    the order of its additions and comparisons counts.

    "greedy": torch core's `largest_abs_values_greedy`. Visit the sixteen entries of a tile from large to small and
    keep each whose row and column have fewer than two kept. It may end with fewer than eight. Ties go to the
    lower row-major index (torch's own tie order is whatever its sorting network gives).
    """
    rows, cols = weight.shape
    magnitude = weight.detach()
    if magnitude.dtype != torch.float64:
        magnitude = magnitude.to(torch.float32)
    magnitude = magnitude.abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    # [4 * 4, tiles]: one contiguous line of tiles for each place in a tile
    lines = magnitude.reshape(rows // 4, 4, cols // 4, 4).permute(1, 3, 0, 2).reshape(16, -1)
    select = _optimal if mask == "optimal" else _greedy
    # Small pieces stay in a CPU's cache; a GPU wants few launches and has 100 bytes a tile to spare.
    piece = 1 << (14 if weight.device.type == "cpu" else 20)
    kept = torch.empty_like(lines, dtype=torch.bool)
    for start in range(0, lines.shape[1], piece):
        kept[:, start : start + piece] = select(lines[:, start : start + piece])
    return kept.view(4, 4, rows // 4, cols // 4).permute(2, 0, 3, 1).reshape(rows, cols)


def _optimal(lines: Tensor) -> Tensor:
    """lines: magnitudes [16, T]. Returns bool [16, T].

    The 90 sums share their parts, so that 31 comparisons decide. With a[i][j] a tile, rows 0 and 1 its upper half:
        column[h][j]  = a[2h][j] + a[2h + 1][j]
        crossed[h][e] = max(a[2h][x] + a[2h + 1][y], a[2h][y] + a[2h + 1][x])              e = (x, y) of _PAIRS
        halved[e]     = max(column[0][x] + column[1][y], column[0][y] + column[1][x])
        mixed[e]      = (crossed[0][e] + crossed[1][e]) + halved[5 - e]
        twice[s]      = halved[e] + halved[f]                                              s = (e, f) of _SPLITS
        once          = max over s (crossed[0][e] + crossed[0][f]) + the same of half 1
    The largest of the six mixed, three twice and one once wins. The first of equals wins in every max.
    """
    tile = lines.view(4, 4, -1)
    column = [tile[2 * h] + tile[2 * h + 1] for h in range(2)]
    crossed = [[_crosswise(tile[2 * h], tile[2 * h + 1], left, right) for left, right in _PAIRS] for h in range(2)]
    halved = [_crosswise(column[0], column[1], left, right) for left, right in _PAIRS]

    candidates: list[_Choice] = []
    for e in range(6):
        both = _both(crossed[0][e], crossed[1][e], 2)
        candidates.append(_both(both, halved[5 - e], 2))
    candidates += [_both(halved[e], halved[f], 2) for e, f in _SPLITS]
    upper, lower = (_first_largest([_both(half[e], half[f], 2) for e, f in _SPLITS], [4, 4, 4]) for half in crossed)
    candidates.append(_both(upper, lower, 12))
    _, number = _first_largest(candidates, [8] * 6 + [4] * 3 + [144])

    return _MASK_TABLE.to(lines.device).index_select(0, number.int()).T


# A sum of magnitudes, float [T], and which of its alternatives it took: uint8 [T], numbered as in MASK_LIST.
_Choice = tuple[Tensor, Tensor]


def _crosswise(above: Tensor, below: Tensor, left: int, right: int) -> _Choice:
    straight, swapped = above[left] + below[right], above[right] + below[left]
    return torch.maximum(straight, swapped), (swapped > straight).to(torch.uint8)


def _both(one: _Choice, two: _Choice, alternatives: int) -> _Choice:
    """Add two choices, of which the second has `alternatives`."""
    return one[0] + two[0], one[1] * alternatives + two[1]


def _first_largest(choices: list[_Choice], alternatives: list[int]) -> _Choice:
    largest, number = choices[0]
    start = alternatives[0]
    for (candidate, place), count in zip(choices[1:], alternatives[1:], strict=True):
        number = torch.where(candidate > largest, place + start, number)
        largest = torch.maximum(largest, candidate)
        start += count
    return largest, number


def _greedy(lines: Tensor) -> Tensor:
    """lines: magnitudes [16, T]. Returns bool [16, T]."""
    order = lines.sort(dim=0, descending=True, stable=True).indices
    tiles = lines.shape[1]
    kept = torch.zeros_like(lines, dtype=torch.bool)
    in_row = torch.zeros(4, tiles, dtype=torch.int8, device=lines.device)
    in_col = torch.zeros_like(in_row)
    for place in order.split(1):
        row, col = place // 4, place % 4
        keep = (in_row.gather(0, row) < 2) & (in_col.gather(0, col) < 2)
        kept.scatter_(0, place, keep)
        in_row.scatter_add_(0, row, keep.to(torch.int8))
        in_col.scatter_add_(0, col, keep.to(torch.int8))
    return kept


def pack(weight: Tensor, mask: Tensor, layout: Layout = "sm90") -> Tensor:
    """Compress weight * mask into a layout that kernels read, `vocabulary.LAYOUTS`.

    weight: [N, K] of 16 bits, or float8 in the layout "sm90"; N and K multiples of 64, N of 128 in the layout "sm80";
    mask: bool [N, K], at most two in a group of four. Returns 1-D, weight's dtype, `packed_numel` elements: N * K / 2
    values, row-major [N, K / 2], each group's two in column order; then N * K / 8 bytes of metadata, a nibble
    i0 | i1 << 2 (i0 < i1 the kept columns) a group, in the order of the layout, see `_METADATA`: an even position is
    the low half of its byte. "dense" is not compressed: N * K values, row-major, zero where the mask is.

    A kept zero keeps its index. A group with fewer than two kept takes its lowest free columns, with value 0.
    """
    rows, cols = weight.shape
    if layout == "dense":
        return weight.detach().masked_fill(~mask, 0).flatten()
    kept = mask.reshape(rows, cols // 4, 4)
    # Stable and descending: kept columns first, then free ones, each in column order; two of them, sorted again.
    index = kept.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :2]
    index = index.sort(dim=-1).values
    bits = weight.detach().contiguous().view(torch.uint8 if weight.dtype.itemsize == 1 else torch.int16)
    values = bits.masked_fill(~mask, 0).reshape(rows, cols // 4, 4).gather(-1, index)
    codes = (index[..., 0] | index[..., 1] << 2).to(torch.uint8)

    shape, order = _metadata_bits(rows, cols, weight.dtype, layout)
    nibbles = codes.view(shape).permute(order).reshape(-1, 2)
    metadata = nibbles[:, 0] | nibbles[:, 1] << 4
    return torch.cat([values.reshape(-1), metadata.view(values.dtype)]).view(weight.dtype)


# Where the nibble of row r and group g = column / 4 is: the sizes of the parts that r and g are taken apart into, the
# highest bits first and whatever is above them before; and all parts in the order in which they are stored, counted
# from those of r, the first being 0.
#   "sm90": tiles of 64x64 in row-major order, in each g3 r54 r210 g10 g2 r3. Byte-equal to torch._cslt_compress on an
#       H200 with cuSPARSELt 0.8.0; 8-bit types have r54 r210 g21 g3 r3 g0.
#   "sm80": tiles of 128x64 in column-major order, in each g3 r65 r210 r4 g2 r3 g10. As torch core writes it for
#       cuSPARSELt on SM8x, torch._sparse_semi_structured_tile(use_cutlass=False).
#   "cutlass": tiles of 32x32 in column-major order, in each r210 r4 g2 r3 g10. As torch core writes it for CUTLASS,
#       use_cutlass=True, and as torch.sparse._semi_structured_conversions defines it.
_METADATA: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "sm90": ((4, 2, 8), (2, 2, 4), (0, 4, 5, 1, 3, 7, 6, 2)),
    "sm90, 8 bits": ((4, 2, 8), (2, 4, 2), (0, 4, 1, 3, 6, 5, 2, 7)),
    "sm80": ((4, 2, 2, 8), (2, 2, 4), (5, 0, 6, 1, 4, 2, 7, 3, 8)),
    "cutlass": ((2, 2, 8), (2, 4), (4, 0, 3, 1, 5, 2, 6)),
}


def _metadata_bits(rows: int, cols: int, dtype: torch.dtype, layout: Layout) -> tuple[list[int], tuple[int, ...]]:
    """How [rows, cols / 4] nibbles are taken apart, and in which order they are stored."""
    of_rows, of_groups, order = _METADATA[f"{layout}, 8 bits" if dtype.itemsize == 1 else layout]
    whole, groups = math.prod(of_rows), math.prod(of_groups)
    if rows % whole or cols // 4 % groups:
        raise ValueError(f"[{rows}, {cols}] is not made of tiles of {whole}x{4 * groups}, as the layout {layout!r} is")
    return [rows // whole, *of_rows, cols // 4 // groups, *of_groups], order


def unpack(packed: Tensor, rows: int, cols: int, layout: Layout = "sm90") -> Tensor:
    """Inverse of `pack`: the dense [rows, cols] matrix with zeros where nothing was kept."""
    if layout == "dense":
        return packed.view(rows, cols)
    half = rows * cols // 2
    bits = packed.view(torch.uint8 if packed.dtype.itemsize == 1 else torch.int16)
    values = bits[:half].view(rows, cols // 4, 2)
    metadata = bits[half:].view(torch.uint8)
    nibbles = torch.stack([metadata & 15, metadata >> 4], dim=-1)
    shape, order = _metadata_bits(rows, cols, packed.dtype, layout)
    stored = nibbles.view([shape[at] for at in order])
    codes = stored.permute([order.index(at) for at in range(len(order))]).reshape(rows, cols // 4)
    index = torch.stack([codes & 3, codes >> 2], dim=-1).long()
    dense = bits.new_zeros(rows, cols // 4, 4)
    return dense.scatter_(-1, index, values).view(rows, cols).view(packed.dtype)


def sparsify(
    weight: Tensor,
    mask: str,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    layout: Layout = "sm90",
) -> tuple[Tensor, Tensor]:
    """scale * S(W) and its transpose packed: the mask is chosen on `weight` as stored, in whose dtype the product by
    `scale` is rounded; then the values are rounded to `dtype`."""
    kept = mask24(weight, mask)
    values = weight.detach() if scale == 1 else weight.detach() * scale
    values = values.to(dtype or weight.dtype)
    return pack(values, kept, layout), pack(values.T, kept.T, layout)


def sparsify_one(
    weight: Tensor,
    mask: str,
    transposed: bool,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    layout: Layout = "sm90",
) -> Tensor:
    """One of the two."""
    return sparsify(weight, mask, dtype, scale, layout)[int(transposed)]
