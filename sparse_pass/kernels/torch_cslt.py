"""cuSPARSELt through torch: any layout, but a plan is built in every call, 365 to 515 us of host time on an H200."""

from __future__ import annotations

import torch
from torch import Tensor

from .cusparselt import realigned


def compress(masked: Tensor) -> Tensor:
    """Pack a masked weight [N, K], float16 or bfloat16, in the layout of its device: 1-D, N * K * 9 / 16 elements."""
    return torch._cslt_compress(masked.contiguous()).reshape(-1)


def linear(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Multiply as `cusparselt.linear` does, whose operands it takes, with the packed weight from `compress`."""
    # torch hands the addresses on as they are, and takes the number of rows from the shape.
    input, matrix = realigned(input), realigned(packed).view(out_features, -1)
    bias = None if bias is None else realigned(bias)
    return torch._cslt_sparse_mm(matrix, input.T, bias=bias, transpose_result=True)


def product(packed: Tensor, dense: Tensor, rows: int) -> Tensor:
    """Multiply a packed matrix [rows, K] from `compress` and a dense one [K, M] -> [rows, M]."""
    return torch._cslt_sparse_mm(realigned(packed).view(rows, -1), realigned(dense))
