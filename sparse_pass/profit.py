"""Whether sparse kernels are worth it where they are legal: asked of measurements, never of a model of the GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.fx import Node

from .config import WeightSparsity
from .gemms import Use, aten

log = logging.getLogger(__name__)

_ROWS = 8
"""The sparse kernels pad M to a multiple of 8."""


def why_slower(uses: Sequence[Use], weight: Node, scheme: WeightSparsity) -> str | None:
    """Why the sparse GEMMs of one linear lose against dense ones with the masked weight, or None if they win.

    One answer for output and grad_input together: both feed on one S(W), and a mixed choice would make it twice.
    What S(W) costs, packed or dense, is counted. Where M is not known at compile time the sparse kernels are taken.
    """
    try:
        timings = [_timing(use) for use in uses]
        if None in timings or not timings:
            return None
        timings.append(_preparation(uses[0], weight, scheme))
    except RuntimeError as error:  # out of memory, or a library that refuses: training goes on with the default
        log.warning("the 2:4 kernels could not be measured (%s): the default ones are used", error)
        return None
    sparse_us, dense_us = (sum(times) for times in zip(*(one or (0.0, 0.0) for one in timings), strict=True))
    if sparse_us < dense_us:
        return None
    return f"measured slower: {sparse_us:.0f} us with 2:4 kernels, {dense_us:.0f} us with a dense masked weight"


def _preparation(use: Use, weight: Node, scheme: WeightSparsity) -> tuple[float, float] | None:
    """GPU microseconds of making S(W), packed and as a dense masked weight."""
    from .kernels import tuner

    value, dtype = weight.meta["val"], use.operand.meta["val"].dtype
    if value.dtype == torch.float64:
        return None
    device = value.device.index if value.device.index is not None else torch.cuda.current_device()
    timing = tuner.preparation_of(device, tuple(value.shape), value.dtype, dtype, scheme.mask)
    return timing.sparse_us, timing.dense_us


def _timing(use: Use) -> tuple[float, float] | None:
    """GPU microseconds of a GEMM (sparse, dense), measured now if they are not known; None if that is impossible."""
    value = use.gemm.meta["val"]
    if not value.is_cuda:
        return None
    from .kernels import probe
    from .kernels.cusparselt import Problem
    from .kernels.tuner import timing_of

    n, k = value.shape[-1], use.operand.meta["val"].numel() // value.shape[-1]
    m = value.numel() // n
    if not isinstance(m, int) or m == 0:
        return None
    if probe.layout(value.device, value.dtype) != probe.SM90:
        return None  # torch's own calls choose their algorithm themselves
    device = value.device.index if value.device.index is not None else torch.cuda.current_device()
    bias = use.gemm.target is aten.addmm.default
    problem = Problem(device, value.dtype, m + -m % _ROWS, n, k, bias)
    timing = timing_of(problem, measure=True)
    return None if timing is None else (timing.sparse_us, timing.dense_us)
