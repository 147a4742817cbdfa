"""The reference of every kernel: plain torch on any device, and the oracle of the tests.

Letters: W is a weight [N, K]; a *tile* is 4 rows by 4 columns of it; a *group* is four neighbours of one row.
The Triton kernels give the same bits as these functions, ties and rounding included.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

MASKS = ("optimal", "greedy")

# The six ways to keep two of four columns, in lexicographic order.
PAIRS: tuple[tuple[int, int], ...] = tuple(itertools.combinations(range(4), 2))


def _pair_classes() -> tuple[tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]], ...]:
    """Group the 90 tile masks by d, how often rows 0 and 1 together use each of the four columns.

    Returns 19 entries in lexicographic order of d, each (upper, lower): the (row 0, row 1) pairs that add up to d
    and the (row 2, row 3) pairs that add up to 2 - d, as indices into PAIRS, ordered by the first. Every upper goes
    with every lower of its class, which is what makes 36 + 36 + 19 sums enough for 90 masks.
    """
    by_counts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for first, second in itertools.product(range(6), repeat=2):
        counts = [0, 0, 0, 0]
        for column in PAIRS[first] + PAIRS[second]:
            counts[column] += 1
        by_counts.setdefault(tuple(counts), []).append((first, second))
    return tuple(
        (tuple(by_counts[d]), tuple(by_counts[tuple(2 - count for count in d)]))
        for d in sorted(by_counts)
    )


CLASSES = _pair_classes()


def mask24(weight: Tensor, mask: str) -> Tensor:
    """Choose the transposable 2:4 mask of `weight`: at most two kept in every row and every column of a 4x4 tile.

    weight: [N, K] floating point, N and K multiples of 4, any strides. Returns bool [N, K], contiguous.
    Magnitudes are compared in float32 (in float64 for float64); NaN counts as +inf.

    "optimal": the mask with the largest sum of magnitudes of the 90 that keep two per row and per column.
    Ties go to the first in the order (d, pair of row 0, pair of row 2), d being the column counts of rows 0 and 1
    (`_pair_classes`) and a pair its place in PAIRS. In floating point the sums are rounded, so the order of the
    additions is part of the definition: a pair is a[left] + a[right]; each class takes the first largest
    row0 + row1 and the first largest row2 + row3; then the first largest upper + lower among classes wins.

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
    """lines: magnitudes [16, T]. Returns bool [16, T]."""
    tile = lines.view(4, 4, -1)
    pairs = [[tile[row, left] + tile[row, right] for left, right in PAIRS] for row in range(4)]
    best = torch.full_like(lines[0], -1)
    # The number of the winning mask among the 90, in the documented order.
    code = torch.zeros_like(best, dtype=torch.uint8)
    first = 0
    for upper, lower in CLASSES:
        above, upper_index = _first_largest(pairs[0], pairs[1], upper)
        below, lower_index = _first_largest(pairs[2], pairs[3], lower)
        total = above + below
        code = torch.where(total > best, first + len(lower) * upper_index + lower_index, code)
        best = torch.maximum(best, total)
        first += len(upper) * len(lower)
    return _mask_table(lines.device).index_select(0, code.int()).T


def _first_largest(
    row: list[Tensor], next_row: list[Tensor], choices: tuple[tuple[int, int], ...]
) -> tuple[Tensor, Tensor]:
    """Return the largest sum of one entry of each row among `choices`, and the place of the first that has it."""
    largest = row[choices[0][0]] + next_row[choices[0][1]]
    place = torch.zeros_like(largest, dtype=torch.uint8)
    for index, (a, b) in enumerate(choices[1:], start=1):
        candidate = row[a] + next_row[b]
        place = torch.where(candidate > largest, index, place)
        largest = torch.maximum(largest, candidate)
    return largest, place


def _mask_table(device: torch.device) -> Tensor:
    """The 90 masks in the documented order: bool [90, 16]."""
    table = [
        [column in PAIRS[pair] for pair in (*above, *below) for column in range(4)]
        for upper, lower in CLASSES
        for above in upper
        for below in lower
    ]
    return torch.tensor(table, device=device)


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


def pack(weight: Tensor, mask: Tensor) -> Tensor:
    """Compress weight * mask into the SM90 layout of cuSPARSELt for 16-bit types.

    weight: [N, K] float16 or bfloat16, N and K multiples of 64; mask: bool [N, K], at most two in a group of four.
    Returns 1-D, weight's dtype, N * K * 9 / 16 elements: N * K / 2 values, row-major [N, K / 2], each group's two in
    column order; then N * K / 8 bytes of metadata, a nibble i0 | i1 << 2 (i0 < i1 the kept columns) a group.

    A kept zero keeps its index. A group with fewer than two kept takes its lowest free columns, with value 0.

    Within a 64x64 tile of W (512 bytes; tiles in row-major order) the nibble of row r and group g = column / 4 has
    the ten-bit position g3 r5 r4 r2 r1 r0 g1 g0 g2 r3; an even position is the low half of its byte. Byte-equal to
    torch._cslt_compress on an H200 with cuSPARSELt 0.8.0.
    """
    rows, cols = weight.shape
    kept = mask.reshape(rows, cols // 4, 4)
    # Stable and descending: kept columns first, then free ones, each in column order; two of them, sorted again.
    index = kept.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :2]
    index = index.sort(dim=-1).values
    groups = weight.detach().masked_fill(~mask, 0).reshape(rows, cols // 4, 4)
    values = groups.gather(-1, index)
    codes = (index[..., 0] | index[..., 1] << 2).to(torch.uint8)

    bits = codes.view(rows // 64, 4, 2, 8, cols // 64, 2, 2, 4)  # R, r54, r3, r210, C, g3, g2, g10
    nibbles = bits.permute(0, 4, 5, 1, 3, 7, 6, 2).reshape(-1, 2)
    metadata = nibbles[:, 0] | nibbles[:, 1] << 4
    return torch.cat([values.reshape(-1), metadata.view(weight.dtype)])


def unpack(packed: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `pack`: the dense [rows, cols] matrix with zeros where nothing was kept."""
    half = rows * cols // 2
    values = packed[:half].view(rows, cols // 4, 2)
    metadata = packed[half:].view(torch.uint8)
    nibbles = torch.stack([metadata & 15, metadata >> 4], dim=-1)
    bits = nibbles.view(rows // 64, cols // 64, 2, 4, 8, 4, 2, 2)  # R, C, g3, r54, r210, g10, g2, r3
    codes = bits.permute(0, 3, 7, 4, 1, 2, 6, 5).reshape(rows, cols // 4)
    index = torch.stack([codes & 3, codes >> 2], dim=-1).long()
    dense = packed.new_zeros(rows, cols // 4, 4)
    return dense.scatter_(-1, index, values).view(rows, cols)


def sparsify(weight: Tensor, mask: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S(W) and S(W)^T packed: the mask is chosen on `weight` as stored, the values are rounded to `dtype` after."""
    kept = mask24(weight, mask)
    values = weight.detach().to(dtype)
    return pack(values, kept), pack(values.T, kept.T)
