"""What compiled code calls, see `ops.lowering`: no checks, on the current device, SM90 layout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..vocabulary import FORMS, PRODUCTS, Form
from . import cusparselt, tuner
from .mvue import sparsify_mvue, sparsify_mvue_sum
from .mvue_float8 import sparsify_mvue_float8
from .sparsify import sparsify, sparsify_input, sparsify_one
from .sparsify_float8 import sparsify_float8

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
        """``out`` = D of the form: all contiguous, sizes positive and padded as `vocabulary.Product` says."""
        product = tuner.product if tuned else cusparselt.product
        product(form, dense, packed, out.shape[n], bias, out)

    return multiply


(
    linear_into,
    grad_weight_into,
    grad_weight_t_into,
    input_linear_into,
    input_grad_weight_into,
    grad_input_into,
) = map(_into, FORMS)
