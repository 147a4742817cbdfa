"""The reference of float8 operands, plain torch on any device.

A tensor T is multiplied as q(T) = e4m3(clamp(T * s)), s = `scale(T)`; the product of two is multiplied by 1 / (s s').
e4m3 is torch.float8_e4m3fn: three bits of mantissa, magnitudes up to 448, from 2^-9 on. Scales are powers of two, so
that multiplying by them and by their inverses rounds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...vocabulary import FLOAT8 as E4M3
from . import gradients, weights

LARGEST = 448.0
"""The largest number of e4m3."""
SMALLEST = 1e-12
"""A largest magnitude below this counts as this: the scale of zeros is a number, too. As torchao's."""
EXPONENT = 0x7F800000
"""The exponent bits of a float32: with no others set it is a power of two."""


def scale(tensor: Tensor, factor: float = 1.0) -> Tensor:
    """The largest power of two s with max |factor T| * s <= 448: float32, no dims.

    tensor: floating point, not empty. NaN if it holds an
    infinity or a NaN: then all that is multiplied by it is NaN, as a loss scaler wants.
    """
    largest = tensor.detach().abs().amax().to(torch.float32) * factor
    quotient = LARGEST / largest.clamp(min=SMALLEST)
    power = (quotient.view(torch.int32) & EXPONENT).view(torch.float32)
    return torch.where(largest < float("inf"), power, float("nan"))


def inverse(scale: Tensor, other: Tensor) -> Tensor:
    """What a product of two quantized tensors is multiplied by: 1 / (s s'), a power of two, float32, no dims."""
    return (scale * other).reciprocal()


def quantize(tensor: Tensor, scale: Tensor) -> Tensor:
    """q(T): e4m3, in the shape and the memory order of T. Rounds to nearest, ties to even."""
    scaled = tensor.detach().to(torch.float32) * scale
    return scaled.clamp(-LARGEST, LARGEST).to(E4M3)


def sparsify(weight: Tensor, scale: Tensor, mask: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """S(q(factor W)) and its transpose packed: the mask is chosen on `weight` as stored, in whose dtype the product by
    `factor` is rounded."""
    kept = weights.mask24(weight, mask)
    values = quantize(weight if factor == 1 else weight.detach() * factor, scale)
    return weights.pack(values, kept), weights.pack(values.view(torch.uint8).T.contiguous().view(E4M3), kept.T)


def sparsify_mvue(grad: Tensor, seed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """q(MVUE(grad))^T packed, as `gradients.sparsify_mvue`, whose values are rounded to the dtype of grad before; and
    q(grad), contiguous.

    scale: of grad. MVUE is at most twice as large as what it estimates: half the scale cuts nothing off.
    """
    values, kept = gradients.estimate(grad, seed)
    return weights.pack(quantize(values, scale * 0.5), kept), quantize(grad, scale).contiguous()


def rounded(tensor: Tensor, scale: Tensor) -> Tensor:
    """q(T) / s in the dtype of T, which holds it exactly, but for float16 where T is below 2^-6 throughout."""
    return (quantize(tensor, scale).to(torch.float32) / scale).to(tensor.dtype)
