"""The route without this package: torch's own `_cslt_*` calls in an autograd function, as a user would write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparse_pass as sp


class NaiveProduct(torch.autograd.Function):
    """x [M, K] times a 2:4 weight [N, K], straight-through: grad_weight is dense. ``kept`` is the masked weight."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        packed, packed_t = torch._cslt_compress(kept), torch._cslt_compress(kept.T.contiguous())
        ctx.save_for_backward(x, packed_t)
        return torch._cslt_sparse_mm(packed, x.T, transpose_result=True)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, packed_t = ctx.saved_tensors
        grad = grad.contiguous()
        return torch._cslt_sparse_mm(packed_t, grad.T, transpose_result=True), grad.T @ x, None


def naive_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a 2:4 weight; x of any rank, a multiple of 8 rows in all."""
    kept = torch.where(sp.mask24(weight.detach()), weight.detach(), 0)
    y = NaiveProduct.apply(x.reshape(-1, x.shape[-1]), weight, kept).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class NaiveLinear(nn.Linear):
    """A module swap: give it to ``linear.__class__`` of a layer, and take it back."""

    def forward(self, input: Tensor) -> Tensor:
        return naive_linear(input, self.weight, self.bias)


def swap(model: nn.Module, names: list[str], kind: type[nn.Linear] = NaiveLinear) -> None:
    """Make the named layers of a model ``kind``; `nn.Linear` is the way back."""
    for name in names:
        model.get_submodule(name).__class__ = kind
