"""Operands for SM8x, in the layout that cuSPARSELt has there: as torch core writes it, for whole tiles of 128x128.

What the library does with half of one is not known: such a matrix it packs itself. Functions take what their namesakes
in `sparsify` and `mvue` take. Compiled code calls them too, see `ops.lowering`; its products are those of `compiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..vocabulary import padded
from . import library_packed, mvue
from . import sparsify as packed
from .compiled import (
    grad_input_into,
    grad_weight_into,
    grad_weight_t_into,
    input_grad_weight_into,
    input_linear_into,
    linear_into,
)

__all__ = [
    "grad_input_into",
    "grad_weight_into",
    "grad_weight_t_into",
    "input_grad_weight_into",
    "input_linear_into",
    "linear_into",
    "sparsify",
    "sparsify_input",
    "sparsify_mvue",
    "sparsify_mvue_sum",
    "sparsify_one",
]

_TILE = 128


def _packer(ours: Callable[..., Any], of_library: Callable[..., Any]) -> Callable[..., Any]:
    def pack(source: Tensor, *how: Any) -> Any:
        if any(padded(size) % _TILE for size in source.shape):
            return of_library(source, *how)
        return ours(source, *how, layout="sm80")

    return pack


sparsify = _packer(packed.sparsify, library_packed.sparsify)
sparsify_one = _packer(packed.sparsify_one, library_packed.sparsify_one)
sparsify_input = _packer(packed.sparsify_input, library_packed.sparsify_input)
sparsify_mvue = _packer(mvue.sparsify_mvue, library_packed.sparsify_mvue)
sparsify_mvue_sum = _packer(mvue.sparsify_mvue_sum, library_packed.sparsify_mvue_sum)
