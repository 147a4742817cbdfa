"""What compiled code calls on a CPU, as it calls `kernels.compiled` on a GPU: to test `lowering` without one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...vocabulary import FORMS, PRODUCTS, Form
from .float8 import sparsify as sparsify_float8
from .float8 import sparsify_mvue as sparsify_mvue_float8
from .gradients import sparsify_mvue, sparsify_mvue_sum
from .inputs import sparsify_input
from .products import product
from .weights import sparsify, sparsify_one

__all__ = [
    "grad_input_into",
    "grad_weight_into",
    "grad_weight_t_into",
    "input_grad_weight_into",
    "input_linear_into",
    "linear_into",
    "sparsify",
    "sparsify_float8",
    "sparsify_input",
    "sparsify_mvue",
    "sparsify_mvue_float8",
    "sparsify_mvue_sum",
    "sparsify_one",
]


def _into(form: Form) -> Callable[..., None]:
    n = int(PRODUCTS[form].d_transposed)

    def multiply(dense: Tensor, packed: Tensor, bias: Tensor | None = None, *, tuned: bool, out: Tensor) -> None:
        out.copy_(product(form, dense, packed, out.shape[n], bias))

    return multiply


(
    linear_into,
    grad_weight_into,
    grad_weight_t_into,
    input_linear_into,
    input_grad_weight_into,
    grad_input_into,
) = map(_into, FORMS)
