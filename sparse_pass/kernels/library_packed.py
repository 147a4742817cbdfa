"""Operands for a device whose layout is known to cuSPARSELt alone: masked here, packed by the library.

One Triton kernel reads W and writes S(W) and S(W)^T as dense matrices; `compressor` packs each of them. Functions take
what their namesakes in `sparsify` and `mvue` take. Compiled code calls them too, see `ops.lowering`; its products are
those of `compiled`, as the plans of cuSPARSELt know nothing of layouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..vocabulary import padded
from . import mvue
from . import sparsify as masked
from .compiled import (
    grad_input_into,
    grad_weight_into,
    grad_weight_t_into,
    input_grad_weight_into,
    input_linear_into,
    linear_into,
)
from .compressor import pack

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


def sparsify(weight: Tensor, mask: str, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    dense, dense_t = masked.sparsify(weight, mask, dtype, scale, "dense")
    return pack(dense.view(rows, cols)), pack(dense_t.view(cols, rows))


def sparsify_one(weight: Tensor, mask: str, transposed: bool, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    rows, cols = weight.shape
    dense = masked.sparsify_one(weight, mask, transposed, dtype, scale, "dense")
    return pack(dense.view((cols, rows) if transposed else (rows, cols)))


def sparsify_input(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> tuple[Tensor, Tensor]:
    rows, cols = padded(input.shape[0]), input.shape[1]
    dense, dense_t = masked.sparsify_input(input, gate, mask, activation, "dense")
    return pack(dense.view(rows, cols)), pack(dense_t.view(cols, rows))


def sparsify_mvue(grad: Tensor, seed: Tensor) -> Tensor:
    return pack(_turned(mvue.mvue24(grad, seed)))


def sparsify_mvue_sum(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    estimate, sums = mvue.mvue24_sum(grad, seed)
    return pack(_turned(estimate)), sums


def _turned(estimate: Tensor) -> Tensor:
    """The transpose, with zeros up to whole tiles."""
    rows, cols = estimate.shape
    whole = padded(cols), padded(rows)
    if whole == (cols, rows):
        return estimate.T
    turned = estimate.new_zeros(whole)
    turned[:cols, :rows].copy_(estimate.T)
    return turned
