"""cuSPARSELt through torch: any layout, but a plan is built in every call, 365 to 515 us of host time on an H200."""

from __future__ import annotations

import torch
from torch import Tensor

from ..vocabulary import PRODUCTS, Form
from .cusparselt import realigned


def compress(masked: Tensor) -> Tensor:
    """Pack a masked matrix [N, K], float16 or bfloat16, in the layout of its device: 1-D, `packed_numel` elements."""
    return torch._cslt_compress(masked.contiguous()).reshape(-1)


def product(
    form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, tuned: bool = False
) -> Tensor:
    """Multiply as `cusparselt.product` does, whose operands it takes, with the packed matrix from `compress`."""
    spec = PRODUCTS[form]
    # torch hands the addresses on as they are, and takes the number of rows from the shape.
    dense, matrix = realigned(dense), realigned(packed).view(n, -1)
    bias = None if bias is None else realigned(bias)
    b = dense.T if spec.b_transposed else dense
    if form == "linear":
        return torch._cslt_sparse_mm(matrix, b, bias=bias, transpose_result=True)
    d = torch._cslt_sparse_mm(matrix, b)
    return d.T.contiguous() if spec.d_transposed else d
