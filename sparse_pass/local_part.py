"""The part of a sharded parameter that this process holds."""

from __future__ import annotations

from torch import Tensor

from .ops.shards import local
from .vocabulary import TILE


def local_part(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, as of FSDP2 or of tensor parallelism; any other tensor itself."""
    return local(tensor.detach())


def why_not_whole_tiles(part: Tensor) -> str:
    """Why masks cannot be found in the part of a weight whose dims are multiples of 4; else "".

    Parts are consecutive and all but the last are of one size. So if the dims of a part are multiples of 4, it begins
    and ends between tiles, and the mask of the part is the part of the mask.
    """
    if all(dim % TILE == 0 for dim in part.shape):
        return ""
    return f"its part here is {list(part.shape)}, which cuts the 4x4 tiles of the mask: shard it in multiples of 4"
