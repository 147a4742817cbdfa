"""The reference of 2:4 masks of an input, plain torch on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference

MASKS = (*reference.MASKS, "rowwise")


def input_mask24(input: Tensor, mask: str, tile_mask: Callable[[Tensor, str], Tensor] = reference.mask24) -> Tensor:
    """Choose the 2:4 mask of an input [..., K]: bool of its shape, contiguous. K is a multiple of 4.

    The leading dims are one, M. "optimal" and "greedy" are `reference.mask24` of [M, K], with rows of zeros added up to
    a multiple of 4. "rowwise" keeps the two largest magnitudes of every four along K, of equal ones the first: what is
    kept of a row depends on that row alone. NaN counts as +inf.

    Args:
        tile_mask: computes the masks of tiles, as `reference.mask24` does.
    """
    matrix = input.detach().reshape(-1, input.shape[-1]) if input.numel() else input.detach().new_empty(0, 4)
    if mask == "rowwise":
        kept = _rowwise(matrix)
    else:
        rows = matrix.shape[0]
        kept = tile_mask(torch.nn.functional.pad(matrix, (0, 0, 0, -rows % 4)), mask)[:rows]
    return kept.reshape(input.shape)


def _rowwise(matrix: Tensor) -> Tensor:
    magnitude = matrix if matrix.dtype == torch.float64 else matrix.to(torch.float32)
    magnitude = magnitude.abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    groups = magnitude.reshape(matrix.shape[0], matrix.shape[1] // 4, 4)
    largest = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    kept = torch.zeros(groups.shape, dtype=torch.bool, device=matrix.device)
    return kept.scatter_(-1, largest, True).view(matrix.shape)
