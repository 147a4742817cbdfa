"""The reference of products with a structured operand, plain torch on any device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...vocabulary import FLOAT8, FLOAT8_OUTPUT, PRODUCTS, Form, padded
from .weights import unpack


def product(form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None = None) -> Tensor:
    """Multiply as the form says: packed A [N, K], its rows padded to whole tiles, and B -> D, contiguous."""
    spec = PRODUCTS[form]
    _, k = spec.dense_shape(*dense.shape)
    a = unpack(packed, padded(n) if spec.rows == "n" else n, padded(k) if spec.rows == "k" else k)[:n, :k]
    dense = dense.contiguous()
    if dense.dtype == FLOAT8:
        b = dense.float() if spec.b_transposed else dense.float().T
        made = F.linear(b, a.float())
        return (made if spec.d_transposed else made.T.contiguous()).to(FLOAT8_OUTPUT)
    if spec.d_transposed:
        return F.linear(dense if spec.b_transposed else dense.T, a, bias)
    return a @ (dense.T if spec.b_transposed else dense)
