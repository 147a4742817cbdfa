"""Check that weights are 2:4, as hardware and file formats take them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import Config
from .ops.shards import local, why_not_whole_tiles
from .prune import PrunedWeight, pruned_weights, site_of
from .report import Report
from .vocabulary import TILE

_AT_MOST = 8
"""How many layers an error lists."""


def verify24(model: nn.Module, config: Config) -> Report:
    """Check that the named weights are 2:4 along rows and along columns, as :func:`prune_` leaves them.

    Every four neighbours that start at a multiple of 4 must have at most two nonzeros, NaN counting as one, along both
    dims. Of a weight that is sharded over processes (DTensor) the part of this process is checked.

    Args:
        model: any module; compiled or wrapped ones too.
        config: names to schemes, as for :func:`prune_`, which says which weights are checked.

    Returns:
        Report: as of :func:`prune_`: ``sparse`` for what was checked, ``skipped`` for what ``prune_`` leaves dense.

    Raises:
        ValueError: weights that are not 2:4, each with its first group of four that has more than two nonzeros; a
            weight without data (meta device), or a part of one that cuts tiles; and what ``prune_`` refuses.
    """
    found = list(pruned_weights(model, config))
    wrong = [f"{one.name!r} {why}" for one in found if one.sparsity is not None and (why := _first_bad_group(one))]
    if wrong:
        more = f"; and {len(wrong) - _AT_MOST} more" if len(wrong) > _AT_MOST else ""
        raise ValueError(
            f"{len(wrong)} of {len(found)} named weight(s) are not 2:4: {'; '.join(wrong[:_AT_MOST])}{more}. Call"
            " prune_(model, config) after the last step of the optimizer"
        )
    return Report(sites=tuple(map(site_of, found)))


def _first_bad_group(one: PrunedWeight) -> str:
    weight = local(one.weight.detach())
    if weight.is_meta:
        raise ValueError(f"{one.name!r} is on the meta device: load its data before verify24")
    if reason := why_not_whole_tiles(weight):
        raise ValueError(f"{one.name!r} cannot be checked: {reason}, or gather it with full_tensor()")
    # Groups of the transpose are those along the columns.
    for line, across, matrix in (("row", "columns", weight), ("column", "rows", weight.t())):
        bad = _bad_groups(matrix)
        if bad.any():
            index, group = (int(i) for i in bad.nonzero()[0])
            start = group * TILE
            values = matrix[index, start : start + TILE].tolist()
            return f"has {values} in {line} {index}, {across} {start} to {start + TILE - 1}"
    return ""


def _bad_groups(matrix: Tensor) -> Tensor:
    """bool [rows, columns / 4]: which groups of four have more than two nonzeros."""
    nonzeros: Tensor = (matrix != 0).unflatten(1, (-1, TILE)).sum(-1, dtype=torch.uint8)
    return nonzeros > TILE // 2
