"""The matrix products that cuSPARSELt is asked for, and the ids of its algorithms for them.

D = A B with A structured: [N, K], packed. Where B and D come from and go to is the *form*; each stands for one GEMM of
a linear, whose letters are others:

    form                 A                    B                 D
    "linear"             S(W)    [N, K]       X   [M, K]        [M, N]   output, and grad_input with S(W)^T
    "grad_weight"        MVUE(dY)^T [N, K]    X   [K, M]        [N, M]   K of it is padded rows
    "input"              S(X)    [N, K]       W   [M, K]        [N, M]   output
    "input_grad_weight"  S(X)^T  [N, K]       dY  [K, M]        [M, N]   K of it is padded rows

All of them row-major. M is a multiple of 8; N and K are multiples of 16 (of 64 in the SM90 layout).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

Form = Literal["linear", "grad_weight", "input", "input_grad_weight"]
FORMS: tuple[Form, ...] = get_args(Form)

B_TRANSPOSED = {"linear": True, "grad_weight": False, "input": True, "input_grad_weight": False}
"""Whether B is stored [M, K]."""
D_TRANSPOSED = {"linear": True, "grad_weight": False, "input": False, "input_grad_weight": True}
"""Whether D is stored [M, N]."""


class Problem(NamedTuple):
    """What a plan depends on."""

    device: int
    dtype: torch.dtype
    m: int
    n: int
    k: int
    bias: bool
    form: Form = "linear"

    @property
    def output_shape(self) -> tuple[int, int]:
        return (self.m, self.n) if D_TRANSPOSED[self.form] else (self.n, self.m)

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Of B as it is stored."""
        return (self.m, self.k) if B_TRANSPOSED[self.form] else (self.k, self.m)

    def __str__(self) -> str:
        bias = " + bias" if self.bias else ""
        about = f"{self.form}: 2:4 [{self.n}, {self.k}] x [{self.k}, {self.m}]{bias}"
        return f"{about} {str(self.dtype).removeprefix('torch.')} on cuda:{self.device}"

    def like(self, rows: int) -> Problem:
        """The same with another number of rows of X, by whatever letter it goes here."""
        if self.form == "linear":
            return self._replace(m=rows)
        rows = -(-rows // 64) * 64
        return self._replace(n=rows) if self.form == "input" else self._replace(k=rows)

    @property
    def rows(self) -> int:
        """The number of rows of X."""
        return {"linear": self.m, "input": self.n}.get(self.form, self.k)


# Ids by the first two numbers of the library's version, dtype and form, the default first: those that were fastest for
# some shape on an H200 with 0.8.0, benchmarks/results/kernels_algorithms*. An id means another kernel in another
# version or dtype. Each was right alone for all shapes that were tried; trying all ids in one process has ended in an
# illegal instruction. An id that nobody tried may do anything, so other versions keep algorithm 0.
_IDS: dict[tuple[tuple[int, ...], torch.dtype, Form], tuple[int, ...]] = {
    ((0, 8), torch.bfloat16, "linear"): (17, 0, 4, 10, 12, 18, 20),
    ((0, 8), torch.bfloat16, "grad_weight"): (3, 0, 1, 2, 6),
    ((0, 8), torch.bfloat16, "input"): (1, 0, 17, 20),
    ((0, 8), torch.bfloat16, "input_grad_weight"): (1, 0, 17),
    ((0, 8), torch.float16, "linear"): (6, 0, 1, 4, 5, 7, 13),
    ((0, 8), torch.float16, "grad_weight"): (0, 1, 2),
    ((0, 8), torch.float16, "input"): (0, 7, 11),
    ((0, 8), torch.float16, "input_grad_weight"): (11, 0, 5, 9),
}


def algorithms(version: tuple[int, ...], dtype: torch.dtype, form: Form) -> tuple[int, ...]:
    """The ids worth trying, the default first; 0, the library's own default, is always among them."""
    return _IDS.get((version[:2], dtype, form), (0,))
