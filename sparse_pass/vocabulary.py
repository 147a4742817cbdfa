"""The words that operators, kernels and rules share: GEMMs and operands, forms of products, masks and packed matrices.

The three GEMMs of a linear `Y = X W^T + b`, with X [M, K], W [N, K], Y [M, N]:

    output       Y  = X W^T + b
    grad_input   dX = dY W
    grad_weight  dW = dY^T X
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch

GemmName = Literal["output", "grad_input", "grad_weight"]
Role = Literal["weight", "input", "grad_output"]
"""What an operand of a GEMM is."""

TILE = 4
"""Masks are chosen in tiles of 4x4: both dims of a weight must be multiples of 4."""
KERNEL_TILE = 64
"""The packed layout is made of tiles of 64x64: N and K of a sparse GEMM must be multiples of 64."""
GRAD_TILE = 16
"""K of a 2:4 gradient's GEMM, whose sparse operand is [N, M], must be a multiple of 16: a limit of cuSPARSELt."""
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
FLOAT8 = torch.float8_e4m3fn
FLOAT8_OUTPUT = torch.bfloat16
"""Of a product of float8 operands, before it is multiplied by the inverse of their scales."""
MIN_CAPABILITY = (8, 0)
"""Sparse tensor cores came with SM80 (A100)."""
FLOAT8_CAPABILITY = (8, 9)
"""Tensor cores for float8 came with SM89."""

MASKS = ("optimal", "greedy")
"""Masks of 4x4 tiles, two of four along rows and columns."""

Layout = Literal["sm90", "sm80", "cutlass", "dense"]
"""Orders of a packed matrix, `ops.reference.weights.pack`: of cuSPARSELt on SM90 and on SM8x, and of CUTLASS on SM8x;
"dense" is the masked matrix as it is, which a library packs."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Form = Literal["linear", "grad_weight", "grad_weight_t", "input", "input_grad_weight", "grad_input"]
FORMS: tuple[Form, ...] = get_args(Form)
_Size = TypeVar("_Size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """Where the operands of `D = A B` come from and where D goes. A is structured: [N, K], packed. All are row-major.

    M is a multiple of 8, of 16 in 8 bits; N and K are multiples of 16 (of 64 in the SM90 layout). The letters are those
    of the product, and each form stands for a GEMM of a linear, whose letters are others.
    """

    op: str
    """The operator, `torch.ops.sparse_pass.<op>`."""
    structured: Role
    b_transposed: bool
    """Whether B is stored [M, K]."""
    d_transposed: bool
    """Whether D is stored [M, N]."""
    rows: Literal["m", "n", "k"]
    """The letter that counts the rows of X, and is padded."""

    def multiple(self, dtype: torch.dtype) -> int:
        """What rows are padded to: packed ones, and those that are contracted over, to whole tiles."""
        return row_multiple(dtype) if self.rows == "m" else KERNEL_TILE

    def operands(self, first: Any, second: Any, *rest: Any) -> tuple[Any, Any, Any, Any]:
        """B, A packed, N and the bias or None, from the arguments of the operator."""
        # A packed weight comes second, as in every linear; a packed input or gradient first.
        dense, packed = (first, second) if self.structured == "weight" else (second, first)
        *bias, n = rest
        return dense, packed, n, bias[0] if bias else None

    def dense_shape(self, m: _Size, k: _Size) -> tuple[_Size, _Size]:
        """Of B as it is stored. Of the shape of B it gives m and k."""
        return (m, k) if self.b_transposed else (k, m)

    def output_shape(self, m: _Size, n: _Size) -> tuple[_Size, _Size]:
        """Of D as it is stored."""
        return (m, n) if self.d_transposed else (n, m)


#   form                 A                    B                 D
#   "linear"             S(W)    [N, K]       X   [M, K]        [M, N]   output, and grad_input with S(W)^T
#   "grad_weight"        MVUE(dY)^T [N, K]    X   [K, M]        [N, M]   grad_weight; K of it is padded rows
#   "grad_weight_t"      the same           X^T [M, K]        [N, M]   the same, from the input's transpose
#   "input"              S(X)    [N, K]       W   [M, K]        [N, M]   output; N of it is padded rows
#   "input_grad_weight"  S(X)^T  [N, K]       dY  [K, M]        [M, N]   grad_weight; K of it is padded rows
#   "grad_input"         MVUE(dY) [N, K]      W   [K, M]        [N, M]   grad_input; N of it is padded rows
PRODUCTS: dict[Form, Product] = {
    "linear": Product(op="linear", structured="weight", b_transposed=True, d_transposed=True, rows="m"),
    "grad_weight": Product(
        op="grad_weight", structured="grad_output", b_transposed=False, d_transposed=False, rows="k"
    ),
    "grad_weight_t": Product(
        op="grad_weight_t", structured="grad_output", b_transposed=True, d_transposed=False, rows="k"
    ),
    "input": Product(op="input_linear", structured="input", b_transposed=True, d_transposed=False, rows="n"),
    "input_grad_weight": Product(
        op="input_grad_weight", structured="input", b_transposed=False, d_transposed=True, rows="k"
    ),
    "grad_input": Product(op="grad_input", structured="grad_output", b_transposed=False, d_transposed=False, rows="n"),
}


def padded(rows: int, multiple: int = KERNEL_TILE) -> int:
    """Rows rounded up, to whole tiles by default."""
    return (rows + multiple - 1) // multiple * multiple


def row_multiple(dtype: torch.dtype) -> int:
    """cuSPARSELt takes the M of a product, see `Product`, in multiples of 16 bytes."""
    return 16 // dtype.itemsize


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a product of operands of a dtype."""
    return FLOAT8_OUTPUT if dtype == FLOAT8 else dtype


def packed_numel(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Elements of a packed [padded(rows), cols], and of its transpose, in every layout.

    Of each group of four two values, and a nibble that says which two: 9/16 of the dense matrix of 16-bit values, 5/8
    of one of 8-bit values.
    """
    return padded(rows) // 8 * cols * 5 if dtype.itemsize == 1 else padded(rows) // 16 * cols * 9
