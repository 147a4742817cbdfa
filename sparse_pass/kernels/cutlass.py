"""SM8x by torch's own CUTLASS kernels, where cuSPARSELt does not serve: they need no library and no plan.

Operands are packed in the layout of CUTLASS, by functions that take what their namesakes in `sparsify` and `mvue` take.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

# Plain torch; a module without an underscore has none of it.
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from ..vocabulary import PRODUCTS, Form
from . import mvue
from . import sparsify as packed
from .cusparselt import realigned

sparsify = partial(packed.sparsify, layout="cutlass")
sparsify_one = partial(packed.sparsify_one, layout="cutlass")
sparsify_input = partial(packed.sparsify_input, layout="cutlass")
sparsify_mvue = partial(mvue.sparsify_mvue, layout="cutlass")
sparsify_mvue_sum = partial(mvue.sparsify_mvue_sum, layout="cutlass")


def pack(masked: Tensor) -> Tensor:
    """Pack a masked matrix [R, C], float16 or bfloat16, by torch's own conversion."""
    values, metadata = sparse_semi_structured_from_dense_cutlass(masked.contiguous())
    return torch.cat([values.flatten(), metadata.flatten().view(masked.dtype)])


def product(form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None, tuned: bool) -> Tensor:
    """Multiply as `cusparselt.product` does, whose operands it takes, in the layout of CUTLASS."""
    spec = PRODUCTS[form]
    _, k = spec.dense_shape(*dense.shape)
    packed = realigned(packed)
    values, metadata = packed[: n * k // 2].view(n, -1), packed[n * k // 2 :].view(torch.int16).view(n, -1)
    dense = realigned(dense)
    b = dense.T if spec.b_transposed else dense
    if bias is None:
        d = torch._sparse_semi_structured_mm(values, metadata, b)
    else:
        d = torch._sparse_semi_structured_addmm(realigned(bias), values, metadata, b)
    return d.T.contiguous() if spec.d_transposed else d
