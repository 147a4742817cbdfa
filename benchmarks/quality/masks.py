"""2:4 masks and soft thresholds of weights [N, K] in plain torch, made to be fused by torch.compile.

Letters: a *tile* is 4 rows by 4 columns; a *group* is four neighbours of a row (along K). Weights of several layers may
stand below each other, as N of each is a multiple of 4.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_PAIRS = tuple(itertools.combinations(range(4), 2))
_Counts = tuple[int, ...]


def find_mask(weight: Tensor, kind: str) -> Tensor:
    """weight: [N, K] float32 or float64. Returns bool [N, K], true where kept.

    "optimal" and "greedy" as `sparse_pass.mask24`, but for ties; "rows": the two largest of each group, the first of
    equals; "columns": the same along N.
    """
    if kind == "rows":
        return _two_largest(weight.abs())
    if kind == "columns":
        return _two_largest(weight.abs().T).T.contiguous()
    rows, cols = weight.shape
    tiles = weight.abs().view(rows // 4, 4, cols // 4, 4)
    bits = _optimal(tiles) if kind == "optimal" else _greedy(tiles)
    places = torch.arange(16, dtype=torch.int32, device=weight.device).view(1, 4, 1, 4)
    return (bits[:, None, :, None] >> places & 1).bool().view(rows, cols)


def _two_largest(magnitude: Tensor) -> Tensor:
    """An element is kept that fewer than two of its group beat."""
    rows, cols = magnitude.shape
    group = magnitude.reshape(rows, cols // 4, 4)
    place = torch.arange(4, device=magnitude.device)
    beaten = torch.zeros_like(group, dtype=torch.int32)
    for other in range(4):
        rival = group[..., other : other + 1]
        beaten = beaten + ((rival > group) | ((rival == group) & (place > other))).int()
    return (beaten < 2).view(rows, cols)


def _optimal(tiles: Tensor) -> Tensor:
    """tiles: magnitudes [N / 4, 4, K / 4, 4]. Returns int32 [N / 4, K / 4]; bit 4 i + j is row i, column j of a tile.

    Of the 90 masks that keep two per row and per column, the one of the largest sum. What rows 0 and 1 keep of each
    column decides how many rows 2 and 3 must keep of it; there are 19 such counts, and for each of them the halves are
    best apart.
    """
    upper, lower = _halves(tiles[:, 0], tiles[:, 1]), _halves(tiles[:, 2], tiles[:, 3])
    best: tuple[Tensor, Tensor] | None = None
    for counts, (above, above_bits) in upper.items():
        below, below_bits = lower[tuple(2 - count for count in counts)]
        best = _larger(best, above + below, above_bits | below_bits << 8)
    assert best is not None
    return best[1]


def _halves(first: Tensor, second: Tensor) -> dict[_Counts, tuple[Tensor, Tensor]]:
    """Two rows of tiles, [N / 4, K / 4, 4] each, of which two columns each are kept: by the kept of each column, the
    largest sum and its bits."""
    best: dict[_Counts, tuple[Tensor, Tensor]] = {}
    one = [first[..., x] + first[..., y] for x, y in _PAIRS]
    two = [second[..., x] + second[..., y] for x, y in _PAIRS]
    for (p, pair), (q, other) in itertools.product(enumerate(_PAIRS), enumerate(_PAIRS)):
        counts = tuple((column in pair) + (column in other) for column in range(4))
        bits = sum(1 << column for column in pair) | sum(16 << column for column in other)
        total = one[p] + two[q]
        best[counts] = _larger(best.get(counts), total, torch.full_like(total, bits, dtype=torch.int32))
    return best


def _larger(best: tuple[Tensor, Tensor] | None, total: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    if best is None:
        return total, bits
    return torch.maximum(best[0], total), torch.where(total > best[0], bits, best[1])


def _greedy(tiles: Tensor) -> Tensor:
    """As `_optimal`, but entries are visited from large to small, and kept while their row and column have room.

    `used` counts the kept of row i in bits 2 i and 2 i + 1, and of column j in bits 8 + 2 j and 9 + 2 j.
    """
    lines = tiles.permute(1, 3, 0, 2).reshape(16, *tiles.shape[::2])
    order = lines.sort(dim=0, descending=True, stable=True).indices.int()
    bits = torch.zeros_like(order[0])
    used = torch.zeros_like(order[0])
    for place in order.unbind(0):
        row, column = place >> 2 << 1, ((place & 3) << 1) + 8
        keep = ((used >> row & 3) < 2) & ((used >> column & 3) < 2)
        one = keep.int()
        used = used + (one << row) + (one << column)
        bits = bits | one << place
    return bits


def soften(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Soft thresholds: sign(w) max(|w| - t, 0) of weight [N, K], and the bool mask of what is not zero.

    "soft_rows": t is the third largest of the group, so that at most two are left, and the function is continuous
    (S-STE, arXiv 2409.09099). "soft_tile": t is the largest that the optimal mask drops in the tile.
    """
    rows, cols = weight.shape
    if kind == "soft_rows":
        group = weight.view(rows, cols // 4, 4)
        threshold = _third_largest(group.abs()).unsqueeze(-1)
    else:
        group = weight.view(rows // 4, 4, cols // 4, 4)
        kept = find_mask(weight, "optimal").view(group.shape)
        threshold = group.abs().masked_fill(kept, 0).amax(dim=(1, 3), keepdim=True)
    soft = torch.sign(group) * (group.abs() - threshold).clamp(min=0)
    if kind == "soft_tile":
        soft = soft.masked_fill(~kept, 0)
    return soft.view(rows, cols), (soft != 0).view(rows, cols)


def _third_largest(magnitude: Tensor) -> Tensor:
    """Of four: [..., 4] -> [...]."""
    a, b, c, d = magnitude.unbind(-1)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    lower, higher = torch.minimum(c, d), torch.maximum(c, d)
    return torch.minimum(torch.maximum(low, lower), torch.minimum(high, higher))
