"""Whether sparse kernels are worth it where they are legal: asked of measurements, never of a model of the GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .config import WeightSparsity
from .gemms import GradWeight, Linear, Use, aten

log = logging.getLogger(__name__)

SLOWER = "measured slower"
_ROWS = 8
"""The sparse kernels pad M to a multiple of 8."""
_TILE = 64
"""Those that contract over rows, or pack them, pad to a multiple of 64."""

# GPU microseconds, sparse and dense; None if they cannot be known.
_Times = tuple[float, float] | None


def why_slower(uses: Sequence[Use], weight: Node, scheme: WeightSparsity) -> str | None:
    """Why the sparse GEMMs of one linear lose against dense ones with the masked weight, or None if they win.

    One answer for output and grad_input together: both feed on one S(W), and a mixed choice would make it twice.
    What S(W) costs, packed or dense, is counted. Where M is not known at compile time the sparse kernels are taken.
    """

    def prepare() -> _Times:
        value, dtype = weight.meta["val"], uses[0].operand.meta["val"].dtype
        return _preparation("S(W)", value, tuple(value.shape), dtype, scheme.mask)

    return _verdict([_call(_of_weight, use) for use in uses], prepare, "a dense masked weight")


def why_slower_gradient(grad_weight: GradWeight) -> str | None:
    """Why the sparse GEMM of a 2:4 grad_output loses against a dense one, or None. The estimate is counted."""
    value = grad_weight.gemm.meta["val"]
    operand = grad_weight.gemm.args[grad_weight.place]
    assert isinstance(operand, Node)
    n = value.shape[grad_weight.place]
    k, m = value.shape[1 - grad_weight.place], operand.meta["val"].numel() // n

    def prepare() -> _Times:
        return _preparation("MVUE(dY)", value, (m, n), value.dtype)

    def timing() -> _Times:
        return _timing(value, k, n, m + -m % _TILE, False, "grad_weight")

    return _verdict([timing], prepare, "a dense estimate of grad_output")


def why_slower_input(linear: Linear, mask: str, *, grad_weight: bool) -> str | None:
    """Why the sparse GEMMs of a 2:4 input lose against dense ones with the masked input, or None. S(X) is counted."""
    value = linear.output.gemm.meta["val"]
    _, n, k = linear.shape
    m = value.numel() // n
    rows = m + -m % _TILE
    gemms = [lambda: _timing(value, n, rows, k, False, "input")]
    if grad_weight:
        gemms.append(lambda: _timing(value, n, k, rows, False, "input_grad_weight"))

    def prepare() -> _Times:
        return _preparation("S(X)", value, (m, k), value.dtype, mask)

    return _verdict(gemms, prepare, "a dense masked input")


def _call(function: Callable[..., _Times], *args: Any) -> Callable[[], _Times]:
    return lambda: function(*args)


def _verdict(gemms: Sequence[Callable[[], _Times]], prepare: Callable[[], _Times], otherwise: str) -> str | None:
    try:
        times = [one() for one in gemms]
        if None in times or not times:
            return None
        times.append(prepare())
    except RuntimeError as error:  # out of memory, or a library that refuses: training goes on with the default
        log.warning("the 2:4 kernels could not be measured (%s): the default ones are used", error)
        return None
    sparse_us, dense_us = (sum(each) for each in zip(*(one or (0.0, 0.0) for one in times), strict=True))
    if sparse_us < dense_us:
        return None
    return f"{SLOWER}: {sparse_us:.0f} us with 2:4 kernels, {dense_us:.0f} us with {otherwise}"


def _preparation(
    operand: Any, value: torch.Tensor, shape: tuple[Any, ...], dtype: torch.dtype, mask: str = ""
) -> _Times:
    """Of making the structured operand, packed and dense, from a tensor of the device and dtype of ``value``."""
    from .kernels.measure import preparation_of

    if value.dtype == torch.float64:
        return None
    timing = preparation_of(operand, _index(value.device), (shape[0], shape[1]), value.dtype, dtype, mask)
    return timing.sparse_us, timing.dense_us


def _of_weight(use: Use) -> _Times:
    value = use.gemm.meta["val"]
    n, k = value.shape[-1], use.operand.meta["val"].numel() // value.shape[-1]
    m = value.numel() // n
    return _timing(value, m + -m % _ROWS, n, k, use.gemm.target is aten.addmm.default, "linear")


def _timing(value: torch.Tensor, m: Any, n: Any, k: Any, bias: bool, form: Any) -> _Times:
    """Of a GEMM whose result is like ``value``, measured now if it is not known."""
    if not value.is_cuda or not all(isinstance(size, int) and size > 0 for size in (m, n, k)):
        return None
    from .kernels import probe
    from .kernels.measure import timing_of
    from .kernels.problem import Problem

    backend = probe.backend(value.device, value.dtype)
    if isinstance(backend, str) or not backend.is_measured:
        return None  # torch's own calls choose their algorithm themselves
    timing = timing_of(Problem(_index(value.device), value.dtype, m, n, k, bias, form), measure=True)
    return None if timing is None else (timing.sparse_us, timing.dense_us)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()
