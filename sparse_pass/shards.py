"""What is known of a weight of which each rank computes with a shard, as tensor parallelism does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .vocabulary import TILE

_DIMS = ("rows", "columns")


@dataclass(frozen=True, slots=True)
class Split:
    """A dim of a tensor that one dim of a mesh splits."""

    dim: int
    count: int
    """How many ranks the mesh dim has."""
    mesh_dim: str
    """Its name, or its place in the mesh."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How ranks share a tensor. It is the same on all of them."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    splits: tuple[Split, ...]

    def __str__(self) -> str:
        ways = [f"{_DIMS[one.dim]} in {one.count} over mesh dim {one.mesh_dim!r}" for one in self.splits]
        return f"{list(self.shape)}, {', '.join(ways)}"

    def why_tiles_are_split(self) -> str | None:
        """Why a shard on some rank has a dim that is no multiple of 4; None if all shards hold whole tiles of 4x4.

        Asked of the whole, so that every rank comes to the same answer, whatever its own shard is.
        """
        for one in self.splits:
            size, parts = self.shape[one.dim], [other.count for other in self.splits if other.dim == one.dim]
            if not keeps_tiles(size, parts):
                shard = f"{one.count} shards of {-(-size // one.count)} {_DIMS[one.dim]}"
                return (
                    f"the weight is {list(self.shape)}, and mesh dim {one.mesh_dim!r} splits it into {shard}:"
                    f" 2:4 masks need the dims of every shard to be multiples of {TILE};"
                    f" pad the layer to a multiple of {TILE * one.count} or leave it dense (map it to None)"
                )
        return None


def keeps_tiles(size: int, parts: Sequence[int]) -> bool:
    """Whether all shards of a dim are whole tiles. One split may leave the last ranks less, as torch's chunks do.

    Args:
        parts: into how many it is split, and each of these again.
    """
    if len(parts) == 1:
        return size % TILE == 0 and -(-size // parts[0]) % TILE == 0
    for count in parts:
        if size % (TILE * count):
            return False
        size //= count
    return True


def sharding_of(tensor: Any) -> Sharding | None:
    """How a DTensor of two dims is shared; None if each rank has all of it."""
    splits = []
    names = tensor.device_mesh.mesh_dim_names
    for place, (count, placement) in enumerate(zip(tensor.device_mesh.shape, tensor.placements, strict=True)):
        dim = getattr(placement, "dim", None)  # also of a shard that is strided, as of FSDP2 above tensor parallelism
        if dim is not None:
            splits.append(Split(dim, count, names[place] if names else str(place)))
    return Sharding(tuple(tensor.shape), tuple(splits)) if splits and tensor.dim() == 2 else None
