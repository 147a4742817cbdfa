"""Whether sparse kernels are worth it where they are legal: asked of measurements, never of a model of the GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from ..vocabulary import PRODUCTS

log = logging.getLogger(__name__)

_OTHERWISE = {"weight": "a dense masked weight", "input": "a dense masked input",
              "grad_output": "a dense estimate of grad_output"}  # fmt: skip

Times: TypeAlias = "tuple[float, float] | None"
"""GPU microseconds, sparse and dense; None if they cannot be known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """A sparse GEMM of a linear [M, N, K], all sizes as they are in the graph."""

    form: Any
    """``"linear"`` (of a weight), ``"input"`` or ``"input_grad_weight"``; of an estimate ``"grad_weight"``,
    ``"grad_weight_t"`` or ``"grad_input"``."""
    device: torch.device
    dtype: torch.dtype
    m: Any
    n: Any
    k: Any
    bias: bool = False

    @property
    def sizes(self) -> tuple[Any, Any, Any]:
        """As the kernels take them, which call them M, N and K as well: M of the linear is padded."""
        m = self.m + -self.m % PRODUCTS[self.form].multiple(self.dtype)
        return {
            "linear": (m, self.n, self.k),
            "grad_weight": (self.k, self.n, m),
            "grad_weight_t": (self.k, self.n, m),
            "input": (self.n, m, self.k),
            "input_grad_weight": (self.n, self.k, m),
            "grad_input": (self.k, m, self.n),
        }[self.form]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """Making a structured operand, packed or dense, of a tensor of this device, shape and dtype."""

    operand: Any
    """``"S(W)"``, ``"S(X)"``, the name of an estimate, or empty for one that is not measured."""
    device: torch.device
    shape: tuple[Any, Any]
    stored: torch.dtype
    dtype: torch.dtype
    """That of the GEMMs."""
    mask: str = ""


class Costs(Protocol):
    """What sparse and dense ways cost."""

    def product(self, product: Product) -> Times:
        """Of a GEMM."""

    def preparation(self, preparation: Preparation) -> Times:
        """Of a structured operand."""


class Measured:
    """Times of this GPU, measured now if they are not known."""

    def product(self, product: Product) -> Times:
        """Of a GEMM."""
        m, n, k = product.sizes
        if product.device.type != "cuda" or not all(isinstance(size, int) and size > 0 for size in (m, n, k)):
            return None
        from ..kernels import probe
        from ..kernels.measure import timing_of
        from ..kernels.problem import Problem

        backend = probe.backend(product.device, product.dtype)
        if isinstance(backend, str) or not backend.is_measured:
            return None  # torch's own calls choose their algorithm themselves
        problem = Problem(_index(product.device), product.dtype, m, n, k, product.bias, product.form)
        timing = timing_of(problem, measure=True)
        return None if timing is None else (timing.sparse_us, timing.dense_us)

    def preparation(self, preparation: Preparation) -> Times:
        """Of a structured operand."""
        one = preparation
        if one.stored == torch.float64 or not one.operand:
            return None
        from ..kernels import probe
        from ..kernels.measure import Packers, preparation_of

        backend = probe.backend(one.device, one.dtype)
        if isinstance(backend, str) or not backend.is_measured:
            return None
        packers, dtypes = Packers(backend.name, backend.packer), (one.stored, one.dtype)
        timing = preparation_of(packers, one.operand, _index(one.device), one.shape, dtypes, one.mask)
        return timing.sparse_us, timing.dense_us


def why_slower(costs: Costs, role: str, products: Sequence[Product], preparation: Preparation) -> str | None:
    """Why all sparse GEMMs of one structured operand lose against dense ones with the masked operand; None if they win.

    One answer for all of them: they feed on one operand, and a mixed choice would make it twice. What making it costs,
    packed or dense, is counted. Where M is not known at compile time the sparse kernels are taken.
    """
    try:
        asked = [costs.product(product) for product in products]
        times = [time for time in asked if time is not None]
        if len(times) < len(asked):
            return None
        times.append(costs.preparation(preparation) or (0.0, 0.0))
    except RuntimeError as error:  # out of memory, or a library that refuses: training goes on with the default
        log.warning("the 2:4 kernels could not be measured (%s): the default ones are used", error)
        return None
    sparse_us, dense_us = (sum(each) for each in zip(*times, strict=True))
    if sparse_us < dense_us:
        return None
    return f"measured slower: {sparse_us:.0f} us with 2:4 kernels, {dense_us:.0f} us with {_OTHERWISE[role]}"


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()
