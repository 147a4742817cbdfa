"""What a plan asks of a device, answered for a GPU that is not there: `Limits` and `Costs` made of shipped data."""

from __future__ import annotations

import torch

from ..plan.costs import Preparation, Product, Times
from ..plan.limits import Limits
from ..vocabulary import FLOAT8, KERNEL_DTYPES
from .gpus import Gpu

_MASKED_BYTES = 8
"""That a dense S(W) moves, an element: W is read and the mask written, both are read and S(W) is written."""


class Predicted:
    """`Costs` of a GPU, by interpolation of what was measured on one of its kind."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def limits(self, device: torch.device, dtype: torch.dtype) -> Limits:
        """Those of the GPU, whatever device the graph is captured on."""
        return Limits(device="cuda", capability=self.gpu.capability)

    def product(self, product: Product) -> Times:
        """Of a GEMM; None where a size is not known, or for a dtype that was not measured."""
        sizes = product.m, product.n, product.k
        if product.dtype not in (*KERNEL_DTYPES, FLOAT8) or not all(
            isinstance(size, int) and size > 0 for size in sizes
        ):
            return None
        # float8 was not measured: it counts as 16 bits.
        form = "grad_weight" if product.form == "grad_weight_t" else product.form
        dense, sparse = self.gpu.gemm(form, *sizes)
        return sparse, dense

    def preparation(self, preparation: Preparation) -> Times:
        """Of a structured operand; None for one that was not measured."""
        one = preparation
        known = one.dtype in (*KERNEL_DTYPES, FLOAT8) and one.stored in (*KERNEL_DTYPES, torch.float32)
        if not known or not all(isinstance(size, int) for size in one.shape):
            return None
        elements = one.shape[0] * one.shape[1]
        stored = "float32" if one.stored == torch.float32 else "bfloat16"
        found = self.gpu.preparation(one.operand, one.mask, stored, elements)
        if found is None:
            return None
        packed, dense = found
        return packed, elements * _MASKED_BYTES / self.gpu.copy if dense is None else dense
