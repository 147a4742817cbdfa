"""What compiled code calls, see `lowering`: no checks, on the current device, SM90 layout."""

from __future__ import annotations

from torch import Tensor

from . import cusparselt, tuner
from .mvue import sparsify_mvue
from .sparsify import sparsify

__all__ = ["grad_weight_into", "linear_into", "sparsify", "sparsify_mvue"]


def linear_into(input: Tensor, packed: Tensor, bias: Tensor | None = None, *, tuned: bool, out: Tensor) -> None:
    """``out`` = input S(W)^T + bias: input [M, K] and out [M, N] contiguous, M a positive multiple of 8."""
    multiply = tuner.linear if tuned else cusparselt.linear
    multiply(input, packed, bias, out.shape[1], out)


def grad_weight_into(packed: Tensor, input: Tensor, *, tuned: bool, out: Tensor) -> None:
    """``out`` = MVUE(grad_output)^T input: packed as `sparsify_mvue` returns it, input [M, K] and out [N, K]
    contiguous, M a positive multiple of 64, K a multiple of 8."""
    multiply = tuner.product if tuned else cusparselt.product
    multiply("grad_weight", input, packed, out.shape[0], out)
