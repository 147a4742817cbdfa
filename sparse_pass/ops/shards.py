"""Masks of weights that are spread over ranks, as DTensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..shards import sharding_of
from ..vocabulary import TILE


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Asks no module of torch.distributed that is not there already."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: all of it, if it is no DTensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def why_not_whole_tiles(part: Tensor) -> str:
    """Why masks cannot be found in the part of a weight whose dims are multiples of 4; else "".

    Parts are consecutive and all but the last are of one size. So if the dims of a part are multiples of 4, it begins
    and ends between tiles, and the mask of the part is the part of the mask.
    """
    if all(dim % TILE == 0 for dim in part.shape):
        return ""
    return f"its part here is {list(part.shape)}, which cuts the 4x4 tiles of the mask: shard it in multiples of 4"


def mask_of_shards(weight: Any, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """The mask of a DTensor [N, K], placed as the DTensor is.

    Each rank chooses the mask of its own shard where no shard ends inside of a tile. Otherwise all ranks gather the
    weight, and keep their part of its mask: one collective for each such weight, which all ranks of its mesh must join.

    Args:
        weight: of the same shape and placements on all ranks, so that all take the same of the two ways.
        choose: the mask of a plain tensor.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements
    sharding = sharding_of(weight)
    if not any(one.is_partial() for one in placements) and (sharding is None or not sharding.why_tiles_are_split()):
        mask = choose(weight.to_local())
        return DTensor.from_local(mask, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride())
    return distribute_tensor(choose(weight.full_tensor()), mesh, placements, src_data_rank=None)
