"""Memory of packed matrices, with room for what cuSPARSELt reads past their end.

A packed [N, K] matrix ends with its metadata, 64 rows after 64 rows. A float16 kernel of cuSPARSELt 0.8.0 fetches them
for tiles of 64 by 128: where K is an odd multiple of 64 the last fetch ends 512 bytes behind the matrix, in the size
that the library itself asks for (``compute-sanitizer`` on an H100). What is read there is multiplied by zeros, but it
has to be memory: behind the last allocation of a block from the driver there may be none.
"""

from __future__ import annotations

import torch
from torch import Tensor

# See cusparselt.
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from ..vocabulary import packed_numel

ROOM = 2048
"""Bytes: all metadata of a tile of 64 by 256, twice as wide as the one that was seen."""
_TILE_COLS = 256


def reads_past_end(cols: int) -> bool:
    """Whether a packed matrix of so many columns may be read past its end."""
    return cols % _TILE_COLS != 0


def empty_packed(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory for a packed matrix of a dtype on the current device: words, int32; of 8-bit values int16. rows, cols:
    multiples of 64."""
    word = torch.int16 if dtype.itemsize == 1 else torch.int32
    words = packed_numel(rows, cols, dtype) // 2
    if not reads_past_end(cols):
        return _empty_strided_cuda((words,), (1,), word)  # type: ignore[no-any-return]
    return _empty_strided_cuda((words + ROOM // word.itemsize,), (1,), word)[:words]  # type: ignore[no-any-return]


def with_room(packed: Tensor) -> Tensor:
    """The packed matrix, contiguous; a copy if it is not followed by `ROOM` bytes of its own storage."""
    size = packed.element_size()
    if packed.untyped_storage().nbytes() >= (packed.storage_offset() + packed.numel()) * size + ROOM:
        return packed
    return packed.new_empty(packed.numel() + ROOM // size)[: packed.numel()].copy_(packed)
