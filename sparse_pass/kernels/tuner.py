"""Products by the fastest algorithm, which is measured where it is not known yet."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..vocabulary import PRODUCTS, Form
from . import cusparselt
from .cusparselt import Plan
from .measure import timing_of
from .problem import Problem
from .recent import remember

log = logging.getLogger(__name__)

_CHOSEN: dict[Problem, Plan] = {}


def product(
    form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, output: Tensor | None = None
) -> Tensor:
    """`cusparselt.product` by the fastest algorithm, which is measured at the first call where it is not known.

    A number of rows that was never measured takes the algorithm of the next one in a coarse grid, so that dynamic
    shapes measure a few times and not in every step.
    """
    m, k = PRODUCTS[form].dense_shape(*dense.shape)
    # Equal to a Problem, and made in a third of the time.
    plan = _CHOSEN.get((dense.get_device(), dense.dtype, m, n, k, bias is not None, form))  # type: ignore[call-overload]
    if plan is None:
        plan = _choose(cusparselt.problem_of(form, dense, n, bias), bias)
    return plan(dense, packed, bias, output)  # type: ignore[no-any-return]


def _choose(problem: Problem, bias: Tensor | None) -> Plan:
    capturing = torch.cuda.is_current_stream_capturing()
    timing = timing_of(problem, measure=False)
    if timing is None:
        try:
            timing = timing_of(problem.like(_grid(problem.rows)), measure=not capturing)
        except RuntimeError as error:
            log.warning("%s could not be measured (%s): the default algorithm is used", problem, error)
    try:
        plan = cusparselt.plan_for(problem, None if timing is None else timing.algorithm, bias)
    except RuntimeError as error:
        if timing is None:
            raise
        # Chosen for another number of rows: ids are not promised for every shape.
        log.warning("%s: the default algorithm is used", error)
        plan = cusparselt.plan_for(problem, None, bias)
    if not capturing:
        remember(_CHOSEN, problem, plan)
    return plan


def _grid(rows: int) -> int:
    """The next of 64, 96, 128, 192, 256, ...: powers of two and one between each two."""
    power = max(64, 1 << (rows - 1).bit_length())
    return power * 3 // 4 if rows <= power * 3 // 4 and power > 64 else power
