"""A linear whose three GEMMs read what a recipe says: 2:4 gradients, numbers rounded to 8 bits, prepared weights.

All GEMMs are dense ones in the compute dtype: the loss of a recipe does not depend on the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# 2:4 gradients.


def mvue24(values: Tensor, seed: Tensor) -> Tensor:
    """The minimum-variance unbiased 2:4 estimate, groups of four along dim 0 (Chmiel et al., arXiv 2203.10991).

    values: [M, N], M a multiple of 4; seed: int32, one element. Returns [M, N], at most two of each group not zero.

    Element i of a group is kept with probability p_i = min(a_i / h, 1), h such that they add up to 2, and is then
    x_i / p_i. The only one that may be cut off at 1 is the largest, if it exceeds the sum of the others. With one
    random point u in [0, 1), kept are those in whose piece of [0, 2) u or u + 1 lies (systematic sampling).
    """
    rows, cols = values.shape
    group = values.reshape(rows // 4, 4, cols).to(torch.promote_types(values.dtype, torch.float32))
    a, b, c, d = (group[:, i : i + 1].abs() for i in range(4))
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    lower, higher = torch.minimum(c, d), torch.maximum(c, d)
    rest = low + lower + torch.minimum(high, higher)
    h = torch.minimum(rest, (rest + torch.maximum(high, higher)) / 2).clamp(min=1e-37)
    p, q, r = ((x / h).clamp(max=1) for x in (a, b, c))
    place = torch.arange(4, device=values.device).view(1, 4, 1)
    # The same sums in the same order at both ends of a piece, so that neighbours meet without gap or overlap.
    before = torch.where(place > 0, p, 0) + torch.where(place > 1, q, 0) + torch.where(place > 2, r, 0)
    after = p + torch.where(place > 0, q, 0) + torch.where(place > 1, r, 0)
    before, after = before.clamp(max=2), torch.where(place > 2, 2, after).clamp(max=2)
    u = _uniform(rows // 4, cols, seed).view(rows // 4, 1, cols)
    kept = torch.ceil(after - u) > torch.ceil(before - u)
    estimate = torch.where(kept, torch.sign(group) * torch.maximum(group.abs(), h), 0)
    return estimate.to(values.dtype).reshape(rows, cols)


def _uniform(rows: int, cols: int, seed: Tensor) -> Tensor:
    """float32 [rows, cols] in [0, 1): a hash of the place and the seed, cheaper in a fused kernel than torch.rand."""
    index = torch.arange(rows * cols, dtype=torch.int32, device=seed.device)
    word = _stir(index) ^ seed
    word = _stir(_stir(word))
    return ((word >> 8) & 0xFFFFFF).to(torch.float32).mul(2.0**-24).view(rows, cols)


def _stir(word: Tensor) -> Tensor:
    """Products of int32 wrap around."""
    word = (word ^ (word >> 16 & 0xFFFF)) * 0x45D9F3B
    return word ^ (word >> 16 & 0xFFFF)


# 8 bits.


class Cast(NamedTuple):
    """Rounding to 8 bits with one scale for the tensor, or one for each slice along `dim`."""

    dtype: torch.dtype = torch.float8_e4m3fn
    dim: int | None = None
    """The dim that is reduced."""
    power_of_two: bool = False


class Casts(NamedTuple):
    """One for each operand: input [M, K], weight [N, K], grad_output [M, N]; None: not rounded."""

    input: Cast | None = None
    weight: Cast | None = None
    grad_output: Cast | None = None
    weight_for_grad_input: Cast | None = None
    input_for_grad_weight: Cast | None = None
    grad_output_for_grad_weight: Cast | None = None


_TENSOR, _ROW, _COLUMN = (Cast(power_of_two=True, dim=dim) for dim in (None, 1, 0))
_E4M3, _E5M2 = Cast(), Cast(dtype=torch.float8_e5m2)

FLOAT8 = {
    "none": Casts(),
    # Output and grad_input in e4m3, scales that are powers of two; grad_weight in the compute dtype.
    "pow2": Casts(_TENSOR, _TENSOR, _TENSOR, _TENSOR, None, None),
    # The recipes of torchao.float8 (0.18) by these names.
    "tensorwise": Casts(_E4M3, _E4M3, _E5M2, _E4M3, _E4M3, _E5M2),
    "rowwise": Casts(_ROW, _ROW, _ROW, _COLUMN, _COLUMN, _COLUMN),
    "rowwise_with_gw_hp": Casts(_ROW, _ROW, _ROW, _TENSOR, None, None),
}


def round8(values: Tensor, cast: Cast | None) -> Tensor:
    """Values of 8 bits in the dtype of `values` [rows, cols].

    Exact where that is bfloat16 and the scale a power of two; else the product with the scale is rounded once more.
    """
    if cast is None:
        return values
    magnitude = values.abs()
    amax = magnitude.amax() if cast.dim is None else magnitude.amax(dim=cast.dim, keepdim=True)
    limit = torch.finfo(cast.dtype).max
    scale = limit / amax.float().clamp(min=1e-12)
    if cast.power_of_two:
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone: rounded down
    eight = (values.float() * scale).clamp(-limit, limit).to(cast.dtype)
    return (eight.float() / scale).to(values.dtype)


# The linear.


class _Product(torch.autograd.Function):
    """Y = X W1^T + b, with gradients as `Linear` says. X [M, K], W [N, K], b [N]."""

    @staticmethod
    def forward(ctx, x, weight, bias, for_output, for_grad_input, seed, grad_input, grad_weight, float8):
        ctx.save_for_backward(x, for_grad_input, seed)
        ctx.recipe = grad_input, grad_weight, float8
        ctx.weight_dtype = weight.dtype
        return F.linear(round8(x, FLOAT8[float8].input), for_output, bias)

    @staticmethod
    def backward(ctx, dy):
        x, for_grad_input, seed = ctx.saved_tensors
        grad_input, grad_weight, float8 = ctx.recipe
        casts = FLOAT8[float8]
        for_dx = mvue24(dy.T, seed + 1).T if grad_input == "mvue" else dy
        for_dw = mvue24(dy, seed) if grad_weight == "mvue" else dy
        dx = round8(for_dx, casts.grad_output) @ for_grad_input
        dw = round8(for_dw, casts.grad_output_for_grad_weight).T @ round8(x, casts.input_for_grad_weight)
        return dx, dw.to(ctx.weight_dtype), dy.sum(0), None, None, None, None, None, None


class Linear(nn.Module):
    """A linear whose `output` and `grad_input` read weights that `weights.Weights` prepares once a step.

    The parameter `weight` itself is read by no GEMM and gets the gradient dY^T X.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for name in ("for_output", "for_grad_input"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.register_buffer("seed", torch.zeros(1, dtype=torch.int32), persistent=False)
        self.grad_input, self.grad_weight, self.float8 = "plain", "plain", "none"

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.for_output.dtype
        y = _Product.apply(
            x.to(dtype).flatten(0, -2),
            self.weight,
            self.bias.to(dtype),
            self.for_output,
            self.for_grad_input,
            self.seed,
            self.grad_input,
            self.grad_weight,
            self.float8,
        )
        return y.unflatten(0, x.shape[:-1])
