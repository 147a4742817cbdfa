"""The products that cuSPARSELt is asked for, see `vocabulary.Product`, and the ids of its algorithms for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..vocabulary import FLOAT8, PRODUCTS, Form, output_dtype, padded


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
    def output_dtype(self) -> torch.dtype:
        return output_dtype(self.dtype)

    @property
    def output_shape(self) -> tuple[int, int]:
        return PRODUCTS[self.form].output_shape(self.m, self.n)

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Of B as it is stored."""
        return PRODUCTS[self.form].dense_shape(self.m, self.k)

    @property
    def capability(self) -> tuple[int, int]:
        """Of the device."""
        return torch.cuda.get_device_capability(self.device)

    def __str__(self) -> str:
        bias = " + bias" if self.bias else ""
        about = f"{self.form}: 2:4 [{self.n}, {self.k}] x [{self.k}, {self.m}]{bias}"
        return f"{about} {str(self.dtype).removeprefix('torch.')} on cuda:{self.device}"

    def like(self, rows: int) -> Problem:
        """The same with another number of rows of X, by whatever letter it goes here."""
        spec = PRODUCTS[self.form]
        return self._replace(**{spec.rows: padded(rows, spec.multiple(self.dtype))})  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """The number of rows of X."""
        return int(getattr(self, PRODUCTS[self.form].rows))


# Of GPUs of this compute capability.
_TRIED_ON = (9, 0)
# Ids by the first two numbers of the library's version, dtype and form, the default first: those that were fastest for
# some shape on an H200 (float8: an H100) with 0.8.0, benchmarks/results/kernels_algorithms*. An id means another kernel
# in another version or dtype, or on another GPU. Each was right alone for all shapes that were tried; trying all ids in
# one process has ended in an illegal instruction. An id that nobody tried may do anything, so other versions and other
# GPUs keep algorithm 0. For "grad_input" the library is asked for the same product as for "grad_weight", of other
# sizes: it has the ids of that.
_IDS: dict[tuple[tuple[int, ...], torch.dtype, Form], tuple[int, ...]] = {
    ((0, 8), FLOAT8, "linear"): (16, 0, 4, 6, 8, 17, 19, 24),
    ((0, 8), FLOAT8, "grad_weight_t"): (12, 0, 6, 13, 18, 20, 21),
    ((0, 8), torch.bfloat16, "linear"): (17, 0, 4, 10, 12, 18, 20),
    ((0, 8), torch.bfloat16, "grad_weight"): (3, 0, 1, 2, 6),
    ((0, 8), torch.bfloat16, "input"): (1, 0, 17, 20),
    ((0, 8), torch.bfloat16, "input_grad_weight"): (1, 0, 17),
    ((0, 8), torch.bfloat16, "grad_input"): (3, 0, 1, 2, 6),
    ((0, 8), torch.float16, "linear"): (6, 0, 1, 4, 5, 7, 13),
    ((0, 8), torch.float16, "grad_weight"): (0, 1, 2),
    ((0, 8), torch.float16, "input"): (0, 7, 11),
    ((0, 8), torch.float16, "input_grad_weight"): (11, 0, 5, 9),
    ((0, 8), torch.float16, "grad_input"): (0, 1, 2),
}


def algorithms(
    version: tuple[int, ...], dtype: torch.dtype, form: Form, capability: tuple[int, int]
) -> tuple[int, ...]:
    """The ids worth trying, the default first; 0, the library's own default, is always among them."""
    ids = {_TRIED_ON: _IDS}.get(capability, {})
    return ids.get((version[:2], dtype, form), (0,))
