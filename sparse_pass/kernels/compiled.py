"""What compiled code calls, see `lowering`: no checks, on the current device, SM90 layout."""

from __future__ import annotations

from torch import Tensor

from . import cusparselt, tuner
from .sparsify import sparsify

__all__ = ["linear_into", "sparsify"]


def linear_into(input: Tensor, packed: Tensor, bias: Tensor | None = None, *, tuned: bool, out: Tensor) -> None:
    """``out`` = input S(W)^T + bias: input [M, K] and out [M, N] contiguous, M a positive multiple of 8."""
    multiply = tuner.linear if tuned else cusparselt.linear
    multiply(input, packed, bias, out.shape[1], out)
