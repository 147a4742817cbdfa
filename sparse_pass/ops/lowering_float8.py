"""Scales and casts of float8 as Inductor's own arithmetic, so that it fuses them with what is computed around them.

Bit for bit those of `reference.float8`. `round_float8` stays a call: Inductor leaves out a cast to a narrow type and
back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.lowering import lowerings

from ..vocabulary import FLOAT8
from .reference.float8 import EXPONENT, LARGEST, SMALLEST

aten, prims = torch.ops.aten, torch.ops.prims


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return lowerings[prims.convert_element_type.default](x, dtype)


def scale(tensor: Any, factor: float = 1.0) -> Any:
    """`reference.float8.scale`."""
    largest = lowerings[aten.abs.default](tensor)
    if len(tensor.get_size()) > 1:
        # Row by row first, as norms and elementwise kernels go through it: fused with the one that makes the tensor.
        largest = lowerings[aten.amax.default](largest, [-1])
    largest = _cast(lowerings[aten.amax.default](largest, list(range(len(largest.get_size())))), torch.float32)
    if factor != 1.0:
        largest = lowerings[aten.mul.Tensor](largest, factor)
    quotient = lowerings[aten.div.Tensor](LARGEST, lowerings[aten.clamp_min.default](largest, SMALLEST))
    bits = lowerings[aten.bitwise_and.Scalar](lowerings[aten.view.dtype](quotient, torch.int32), EXPONENT)
    power = lowerings[aten.view.dtype](bits, torch.float32)
    finite = lowerings[aten.lt.Scalar](largest, float("inf"))
    return lowerings[aten.where.self](finite, power, float("nan"))


def inverse(scale: Any, other: Any) -> Any:
    """`reference.float8.inverse`: one number in memory, so that what reads it reads one tensor less."""
    result = lowerings[aten.reciprocal.default](lowerings[aten.mul.Tensor](scale, other))
    result.realize()
    return result


def quantize(tensor: Any, scale: Any) -> Any:
    """`reference.float8.quantize`."""
    scaled = lowerings[aten.mul.Tensor](_cast(tensor, torch.float32), scale)
    above = lowerings[aten.clamp_min.default](scaled, -LARGEST)
    return _cast(lowerings[aten.clamp_max.default](above, LARGEST), FLOAT8)
