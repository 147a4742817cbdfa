"""Float8 rounding, written by hand: scales by doubling, casts by torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scale_by_hand(tensor: Tensor, factor: float = 1.0) -> float:
    """The largest power of two that leaves all of ``factor * tensor`` at most 448; of zeros that of 1e-12."""
    largest = max(float(tensor.detach().abs().max().float()) * factor, 1e-12)
    power = 2.0 ** math.floor(math.log2(448 / largest))
    while largest * power > 448:
        power /= 2
    while largest * power * 2 <= 448:
        power *= 2
    return power


def rounded(tensor: Tensor, scale: float) -> Tensor:
    """e4m3 of the tensor times its scale, without the scale and in the dtype of the tensor."""
    scaled = (tensor.detach().float() * scale).clamp(-448, 448)
    return (scaled.to(torch.float8_e4m3fn).float() / scale).to(tensor.dtype)
