"""What compiled code calls, see `lowering`: no checks, on the current device, SM90 layout."""

from __future__ import annotations

from torch import Tensor

from . import cusparselt, tuner
from .mvue import sparsify_mvue, sparsify_mvue_sum
from .problem import Form
from .sparsify import sparsify, sparsify_input, sparsify_one

__all__ = [
    "grad_weight_into",
    "input_grad_weight_into",
    "input_linear_into",
    "linear_into",
    "sparsify",
    "sparsify_input",
    "sparsify_mvue",
    "sparsify_mvue_sum",
    "sparsify_one",
]


def linear_into(input: Tensor, packed: Tensor, bias: Tensor | None = None, *, tuned: bool, out: Tensor) -> None:
    """``out`` = input S(W)^T + bias: input [M, K] and out [M, N] contiguous, M a positive multiple of 8."""
    multiply = tuner.linear if tuned else cusparselt.linear
    multiply(input, packed, bias, out.shape[1], out)


def _product(form: Form, packed: Tensor, dense: Tensor, rows: int, tuned: bool, out: Tensor) -> None:
    multiply = tuner.product if tuned else cusparselt.product
    multiply(form, dense, packed, rows, out)


def grad_weight_into(packed: Tensor, input: Tensor, *, tuned: bool, out: Tensor) -> None:
    """``out`` = MVUE(grad_output)^T input: packed as `sparsify_mvue` returns it, input [M, K] and out [N, K]
    contiguous, M a positive multiple of 64, K one of 8."""
    _product("grad_weight", packed, input, out.shape[0], tuned, out)


def input_linear_into(packed: Tensor, weight: Tensor, *, tuned: bool, out: Tensor) -> None:
    """``out`` = S(x) weight^T: packed as `sparsify_input` returns it, weight [N, K] and out [M, N] contiguous, M a
    positive multiple of 64, N a multiple of 8."""
    _product("input", packed, weight, out.shape[0], tuned, out)


def input_grad_weight_into(packed_t: Tensor, grad_output: Tensor, *, tuned: bool, out: Tensor) -> None:
    """``out`` = grad_output^T S(x): packed_t as `sparsify_input` returns it, grad_output [M, N] and out [N, K]
    contiguous, M a positive multiple of 64, N one of 8."""
    _product("input_grad_weight", packed_t, grad_output, out.shape[1], tuned, out)
